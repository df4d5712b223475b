"""The S3 actor: it collects the centroids of subgroups while candidates are made, and lets the selector choose among them."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.cluster.joining import here
from ims3_ray.engine.pool import ClassUnits
from ims3_ray.engine.shards import parse_unit, read_intact
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.seeds import generator_for
from ims3_ray.selection import SubgroupSelection, SubgroupSelector
from ims3_ray.selection.grid import Weighed, Weighing, select_grid, terms_of
from ims3_ray.selection.s3 import S3, S3Config

NAMESPACE = "ims3"

Sums = dict[int, NDArray[np.float64]]
"""Subgroup (0 for references) → sum of φ over the unit's images in that subgroup [D]."""


@dataclass(frozen=True)
class Part:
    """One of the two pools of embeddings that a selection adds up, and which of its images belong to which subgroup.

    The images of each class are put into an order, and subgroup g has the ``size`` images from g·size on. Candidates stand in
    the order in which they were generated; references and real candidates in a random order, drawn with ``seed`` for ``role``.
    """

    embeddings: Artifact
    labels: tuple[int, ...]
    """Labels of the classes, in their order."""
    first: Mapping[str, int]
    """Unit that holds images of a subgroup → index within the class of the unit's first image."""
    counts: Mapping[int, int]
    """Label → number of images of the class."""
    size: int
    groups: int
    seed: int | None = None
    role: str = "references"

    def group_of(self, label: int) -> NDArray[np.int64]:
        """Subgroup of each image of a class; −1 for an image that belongs to none."""
        ranks = np.arange(self.counts[label])
        if self.seed is not None:
            order = torch.randperm(len(ranks), generator=generator_for(self.seed, self.role, label)).numpy()
            ranks[order] = np.arange(len(ranks))
        return np.where(ranks < self.size * self.groups, ranks // self.size, -1)

    def members(self, label: int, group: int) -> Tensor:
        """Indices within the class of a subgroup's images, in ascending order."""
        return torch.from_numpy(np.flatnonzero(self.group_of(label) == group))

    @classmethod
    def of(
        cls, embeddings: Artifact, classes: Sequence[ClassUnits], size: int, groups: int = 1, seed: int | None = None,
        role: str = "references",
    ) -> Part:  # fmt: skip
        """The subgroups of the images of ``classes``, and the units that hold some of their images."""
        part = cls(
            embeddings, tuple(c.label for c in classes), {}, {c.label: c.count for c in classes}, size, groups, seed, role
        )
        first: dict[str, int] = {}
        for c in classes:
            grouped, ends = part.group_of(c.label) >= 0, [*list(c.first.values())[1:], c.count]
            held = [grouped[start:end].any() for start, end in zip(c.first.values(), ends, strict=True)]
            first |= dict(itertools.compress(c.first.items(), held))
        return replace(part, first=first)

    def sums(self, unit: str, features_ND: Tensor) -> Sums:
        """The sums that a unit contributes to the subgroups of its images, of ℓ2-normalised features (Eq. 8, 9)."""
        first = self.first[unit]
        groups = self.group_of(parse_unit(unit)[0])[first : first + len(features_ND)]
        unit_ND = normalize(features_ND[: len(groups)].double(), dim=-1).numpy()
        return {int(group): unit_ND[groups == group].sum(axis=0) for group in np.unique(groups) if group >= 0}


@dataclass(frozen=True)
class Listener:
    """Sends the sums of each embedded unit to the S3 actor of a selection as soon as the unit is made."""

    selector: Any
    """Handle of the S3 actor, which lives as long as one of its handles exists."""
    part: str
    definition: Part

    def tell(self, unit: str, shard: bytes) -> None:
        """Send the unit's sums. Nothing is lost if the actor is down: it reads the committed shards when it restarts."""
        if unit in self.definition.first:
            sums = self.definition.sums(unit, load(shard)["features"])
            self.selector.put.remote(self.part, self.definition.embeddings.key, unit, sums)


class S3Selector:
    """The central actor of selectors that look at the subgroups of all classes, such as Selective Subgroup Sampling.

    Sums are stored by unit and never added to earlier ones, so sending them twice changes nothing. The actor can read all
    that it holds from the committed shards, and does so whenever it starts, also after it was killed.
    """

    def __init__(self, parts: dict[str, Part], selector: SubgroupSelector) -> None:
        self.parts, self.selector = parts, selector
        self.sums: dict[str, dict[str, Sums]] = {name: {} for name in parts}
        self.refresh()

    def put(self, part: str, key: str, unit: str, sums: Sums) -> None:
        """Store a unit's sums. Raises ``ValueError`` for sums of embeddings that are not part of this selection."""
        definition = self.parts[part]
        if key != definition.embeddings.key or unit not in definition.first:
            raise ValueError(
                f"unit {unit} of embeddings {key} is no part of this selection, whose {part} are embeddings "
                f"{definition.embeddings.key}"
            )
        self.sums[part][unit] = sums

    def refresh(self) -> None:
        """Read the committed units whose sums are not known yet. Damaged ones stay missing."""
        for name, part in self.parts.items():
            there = {shard.split(".")[0] for shard in part.embeddings.shards()}
            wanted = [unit for unit in part.first if unit in there and unit not in self.sums[name]]
            for unit, shard in read_intact(part.embeddings, wanted, "safetensors"):
                if isinstance(shard, bytes):
                    self.sums[name][unit] = part.sums(unit, load(shard)["features"])

    def missing(self) -> list[tuple[str, str]]:
        return [(name, unit) for name, part in self.parts.items() for unit in part.first if unit not in self.sums[name]]

    def progress(self) -> dict[str, tuple[int, int]]:
        """Part → (units that are known, units in all)."""
        return {name: (len(self.sums[name]), len(part.first)) for name, part in self.parts.items()}

    def scores(self) -> dict[str, Any]:
        """The selection among the classes whose units are all known: their positions, best subgroups so far, and the terms."""
        missing = {(name, parse_unit(unit)[0]) for name, unit in self.missing()}
        known = [
            position
            for position in range(len(next(iter(self.parts.values())).labels))
            if not any((name, part.labels[position]) in missing for name, part in self.parts.items())
        ]
        return {"classes": known, **table_of(self._select(known))} if known else {"classes": []}

    def select(self, weighing: Weighing | None = None) -> SubgroupSelection | None:
        """The selection over all classes, by Eq. 10 with the parameters of ``weighing`` if they are given; None while units are
        missing, which :meth:`refresh` may find."""
        return None if self.missing() else self._select(list(range(len(self.parts["candidates"].labels))), weighing)

    def grid(self, weighings: Sequence[Weighing]) -> list[Weighed]:
        """The selection by each of ``weighings``."""
        return select_grid(*self._geometry(), weighings)

    def terms(self, choices: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Mean proximity and repulsion of each choice of subgroups, by this selection's φ and references."""
        return terms_of(*self._geometry(), choices)

    def centroids(self, name: str) -> Tensor:
        """The centroids of Eq. 8 and 9: ℓ2-normalised means, float64 [C, groups, D]; zero where no unit is known. They are
        computed from sums, which have the same direction as the means."""
        part = self.parts[name]
        position = {label: i for i, label in enumerate(part.labels)}
        dim = next((len(value) for sums in self.sums[name].values() for value in sums.values()), 0)
        total = np.zeros((len(position), part.groups, dim))
        for unit in sorted(self.sums[name], key=parse_unit):
            for group, value in self.sums[name][unit].items():
                total[position[parse_unit(unit)[0]], group] += value
        return normalize(torch.from_numpy(total), dim=-1)

    def _geometry(self) -> tuple[Tensor, Tensor]:
        """Centroids of candidates [C, G, D] and references [C, D]."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # uses all cores for some seconds, since everything else waits
        return self.centroids("candidates"), self.centroids("references")[:, 0]

    def _select(self, classes: list[int], weighing: Weighing | None = None) -> SubgroupSelection:
        (candidates, references), selector = self._geometry(), self.selector
        if weighing is not None:
            selector = S3(S3Config(alpha=weighing.alpha, beta=weighing.beta, coupling=weighing.coupling))
            candidates = candidates[:, : weighing.groups]
        if len(classes) < len(candidates):
            candidates, references = candidates[classes], references[classes]
        return selector.select(candidates, references)


def table_of(selection: SubgroupSelection) -> dict[str, Any]:
    """A selection as values for JSON."""
    return {
        "groups": selection.groups.tolist(), "objective": selection.objective, "lower_bound": selection.lower_bound,
        "proximity": selection.proximity_CG.tolist(), "repulsion": selection.repulsion_CG.tolist(),
        "score": selection.score_CG.tolist(),
    }  # fmt: skip


def actor_name(key: str, storage: Storage) -> str:
    """Name of the S3 actor of a selection in the namespace :data:`NAMESPACE`. Each job has its own, which it ends itself."""
    return f"s3-{key}-{zlib.crc32(storage.uri.encode()):08x}-{ray.get_runtime_context().get_job_id()}"


def start_selector(key: str, parts: dict[str, Part], selector: SubgroupSelector) -> Any:
    """Start the S3 actor of a selection, or return the one that is running already."""
    name = actor_name(key, parts["candidates"].embeddings.storage)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here()}
    actor = ray.remote(S3Selector).options(name=name, namespace=NAMESPACE, get_if_exists=True, **options)
    return actor.remote(parts, selector)
