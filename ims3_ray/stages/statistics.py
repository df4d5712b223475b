"""Mean and standard deviation of the real training pixels, by which some methods and protocols normalise images.

Only the first unit (``data.unit_size`` images) of up to 50 classes is read, which is enough for two numbers per colour.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.config import ProtocolConfig
from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.per_class import map_classes
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import commit_units, pack_tensors
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.encode import Encode

MOST_CLASSES = 50
"""Number of classes whose first unit of real images is read; of more classes, these are evenly spaced."""


@dataclass(eq=False)
class Statistics(Stage):
    """Computes ``mean`` and ``std`` of each channel, float32 [C, 1, 1], over the first unit of up to 50 classes."""

    name = "statistics"

    @classmethod
    def plan(cls, planner: Planner) -> Statistics:
        names = list(planner.classes.names)
        real = Encode.plan(planner, "train", planner.work.data)
        return planner.add(cls("statistics of the real pixels", {"classes": names}, {"real": real}))

    def run(self, context: Context) -> None:
        began, storage, real = time.monotonic(), context.storage, cast(Encode, self.inputs["real"])
        count = len(context.classes.names)
        chosen = [count * number // min(count, MOST_CLASSES) for number in range(min(count, MOST_CLASSES))]
        units = [real.units_of_class(position)[0] for position in chosen]
        found = map_classes(context, self.title, moments_of, real.store(storage), units)
        moments = torch.stack(found).sum(dim=0)
        values, total, squares = moments
        mean = total / values
        std = (squares / values - mean.square()).clamp(min=1e-8).sqrt()
        artifact = self.artifact(storage)
        packed = pack_tensors(**{name: value.float().reshape(-1, 1, 1) for name, value in (("mean", mean), ("std", std))})
        digest = artifact.write("result.safetensors", packed)
        commit_units(artifact, {"result": {"sha256": digest, "images": 0}}, time.monotonic() - began)


def plan_statistics(planner: Planner, protocol: ProtocolConfig) -> dict[str, Stage]:
    """The stage as the input ``statistics`` of a stage that trains students; empty if their protocol normalises otherwise."""
    return {"statistics": Statistics.plan(planner)} if protocol.normalise == "real" else {}


def moments_of(real: ImageStore, units: list[str]) -> list[Tensor]:
    """For each unit, float64 [3, C]: number, sum, and sum of squares of its pixels in [0, 1]."""
    found = []
    for unit in units:
        pixels = real.read(unit).double() / 255
        each = pixels.transpose(0, 1).flatten(1)
        found.append(torch.stack([torch.full((len(each),), each.shape[1]).double(), each.sum(dim=1), each.square().sum(dim=1)]))
    return found


def read_statistics(artifact: Artifact | None) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, float32 [C, 1, 1] each; None where nothing needs them."""
    if artifact is None:
        return None
    tensors = load(artifact.read("result.safetensors"))
    return tensors["mean"], tensors["std"]
