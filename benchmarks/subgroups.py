"""What the choice of S3 is worth: the score of Eq. 10 against the accuracy of students, as JSON (docs/selection.md).

    python benchmarks/subgroups.py                             real images of the embedded Fashion-MNIST as candidates
    python benchmarks/subgroups.py candidates=generated pool=pool.safetensors        samples of the generator
    python benchmarks/subgroups.py figure=subgroups.svg        and a figure of score against accuracy

Candidates of a class are put into a random order and divided into subgroups of K images, which Eq. 10 scores.

`ranks`: of G = `ranked` subgroups, set r has the subgroup of rank r of each class, so that the sets go from the best to the
worst choice. `spearman` is the rank correlation between what a column scores and the accuracy over these sets; with n sets
and no relation, its standard deviation is 1/√(n−1). `score` is Eq. 10 (low is good), `proximity` and `repulsion` are its two
terms.

`groups`: accuracy of the best and of the worst choice among the first G subgroups, for every G of `groups`, over `draws`
orders.

Accuracies are those of `students` students on held-out training images, or on the test split with test=true. Needs torch,
scipy, numpy, pyarrow, pydantic, pyyaml, pillow and safetensors (matplotlib for a figure), and no Ray.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.cli import main
from ims3_ray.config import DataConfig, ProtocolConfig, SamplingConfig, Section
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.engine.shards import units_of
from ims3_ray.errors import UserError
from ims3_ray.models.encoder import Encoder, encoder_config, encoder_path, load_encoder
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.seeds import generator_for
from ims3_ray.selection.subgroups import scored
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.candidates import Candidates
from ims3_ray.training.accuracy import Labelled
from ims3_ray.training.students import train_student

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Features = Callable[[Tensor], Tensor]
CHOICES = (("best", 0), ("worst", -1))
"""Name of a choice and its rank; of a single subgroup there is only the first."""


class BenchmarkConfig(Section):
    data: DataConfig = DataConfig()
    candidates: Literal["real", "generated"] = "real"
    generator: str = "embedded:fashion-mnist-dit"
    sampling: SamplingConfig = SamplingConfig(sampler="dpm++2m", steps=10, cfg_scale=1.5)
    pool: str | None = None
    """File that keeps the samples, so that a second call need not draw them again."""
    encoder: str = "embedded:fashion-mnist-phi"
    features: Literal["encoder", "untrained", "pixels"] = "encoder"
    """What φ is: the encoder, a network of its shape with random weights, or the pixels themselves as a vector. An encoder for
    colour images gets grey ones in all of its channels."""
    alpha: float = 0.4
    beta: float = 0.9
    k: tuple[int, ...] = (1, 10)
    """Numbers of images per class."""
    ranked: int = Field(default=20, ge=2)
    """Number of subgroups of which the sets of all ranks are scored."""
    groups: tuple[int, ...] = (1, 2, 5, 20)
    """Numbers G of subgroups of which the best and the worst choice are scored."""
    draws: int = Field(default=3, ge=1)
    """Number of random orders of the candidates; the ranks are those of the first one."""
    students: int = Field(default=2, ge=1)
    protocol: ProtocolConfig = ProtocolConfig(width=32, epochs={1: 300, 10: 150, 50: 60}, validations=1)
    held_out: int = Field(default=100, ge=1)
    """Number of training images of each class that are no candidates and on which students are tested."""
    test: bool = False
    """Whether students are tested on the test split instead."""
    processes: int = Field(default=2, ge=1)
    """Number of students that are trained at the same time."""
    figure: str | None = None
    """File for a figure of score against accuracy, in the format that its name ends in."""


def benchmark(config: BenchmarkConfig) -> None:
    (pixels, labels, names), _ = decoded_split(config.data, "train")
    real, tested = zip(*(_apart(pixels[labels == c], config.held_out, c) for c in range(len(names))), strict=True)
    test = decoded_split(config.data, "test")[0][:2] if config.test else _labelled(tested)
    phi = features_of(config)
    references = torch.stack([_features(phi, images).mean(dim=0) for images in real])
    most = max(k * max(config.ranked, *config.groups) for k in config.k)
    candidates = list(real) if config.candidates == "real" else sampled(config, names, most)
    if (fewest := min(map(len, candidates))) < most:
        raise UserError(f"a class has {fewest} candidates, and {most} are wanted; lower k, ranked or groups")
    features = [_features(phi, images) for images in candidates]
    sets: dict[Any, Labelled] = {}
    terms: dict[Any, tuple[float, float]] = {}
    for k in config.k:
        for draw in range(config.draws):
            orders = [
                torch.randperm(len(images), generator=generator_for(draw, "order", c)) for c, images in enumerate(features)
            ]

            def choose(key: Any, groups: int, position: int, k: int = k, orders: list[Tensor] = orders) -> None:
                """The set of the subgroups of a rank; −1 is the worst."""
                members = [order[: groups * k].reshape(groups, k) for order in orders]
                centroids = torch.stack([each[m].mean(dim=1) for each, m in zip(features, members, strict=True)])
                proximity, repulsion, _ = scored(centroids, references)
                ranks = (config.alpha * proximity - config.beta * repulsion).argsort(dim=1)[:, position]
                picked = [images[m[g]] for images, m, g in zip(candidates, members, ranks.tolist(), strict=True)]
                sets[key] = _labelled(picked)
                terms[key] = tuple(table.gather(1, ranks[:, None]).mean().item() for table in (proximity, repulsion))

            for groups in config.groups:
                for which, position in CHOICES[:groups]:
                    choose((k, which, groups, draw), groups, position)
            if draw == 0:
                for rank in range(config.ranked):
                    choose((k, "rank", rank), config.ranked, rank)
    with multiprocessing.get_context("spawn").Pool(config.processes) as pool:
        work = partial(accuracies, test=test, classes=len(names), config=config)
        found = dict(zip(sets, pool.map(work, list(sets.values()), chunksize=1), strict=True))
    rows = [of_size(config, k, found, terms) for k in config.k]
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = config.model_dump(mode="json", exclude={"data", "protocol", "figure"})
    print(json.dumps({"machine": machine, "data": config.data.path, **settings, "sizes": rows}, indent=1))
    if config.figure:
        draw_figure(config, rows, config.figure)


def _apart(images: Tensor, count: int, position: int) -> tuple[Tensor, Tensor]:
    """The images of a class without ``count`` random ones, and these."""
    order = torch.randperm(len(images), generator=generator_for(0, "held-out", position))
    return images[order[count:]], images[order[:count]]


def _labelled(of_class: Any) -> Labelled:
    counts = torch.tensor([len(images) for images in of_class])
    return torch.cat(list(of_class)), torch.arange(len(counts)).repeat_interleave(counts)


def features_of(config: BenchmarkConfig) -> Features:
    """φ: images in [−1, 1], [B, C, H, W] → features [B, D]."""
    if config.features == "pixels":
        return partial(torch.flatten, start_dim=1)
    path = encoder_path(config.encoder)
    if config.features == "untrained":
        torch.manual_seed(0)
        phi = Encoder(encoder_config(path)).eval().requires_grad_(False)
    else:
        phi = load_encoder(path)
    return lambda images: phi.to(DEVICE)(images.expand(-1, phi.config.channels, -1, -1))


@torch.inference_mode()
def _features(phi: Features, images: Tensor) -> Tensor:
    return torch.cat([normalize(phi(to_signed(part.to(DEVICE))).double(), dim=1).cpu() for part in images.split(500)])


def sampled(config: BenchmarkConfig, names: tuple[str, ...], count: int) -> list[Tensor]:
    """``count`` samples of each class, from the file of the pool if it holds as many."""
    kept = Path(config.pool) if config.pool else None
    if kept is not None and kept.is_file() and (pixels := load_file(kept)["pixels"]).shape[1] >= count:
        return list(pixels[:, :count])
    path = generator_path(config.generator)
    produce = Candidates(config.sampling, Pretrained.of_file(path), None, None, 0, DEVICE)
    found = []
    for label in open_generator(path).labels(names):
        units = units_of(label, count, config.sampling.unit_size)
        found.append(torch.cat([produce(unit).pixels.cpu() for unit in units])[:count])
        print(f"samples of class {label}", file=sys.stderr, flush=True)
    if kept is not None:
        save_file({"pixels": torch.stack(found)}, kept)
    return found


def accuracies(images: Labelled, test: Labelled, classes: int, config: BenchmarkConfig) -> list[float]:
    """Accuracy of each student, in per cent."""
    if config.processes > 1:
        torch.set_num_threads(1)
    return [
        train_student("convnet-3", images, test, classes, config.protocol, seed, device=DEVICE)[1].last
        for seed in range(config.students)
    ]


def of_size(config: BenchmarkConfig, k: int, found: dict[Any, list[float]], terms: dict[Any, tuple[float, float]]) -> Any:
    """What was found for sets of ``k`` images per class."""
    ranks = [(k, "rank", rank) for rank in range(config.ranked)]
    means = [statistics.fmean(found[key]) for key in ranks]
    columns = {
        "score": [config.alpha * terms[key][0] - config.beta * terms[key][1] for key in ranks],
        "proximity": [terms[key][0] for key in ranks], "repulsion": [terms[key][1] for key in ranks],
    }  # fmt: skip
    by_groups = []
    for groups in config.groups:
        row: dict[str, Any] = {"groups": groups}
        for which, _ in CHOICES[:groups]:
            draws = [statistics.fmean(found[k, which, groups, draw]) for draw in range(config.draws)]
            row[which] = round(statistics.fmean(draws), 2)
            row[f"{which}_sem"] = round(statistics.stdev(draws) / len(draws) ** 0.5, 2) if len(draws) > 1 else None
        by_groups.append(row)
    return {
        "k": k, "epochs": for_ipc(config.protocol.epochs, k), "accuracy_by_rank": [round(mean, 2) for mean in means],
        "score_by_rank": [round(value, 4) for value in columns["score"]],
        "spearman": {name: round(float(spearmanr(values, means).statistic), 2) for name, values in columns.items()},
        "groups": by_groups,
    }  # fmt: skip


def draw_figure(config: BenchmarkConfig, rows: list[Any], path: str) -> None:
    """Score against accuracy of the sets of all ranks, a panel for each number of images per class."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ims3"  # the same bytes each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.2 * len(rows), 3.4), squeeze=False, layout="constrained")
    for axis, row in zip(axes[0], rows, strict=True):
        axis.scatter(row["score_by_rank"], row["accuracy_by_rank"], color="black", s=18)
        axis.set_title(
            f"{row['k']} image{'s' if row['k'] > 1 else ''} a class, rank correlation {row['spearman']['score']:+.2f}"
        )
        axis.set_xlabel("score of Eq. 10, mean over classes (low is chosen)")
        axis.set_ylabel("accuracy of students in %")
    figure.suptitle(f"{config.candidates} candidates: the sets of ranks 1 to {config.ranked}")
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
