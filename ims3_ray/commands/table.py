"""The commands of ``ims3``: what each says of itself, and where its code is. Nothing is imported until a command runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

JOBS, CONFIGS = "ims3_ray.commands.jobs", "ims3_ray.config"


@dataclass(frozen=True)
class Command:
    """A command. Classes and functions may be named as ``module:name``."""

    title: str
    """What it does, in a few words."""
    text: str
    """Its help, in lines of at most 120 columns."""
    tree: Any
    """Class of its config; None for a command that is given its words as they are (:attr:`takes_words_alone`)."""
    run: Any
    """Function that does the work: of the config, or of the list of words and the flags."""
    plan: Any = None
    """Function of the config that yields the texts that ``--dry-run`` prints; None for a command without ``--dry-run``."""
    positions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The keys whose values may be given as words without a key, in this order → the words that are offered for completion."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Flags → their help, for a command that takes words alone."""

    @property
    def takes_words_alone(self) -> bool:
        return self.tree is None


def named(what: Any) -> Any:
    """The object that a string ``module:name`` names; any other value is returned unchanged."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(import_module(module), name)


DRY_RUN = "print the plan and stop: nothing is computed, written or uploaded"

COMMANDS: dict[str, Command] = {
    "distill": Command(
        "Distil a labelled image set.",
        """\
