"""The S3 actor: gathers centroids of subgroups while candidates are made, and minimises Eq. 10."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.cluster import here
from ims3_ray.config import SelectionConfig
from ims3_ray.seeds import generator_for
from ims3_ray.selection import SubgroupSelection, select_subgroups
from ims3_ray.selection.grid import Weighed, Weighing, select_grid, terms_of
from ims3_ray.stages.base import parse_unit, read_many

NAMESPACE = "ims3"

Sums = dict[int, NDArray[np.float64]]
"""Subgroup (0 for references) → sum of φ over a unit's images of it [D]."""


@dataclass(frozen=True)
class Part:
    """One of the two pools of embeddings that a selection adds up, and which of its images belong to which subgroup.

    ``size`` images make a subgroup: gK … (g+1)K−1 for candidates; for references a subset of K_i drawn by ``seed`` (all when
    there are no more).
    """

    embeddings: Artifact
    labels: tuple[int, ...]
    """Of the classes, in their order."""
    first: Mapping[str, int]
    """Units that hold an image of a subgroup → index within its class of their first image."""
    counts: Mapping[int, int]
    """Label → images of the class."""
    size: int
    groups: int
    seed: int | None = None

    def group_of(self, label: int) -> NDArray[np.int64]:
        """Subgroup of each image of a class, −1 for none."""
        count = self.counts[label]
        if self.seed is None:
            groups = np.arange(count) // self.size
            return np.where(groups < self.groups, groups, -1)
        groups = np.full(count, -1)
        drawn = torch.randperm(count, generator=generator_for(self.seed, "references", label))[: self.size]
        groups[drawn.numpy()] = 0
        return groups

    def sums(self, unit: str, features_ND: Tensor) -> Sums:
        """What a unit adds to the subgroups that its images fall into: sums of ℓ2-normalised features (Eq. 8, 9)."""
        first = self.first[unit]
        groups = self.group_of(parse_unit(unit)[0])[first : first + len(features_ND)]
        unit_ND = normalize(features_ND[: len(groups)].double(), dim=-1).numpy()
        return {int(group): unit_ND[groups == group].sum(axis=0) for group in np.unique(groups) if group >= 0}


@dataclass(frozen=True)
class Listener:
    """A selection that wants to hear of each embedded unit as it is made."""

    selector: Any
    """Its S3 actor, which lives as long as somebody holds this."""
    part: str
    definition: Part

    def tell(self, unit: str, shard: bytes) -> None:
        """Put the unit's sums. Nothing is lost if the actor is away: it reads committed shards when it comes back."""
        if unit in self.definition.first:
            sums = self.definition.sums(unit, load(shard)["features"])
            self.selector.put.remote(self.part, self.definition.embeddings.key, unit, sums)


