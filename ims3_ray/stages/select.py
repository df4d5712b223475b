"""Selection: the S3 actor gathers subgroup centroids and minimises Eq. 10; baselines take K images directly."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.artifacts import Artifact
from ims3_ray.seeds import generator_for
from ims3_ray.selection import SELECTORS, ClassImages, SubgroupSelection, select_subgroups
from ims3_ray.stages.base import Context, Stage, commit_units, pack_tensors, parse_unit, read_class, units_of

Sums = dict[int, NDArray[np.float64]]
"""Subgroup (or 0 for a class's real images) → sum of φ over a unit's images of it [D]."""


class S3Selector:
    """The central actor of Selective Subgroup Sampling.

    A contribution is a put keyed by unit, never an addition, so sending one twice changes nothing. A restarted actor is
    empty and says so through ``missing``; whoever asks feeds it again from the committed shards.
    """

    def __init__(self, class_order: dict[str, tuple[int, ...]], units: dict[str, list[str]], groups: int) -> None:
        self.class_order, self.units, self.groups = class_order, units, groups
        self.sums: dict[str, dict[str, Sums]] = {pool: {} for pool in units}

    def put(self, pool: str, unit: str, sums: Sums) -> None:
        self.sums[pool][unit] = sums

    def missing(self) -> list[tuple[str, str]]:
        return [(pool, unit) for pool, units in self.units.items() for unit in units if unit not in self.sums[pool]]

    def centroids(self, pool: str, groups: int) -> Tensor:
        """Eq. 8 and 9: ℓ2-normalised means, float64 [C, groups, D]. The sum of a subgroup has the mean's direction."""
        position = {label: i for i, label in enumerate(self.class_order[pool])}
        dim = len(next(iter(next(iter(self.sums[pool].values())).values())))
        total = np.zeros((len(position), groups, dim))
        for unit in sorted(self.sums[pool]):
            for group, value in self.sums[pool][unit].items():
                total[position[parse_unit(unit)[0]], group] += value
        return normalize(torch.from_numpy(total), dim=-1)

    def select(self, alpha: float, beta: float, coupling: str) -> SubgroupSelection | None:
        """Eq. 10 over the pool; None while contributions are missing, as they are after a restart."""
        if self.missing():
            return None
        candidates, references = self.centroids("candidates", self.groups), self.centroids("references", 1)[:, 0]
        return select_subgroups(candidates, references, alpha=alpha, beta=beta, coupling=coupling)  # type: ignore[arg-type]


def partial_sums(features_ND: Tensor, first: int, per_group: int, limit: int) -> Sums:
    """Sums of ℓ2-normalised features over the subgroups that images ``first`` … fall into; images from ``limit`` on are not
    part of any."""
    sums: Sums = {}
    for offset, feature in enumerate(normalize(features_ND.double(), dim=-1).numpy()):
        index = first + offset
        if index < limit:
            group = index // per_group
            sums[group] = sums.get(group, np.zeros_like(feature)) + feature
    return sums


@ray.remote(num_cpus=1, max_retries=3)
def contribute(selector: Any, pool: str, unit: str, artifact: Artifact, unit_size: int, per_group: int, limit: int) -> None:
    """Read one embedding shard, near which this task may run, and put its part of the centroids."""
    features = load(artifact.read(f"{unit}.safetensors"))["features"]
    first = parse_unit(unit)[1] * unit_size
    ray.get(selector.put.remote(pool, unit, partial_sums(features, first, per_group, limit)))


def choose_s3(context: Context, stage: Stage) -> tuple[SubgroupSelection, dict[str, Any]]:
    """Run the S3 actor over the committed embeddings."""
    s, storage, classes = context.config.selection, context.storage, context.classes
    pools = {"candidates": stage.inputs["embed"], "references": stage.inputs["references"]}
    limits = {"candidates": s.groups * s.images_per_class, "references": s.references_per_class or max(classes.counts)}
    sizes = {"candidates": context.config.sampling.unit_size, "references": context.config.data.unit_size}
    per_group = {"candidates": s.images_per_class, "references": limits["references"]}
    order = {"candidates": classes.generator_labels, "references": classes.source_labels}
    units = {
        pool: [unit for label in order[pool] for unit in units_of(label, limits[pool], sizes[pool]) if unit in node.units]
        for pool, node in pools.items()
    }
    key = stage.key(storage)
    selector = (
        ray.remote(S3Selector)
        .options(name=f"s3-{key}", namespace="ims3", get_if_exists=True, num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(order, units, s.groups)
    )
    while (selection := ray.get(selector.select.remote(s.alpha, s.beta, s.coupling))) is None:
        tasks = [
            contribute.remote(selector, pool, unit, pools[pool].artifact(storage), sizes[pool], per_group[pool], limits[pool])
            for pool, unit in ray.get(selector.missing.remote())
        ]
        ray.get(tasks)
    ray.kill(selector)
    table = {
        "groups": selection.groups.tolist(), "objective": selection.objective, "lower_bound": selection.lower_bound,
        "proximity": selection.proximity_CG.tolist(), "repulsion": selection.repulsion_CG.tolist(),
        "score": selection.score_CG.tolist(),
    }  # fmt: skip
    return selection, table


def run(context: Context, stage: Stage) -> None:
    """Choose K images per class and commit them: ``images.safetensors`` with pixels [C·K, …], labels and indices."""
    began = time.monotonic()
    k, classes = context.config.selection.images_per_class, context.classes
    pool = stage.inputs["images"]
    artifact = pool.artifact(context.storage)
    real = pool.kind == "encode"
    table: dict[str, Any] = {}
    starts = [0] * len(classes.names)
    if stage.params["select"] == "s3":
        selection, table = choose_s3(context, stage)
        starts = [int(g) * k for g in selection.groups]
    pixels, indices = [], []
    for position, start in enumerate(starts):
        label = (classes.source_labels if real else classes.generator_labels)[position]
        units = [unit for unit in pool.units if parse_unit(unit)[0] == label]
        images = read_class(artifact, units, "pixels")
        chosen = torch.arange(start, start + k)
        if stage.params["select"] == "random":
            rng = generator_for(context.config.seed, "random-subset", label)
            chosen = SELECTORS["random"].choose(ClassImages(len(images), rng), k, "image")
        pixels.append(images[chosen])
        indices.append(chosen)
    labels = torch.arange(len(starts)).repeat_interleave(k)
    packed = pack_tensors(pixels=torch.cat(pixels), labels=labels, indices=torch.cat(indices))
    digest = stage.artifact(context.storage).write("images.safetensors", packed)
    extra: Mapping[str, Any] = {"content": content_hash(torch.cat(pixels), labels), "s3": table}
    entry = {"sha256": digest, "images": len(labels)}
    commit_units(stage.artifact(context.storage), {"result": entry}, time.monotonic() - began, **extra)


def content_hash(pixels: Tensor, labels: Tensor) -> str:
    """The identity of a set of labelled images, whatever way it was come by."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().tobytes() + labels.numpy().tobytes())
    return digest.hexdigest()[:16]