Distil a labelled image set with IMS3: a few generated images per class that train classifiers almost as well.

    ims3 distill                              embedded Fashion-MNIST; results in runs/distill
    ims3 distill --dry-run                    the plan: finished stages, images, FLOPs, hours, storage, cost
    ims3 distill --config own-images data.path=photos    your own images (photos/train/CLASS/*.jpg, photos/test/…)
    ims3 distill --config own-images data.path=photos data.test_share=0.2    the same without a test split (photos/CLASS/…)
    ims3 distill --config FILE selection.alpha=0.4 selection.groups=10
    ray job submit --working-dir . -- python jobs/distill.py storage=s3://bucket/distill

After an interruption the same command continues where it stopped. Exit codes: 0 done, 1 a fault, 2 bad input or too small
a cluster (one line says what to do), 130 interrupted, 143 terminated.""",
        f"{CONFIGS}:RunConfig", f"{JOBS}:run_distill", f"{JOBS}:plan_distill",
    ),
    "compare": Command(
        "Compare distillation methods.",
        """\
Compare distillation methods with the same code: all arms at several numbers of images per class, from shared artifacts.

    ims3 compare --config compare/fashion_mnist
    ims3 compare --config compare/fashion_mnist budgets=[10] draws=[0,1,2] --dry-run

Writes table.md, report.html and results.json with the differences between methods and their standard errors. After an
interruption the same command continues where it stopped.""",
        f"{CONFIGS}:CompareConfig", f"{JOBS}:run_compare", f"{JOBS}:plan_compare",
    ),
    "evaluate": Command(
        "Score sets of images.",
        """\
Score sets of images, made by any method: train classifiers on them and measure their accuracy on the real test split.

    ims3 evaluate sets.mine=runs/demo/distilled sets.theirs=other/images
    ims3 evaluate --config data/imagewoof --config protocols/minimax sets.mine=distilled

A set is a folder with one folder of images per class, Parquet in the Hub's layout, or a hub id. `data` names the real
data; classes are matched by name. Protocols and students: docs/evaluation.md. Trainings that are already done are not
repeated.""",
        f"{CONFIGS}:EvaluateConfig", f"{JOBS}:run_evaluate", f"{JOBS}:plan_evaluate",
    ),
    "sweep": Command(
        "Search the settings of a distillation.",
        """\
Search the settings of a distillation: λ_IM, α, β, G and others. Points with the same fine-tuning share its computation.

    ims3 sweep                                     embedded Fashion-MNIST: λ_IM × α × β × G
    ims3 sweep --dry-run                           the plan: points, fine-tunings, pools, selections, hours
    ims3 sweep --config sweeps/imagewoof
    ims3 sweep space.selection.groups=[2,5,10]     another space
    ray job submit --working-dir . -- python jobs/sweep.py --config FILE storage=s3://bucket/sweeps

Writes best.yaml (for ims3 distill), report.html, figures/, points.csv and points.parquet. After an interruption the same
command continues where it stopped. Exit codes: 0 done, 1 trials failed, 2 bad input or too small a cluster, 130
interrupted.""",
        f"{CONFIGS}:SweepConfig", f"{JOBS}:run_sweep", f"{JOBS}:plan_sweep",
    ),
    "pretrain": Command(
        "Train the weights that a distillation starts from.",
        """\
Train the weights that a distillation starts from: a generator (a class-conditional DiT), an encoder φ, or an autoencoder
for generators of latents.

    ims3 pretrain --config pretrain/fashion-mnist-dit --dry-run
    ims3 pretrain --config pretrain/fashion-mnist-dit
    ims3 pretrain --config pretrain/own-generator data.path=photos generator.minutes=60    your own images

It works with every data source of the project. After an interruption the same command continues from the last
checkpoint.""",
        f"{CONFIGS}:PretrainConfig", f"{JOBS}:run_pretrain", f"{JOBS}:plan_pretrain",
    ),
    "reproduce": Command(
        "Make a table or a figure of the paper.",
        """\
Make a table or a figure of the paper, and print it beside the printed figures.

    ims3 reproduce                                       which tables and figures there are
    ims3 reproduce table-4 --dry-run                     what it takes: fine-tunes, pools, students, hours, money
    ims3 reproduce table-4 data.path=/data/imagenet      make it (published weights, GPUs)
    ims3 reproduce table-4 --small                       the same runs on stand-ins: minutes of two cores

Overrides such as storage=s3://bucket/runs apply to all runs of the table. Tables share the artifacts of one storage, so
a second table costs only what is new. Each run has a folder and a report of its own; {storage}/paper/NAME/table.md has
all accuracies beside the printed ones. After an interruption the same command continues where it stopped.""",
        None, "ims3_ray.commands.reproduce:run_words",
        flags={"small": "stand-ins in place of data, weights and GPUs", "dry-run": DRY_RUN},
    ),
    "convert": Command(
        "Convert the weights of a generator.",
        """\
Convert the weights of a generator between file formats, which are recognised by the names, and optionally merge an
adapter:

    ims3 convert generator=DiT-XL-2-256x256.pt out=dit-xl-2-256.safetensors
    ims3 convert generator=facebook/DiT-XL-2-256 out=DiT-XL-2-256.pt
    ims3 convert generator=dit.safetensors adapter=adapter.safetensors out=fine-tuned-pipeline
    ims3 convert generator=dit.safetensors 'adapter=[adopted.safetensors, fine-tuned.safetensors]' out=dit-own.safetensors""",
        "ims3_ray.commands.convert:ConvertConfig", "ims3_ray.commands.convert:convert",
    ),
    "pack": Command(
        "Pack a labelled image set as Parquet.",
        """\
Pack a labelled image set, or a part of it, as Parquet in the Hub's layout. The embedded data were made in this way:

    ims3 pack data.path=/usr/share/datasets/fashion-mnist split=train per_class=1000 out=train.parquet
    ims3 pack data.path=/usr/share/datasets/fashion-mnist split=test out=test.parquet""",
        "ims3_ray.commands.pack:PackConfig", "ims3_ray.commands.pack:pack",
    ),
    "artifacts": Command(
        "List, verify, repair or prune artifacts.",
        """\
List, verify, repair or prune the artifacts that all runs of a storage share.

    ims3 artifacts list storage=runs          every artifact: size, age, and the runs that use it
    ims3 artifacts verify storage=runs        compares every shard with its SHA-256; exit code 1 if one differs
    ims3 artifacts repair storage=runs        lets damaged and lost units count as missing
    ims3 artifacts prune storage=runs         deletes artifacts that no run uses (dry_run=true only shows them)""",
        "ims3_ray.commands.artifacts:ArtifactsConfig", "ims3_ray.commands.artifacts:run",
        positions={"action": ("list", "verify", "repair", "prune")},
    ),
    "push": Command(
        "Upload a set or weights to the Hugging Face hub.",
        """\
Upload a distilled set, weights or adapters, with their card, as a repository of the Hugging Face hub. Log in first, with
`hf auth login` or a token in HF_TOKEN.

    ims3 push runs/demo user/fashion-10 license=mit      the distilled set of a run
    ims3 push runs/pretrain/my-dit user/my-dit           weights of ims3 pretrain
    ims3 push runs/artifacts/finetune/KEY user/adapter   adapters of a fine-tuning; `ims3 artifacts list` shows the keys
    ims3 push runs/demo user/fashion-10 --dry-run        the files and the card

Others read the set with `data.path=user/fashion-10` or sets.theirs=user/fashion-10, and the weights with
generator=user/my-dit. A second upload replaces the first in one commit.""",
        "ims3_ray.commands.push:PushConfig", "ims3_ray.commands.push:push", "ims3_ray.commands.push:plan_push",
        positions={"source": (), "to": ()},
    ),
    "configs": Command(
        "List the configs that come with the package.",
        """\
List the configs that come with the package, for --config and extends: runs, data sets, methods, protocols, comparisons.

    ims3 configs
    ims3 configs methods/                     those whose names begin so""",
        None, "ims3_ray.commands.configs:print_configs",
    ),
    "schema": Command(
        "Print the JSON schema of a config.",
        """\
Print the JSON schema of the config of a command, by which editors complete and check YAML files.

    ims3 schema > ims3.schema.json            of ims3 distill
    ims3 schema sweep > sweep.schema.json     of another command""",
        None, "ims3_ray.commands.schema:print_schema",
    ),
}  # fmt: skip
