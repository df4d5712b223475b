"""The command of `jobs/pretrain.py`: trains the generator or φ, evaluates it, and writes a weights file with its card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import connected, own_device, placed, results
from ims3_ray.commands.quality import Quality, judge_encoder, judge_generator, splits_of
from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.engine.folder import check_same, completed, stored_config
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.lease import check_free, working_on
from ims3_ray.errors import UserError
from ims3_ray.io.files import is_remote
from ims3_ray.io.storage import Storage


def pretrain(config: PretrainConfig) -> Path:
    """Train ``config.target`` and write the weights and their card to ``{storage}/{name}/``. Returns the safetensors file."""
    if is_remote(config.storage):
        raise UserError(f"storage '{config.storage}' is remote; weights are trained to a folder, so give storage=/a/folder")
    data = Data(config)  # a bad source is an error before Ray starts
    folder = Path(config.storage).expanduser().resolve() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    place = Storage.at(str(folder.parent))
    described = check_pretraining(config, data.fingerprints, place)
    path = folder / f"{config.name}.safetensors"
    trainer = config.trainer
    needed = {"CPU": trainer.num_workers * trainer.cpus_per_worker, "GPU": trainer.num_workers * trainer.gpus_per_worker}
    check_free(place, config.name)
    with connected(config.cluster, {k: v for k, v in needed.items() if v}), working_on(place, config.name):
        check_pretraining(config, data.fingerprints, place)  # another process may have begun another training meanwhile
        place.write(f"{config.name}/config.yaml", yaml.safe_dump(described, sort_keys=False).encode())
        from ims3_ray.engine.loops import encoder_loop, generator_loop, source_images
        from ims3_ray.engine.train import fit

        labels = config.cluster.place.get("finetune")
        workers = [trainer.worker_resources] * trainer.num_workers
        wait_for_capacity(config.cluster, "finetune", config.name, workers, trainer.num_workers)
        if config.target == "generator":
            outcome = fit(generator_loop, canonical(config), trainer, "train", str(folder), labels)
        else:
            arguments = {
                "training": canonical(config.encoder), "images": partial(source_images, config.data), "seed": config.seed,
                "threads": trainer.threads_per_worker,
            }  # fmt: skip
            outcome = fit(encoder_loop, arguments, trainer, "train", str(folder), labels)
        place.write(f"{config.name}/{path.name}", outcome["weights"])
        threads = config.quality.threads
        task = ray.remote(_judge).options(
            num_cpus=min(threads, trainer.cpus_per_worker),
            num_gpus=trainer.gpus_per_worker,
            **placed(config.cluster, "finetune"),
        )
        quality: Quality = results(task.remote(config, path))
    if quality.samples is not None:
        (folder / f"{config.name}.png").write_bytes(contact_sheet(quality.samples, 10))
    card = folder / f"{config.name}.md"
    card.write_text(weights_card(config, outcome, path, quality), "utf-8")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB after {outcome['seconds']:.0f} s")
    print("\n".join(quality.lines))
    if quality.broken:
        more = f" and {len(quality.broken) - 5} more" if len(quality.broken) > 5 else ""
        print(f"note: {len(quality.broken)} images cannot be decoded and were left out: {', '.join(quality.broken[:5])}{more}")
    return path


def _judge(config: PretrainConfig, path: Path) -> Quality:
    judge = judge_generator if config.target == "generator" else judge_encoder
    splits = splits_of(config.data)
    return replace(judge(config, path, splits, own_device()), broken=splits.broken)


FINGERPRINTS = "data_fingerprints"
"""Key of the stored config under which the hashes of both splits are."""
GROWS = {"generator": "steps", "encoder": "epochs"}
"""Target → its key that says how long to train. A training goes on when the number is raised."""


def check_pretraining(config: PretrainConfig, fingerprints: Mapping[str, str], storage: Storage) -> dict[str, Any]:
    """The config with the fingerprints of the data, as the run folder stores it. Raises :class:`UserError` if the folder holds
    a training with another config or other data. What only says where and how fast it trains may differ, and so may the number
    of steps or epochs."""
    name, mine = config.name, {**canonical(config), FINGERPRINTS: dict(fingerprints)}
    stored = stored_config(storage, name, "or choose another name, if the training in it is still wanted")
    if stored is not None:
        data = stored.pop(FINGERPRINTS, None)
        check_same(storage, name, *map(_what_matters, ({**completed(config, stored), FINGERPRINTS: data}, mine)))
    elif storage.is_folder(f"{name}/train"):
        raise UserError(
            f"run folder '{storage.address(name)}' holds a training whose config is not known (config.yaml is missing); choose "
            f"another name (name={name}-2) or delete the folder"
        )
    return mine


def _what_matters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options that may change between two commands that continue the same training. The data are compared
    by their fingerprints, so that they may move."""
    places = ("storage", "trainer", "cluster", "quality", "plugins")
    kept = {key: value for key, value in plain.items() if key not in places}
    left_out: dict[str, tuple[str, ...]] = {"data": ("path", "test_path", "unit_size")}
    left_out |= {target: (length, "checkpoint_every") for target, length in GROWS.items()}
    for section, details in left_out.items():
        kept[section] = {key: value for key, value in plain.get(section, {}).items() if key not in details}
    return kept


def weights_card(config: PretrainConfig, outcome: dict[str, Any], path: Path, quality: Quality) -> str:
    """The Markdown card of the weights: data, steps, seconds, hardware, quality, and the config that reproduces them."""
    trainer = config.trainer
    device = torch.cuda.get_device_name() if trainer.gpus_per_worker else platform.processor() or platform.machine()
    hardware = f"{trainer.num_workers} worker(s), each with {trainer.threads_per_worker} CPU threads ({device})"
    if trainer.gpus_per_worker:
        hardware = f"{trainer.num_workers} worker(s), each with {trainer.gpus_per_worker:g} GPU ({device})"
    batch = config.generator.batch_size if config.target == "generator" else config.encoder.batch_size
    recent = outcome["losses"][-250:]
    kept = {"name", "seed", "target", "data", config.target, "trainer"} | (
        {"quality"} if quality.samples is not None else set()
    )
    plain = {key: value for key, value in canonical(config).items() if key in kept}
    plain["data"] = {**plain["data"], "path": Path(config.data.path).name}
    return "\n".join(
        [
            f"# {config.name}", "",
            f"The {config.target} trained by `jobs/pretrain.py` on the training split alone.", "",
            f"- data: {Path(config.data.path).name}, split {config.data.train_split}, {outcome['images']} images"
            + (f"; {len(quality.broken)} images of both splits cannot be decoded and were left out" if quality.broken else ""),
            f"- steps: {outcome['steps']} of {batch} images, mean loss at the end {sum(recent) / len(recent):.4f}",
            f"- seconds: {outcome['seconds']:.0f}", f"- hardware: {hardware}",
            f"- file: {path.stat().st_size / 1e6:.1f} MB, safetensors, half precision", "",
            "## Quality", "", *(f"- {line}" for line in quality.lines), "",
            "The test split was used for these figures alone, after training.", "",
            "## Config", "", "```yaml", yaml.safe_dump(plain, sort_keys=False).strip(), "```", "",
        ]
    )  # fmt: skip