class S3Selector:
    """The central actor of Selective Subgroup Sampling.

    A contribution is a put keyed by unit, never an addition, so sending one twice changes nothing. What it holds it can
    always read again from the committed shards: that is how it starts, also after it was killed.
    """

    def __init__(self, parts: dict[str, Part], config: SelectionConfig) -> None:
        self.parts, self.config = parts, config
        self.sums: dict[str, dict[str, Sums]] = {name: {} for name in parts}
        self.refresh()

    def put(self, part: str, key: str, unit: str, sums: Sums) -> None:
        """Take a unit's sums; ``ValueError`` for those of other embeddings than this selection's."""
        definition = self.parts[part]
        if key != definition.embeddings.key or unit not in definition.first:
            raise ValueError(
                f"unit {unit} of embeddings {key} is no part of this selection, whose {part} are embeddings "
                f"{definition.embeddings.key}"
            )
        self.sums[part][unit] = sums

    def refresh(self) -> None:
        """Read what is committed and not known yet."""
        for name, part in self.parts.items():
            there = {shard.split(".")[0] for shard in part.embeddings.shards()}
            wanted = [unit for unit in part.first if unit in there and unit not in self.sums[name]]
            for unit, shard in read_many(part.embeddings, wanted, "safetensors"):
                self.sums[name][unit] = part.sums(unit, load(shard)["features"])

    def missing(self) -> list[tuple[str, str]]:
        return [(name, unit) for name, part in self.parts.items() for unit in part.first if unit not in self.sums[name]]

    def progress(self) -> dict[str, tuple[int, int]]:
        """Part → (units that are known, units in all)."""
        return {name: (len(self.sums[name]), len(part.first)) for name, part in self.parts.items()}

    def scores(self) -> dict[str, Any]:
        """Eq. 10 among the classes of which everything is known: their positions, best subgroups so far, and the terms."""
        missing = {(name, parse_unit(unit)[0]) for name, unit in self.missing()}
        known = [
            position
            for position in range(len(next(iter(self.parts.values())).labels))
            if not any((name, part.labels[position]) in missing for name, part in self.parts.items())
        ]
        return {"classes": known, **table_of(self._select(known))} if known else {"classes": []}

    def select(self, weighing: Weighing | None = None) -> SubgroupSelection | None:
        """Eq. 10 over all classes, with other parameters than its own if they are given; None while something is missing,
        which may be there after :meth:`refresh`."""
        return None if self.missing() else self._select(list(range(len(self.parts["candidates"].labels))), weighing)

    def grid(self, weighings: Sequence[Weighing]) -> list[Weighed]:
        """All of these selections."""
        return select_grid(*self._geometry(), weighings)

    def terms(self, choices: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Mean proximity and repulsion of chosen groups, by this selection's φ and references."""
        return terms_of(*self._geometry(), choices)

    def centroids(self, name: str) -> Tensor:
        """Eq. 8 and 9: ℓ2-normalised means, float64 [C, groups, D]; zero where nothing is known. A sum has its mean's
        direction."""
        part = self.parts[name]
        position = {label: i for i, label in enumerate(part.labels)}
        dim = next((len(value) for sums in self.sums[name].values() for value in sums.values()), 0)
        total = np.zeros((len(position), part.groups, dim))
        for unit in sorted(self.sums[name]):
            for group, value in self.sums[name][unit].items():
                total[position[parse_unit(unit)[0]], group] += value
        return normalize(torch.from_numpy(total), dim=-1)

    def _geometry(self) -> tuple[Tensor, Tensor]:
        """Centroids of candidates [C, G, D] and references [C, D]."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # seconds at the end, while the rest waits
        return self.centroids("candidates"), self.centroids("references")[:, 0]

    def _select(self, classes: list[int], weighing: Weighing | None = None) -> SubgroupSelection:
        (candidates, references), c = self._geometry(), self.config
        w = weighing or Weighing(c.alpha, c.beta, c.groups, c.coupling)
        if len(classes) < len(candidates):
            candidates, references = candidates[classes], references[classes]
        return select_subgroups(candidates[:, : w.groups], references, alpha=w.alpha, beta=w.beta, coupling=w.coupling)


def table_of(selection: SubgroupSelection) -> dict[str, Any]:
    """A selection as JSON."""
    return {
        "groups": selection.groups.tolist(), "objective": selection.objective, "lower_bound": selection.lower_bound,
        "proximity": selection.proximity_CG.tolist(), "repulsion": selection.repulsion_CG.tolist(),
        "score": selection.score_CG.tolist(),
    }  # fmt: skip


def actor_name(key: str, storage: Storage) -> str:
    """Under which the S3 actor of a selection is found, in the namespace :data:`NAMESPACE`."""
    return f"s3-{key}-{zlib.crc32(storage.uri.encode()):08x}"


def start_selector(key: str, parts: dict[str, Part], config: SelectionConfig) -> Any:
    """The S3 actor of a selection, which may run already."""
    name = actor_name(key, parts["candidates"].embeddings.storage)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here()}
    actor = ray.remote(S3Selector).options(name=name, namespace=NAMESPACE, get_if_exists=True, **options)
    return actor.remote(parts, config)
