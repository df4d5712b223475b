"""Pictures of what sets cover: coverage as a set grows, the images that are closest to real ones, and a map of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.engine.shards import read_class
from ims3_ray.engine.stage import Context
from ims3_ray.plan.layout import Config, Plan
from ims3_ray.report.figures import curve_chart, for_page
from ims3_ray.report.results import Results
from ims3_ray.stages.coverage import MeasureCoverage
from ims3_ray.stages.embed import Embed
from ims3_ray.stages.encode import Encode

SHOWN_CLASSES = 10
"""Number of classes from which pairs and the points of a map are taken: the first ones."""
REAL_POINTS, SET_POINTS = 200, 100
"""Largest number of real images of each class on a map, and of images of each class of a set."""


@dataclass(frozen=True)
class Pair:
    """An image of a set and the real image that is nearest to it."""

    image: Tensor
    real: Tensor
    ratio: float
    """Distance between the two divided by that to the second nearest real image: near 0 for a copy."""


@dataclass(frozen=True)
class Covered:
    """What the report shows of the sets that were measured."""

    chart: str
    """The coverage of the first n images of a class over n, for every set, as SVG; empty if there is nothing to draw."""
    pairs: Mapping[str, tuple[bytes, Sequence[float]]]
    """Title of a set → a sheet with the image of each class that is closest to being a copy above its nearest real image, and
    their ratios."""
    map: str
    """The map as SVG; empty if it is not wanted."""


def covered(context: Context, plan: Plan[Config], results: Results, shown: Mapping[str, str]) -> Covered | None:
    """The pictures of the sets ``shown`` (key in the plan → title); None if no coverage was measured."""
    stages = {
        title: stage for stage in plan.stages if isinstance(stage, MeasureCoverage) for title in stage.titles if title in shown
    }
    if not stages:
        return None
    lines = {
        shown[title]: [(float(count), 100 * share) for count, share in results["coverage"][title]["reached"].items()]
        for title in stages
    }
    lines = {title: points for title, points in lines.items() if points}
    pairs = {shown[title]: _sheet(_pairs(context, stage)) for title, stage in stages.items()}
    chart = curve_chart(lines, "Coverage as a set grows", "images a class") if lines else ""
    return Covered(
        chart, {title: sheet for title, sheet in pairs.items() if sheet[1]},
        _map(context, stages, shown) if any(stage.mapped for stage in stages.values()) else "",
    )  # fmt: skip


def _pairs(context: Context, stage: MeasureCoverage) -> list[Pair]:
    """For each of the first classes the image of the set that is closest to being a copy, and its nearest real image."""
    storage, found = context.storage, []
    images, real = stage.inputs["set"], cast(Encode, stage.inputs["real"].inputs["images"])
    for position, unit in list(enumerate(stage.units))[:SHOWN_CLASSES]:
        measured = load(stage.artifact(storage).read(f"{unit}.safetensors"))
        if "ratio" not in measured:
            continue
        which = int(measured["ratio"].argmin())
        (in_set,) = images.units_of_class(position)
        pixels = load(images.artifact(storage).read(f"{in_set}.safetensors"))["pixels"][which]
        nearest = _real_image(context, real, position, int(measured["index"][which]))
        found.append(Pair(pixels, nearest, float(measured["ratio"][which])))
    return found


def _real_image(context: Context, real: Encode, position: int, index: int) -> Tensor:
    """The pixels of the ``index``-th real image of a class."""
    entries = (real.manifest(context.storage) or {})["units"]
    for unit in real.units_of_class(position):
        if index < entries[unit]["images"]:
            return real.store(context.storage).read_some({unit: [index]})[0]
        index -= entries[unit]["images"]
    raise ValueError(f"class {position} has fewer real images than the features say")


def _sheet(pairs: Sequence[Pair]) -> tuple[bytes, list[float]]:
    pairs = sorted(pairs, key=lambda pair: pair.ratio)
    same = [pair for pair in pairs if pair.image.shape == pair.real.shape]
    if not same:
        return b"", []
    sheet = contact_sheet(torch.stack([*(pair.image for pair in same), *(pair.real for pair in same)]), len(same))
    return sheet, [pair.ratio for pair in same]


def _map(context: Context, stages: Mapping[str, MeasureCoverage], shown: Mapping[str, str]) -> str:
    """A t-SNE map of the features of real images and of all sets together, with a panel for each set."""
    from sklearn.manifold import TSNE

    from ims3_ray.report.plots import maps

    storage, first = context.storage, next(iter(stages.values()))
    real = cast(Embed, first.inputs["real"])
    classes = range(min(SHOWN_CLASSES, len(first.units)))
    points: list[tuple[str, int, Tensor]] = []
    for position in classes:
        features = read_class(real.artifact(storage), real.units_of_class(position), "features")
        points.append(("", position, normalize(features.float(), dim=1)[:REAL_POINTS]))
    for title, stage in stages.items():
        for position in classes:
            measured: dict[str, Any] = load(stage.artifact(storage).read(f"{stage.units[position]}.safetensors"))
            points.append((title, position, measured["features"].float()[:SET_POINTS]))
    together = torch.cat([features for _, _, features in points])
    placed = TSNE(init="pca", random_state=0, perplexity=min(30, (len(together) - 1) / 3)).fit_transform(together.numpy())
    parts = torch.from_numpy(placed).split([len(features) for _, _, features in points])
    by_set: dict[str, dict[int, list[list[float]]]] = {}
    for (title, position, _), part in zip(points, parts, strict=True):
        by_set.setdefault(title, {})[position] = part.tolist()
    background = [point for of_class in by_set.pop("").values() for point in of_class]
    drawn = maps(
        {shown[title]: of_class for title, of_class in by_set.items()}, background, context.classes.names[: len(classes)]
    )
    return for_page(drawn["svg"].decode(), "Map of the features of real images and of each set")
