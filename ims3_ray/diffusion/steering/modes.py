"""Modes of a class's latents: the centres of clusters, to which sampling is guided or from which it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ims3_ray.diffusion.steering.base import REMEMBERED, Shards, Steering

NEIGHBOURS = 10
"""Number of neighbours by which an outlier is told (DDVLCP)."""


@dataclass(frozen=True)
class Clustering:
    """How the modes of a class are found."""

    minibatch: int = 0
    """Mini-batches of so many times K latents, as D4M takes them; 0 for k-means of all latents at once."""
    outliers: float = 0.0
    """Share of the latents that are left out beforehand, as DDVLCP does it: those with the largest local outlier factor."""

    def needed(self, k: int) -> int:
        """Number of latents that are enough for ``k`` clusters."""
        return math.ceil(k / (1 - self.outliers)) + (1 if self.outliers else 0)


@dataclass(frozen=True)
class Modes:
    """The clusters of a class, the largest first."""

    centres: Tensor
    """float32 [K, C, H, W]."""
    counts: Tensor
    """Number of latents in each cluster, int64 [K]."""
    clusters: Tensor
    """The cluster of each latent, int64 [N]; −1 for an outlier."""


def find_modes(latents_NCHW: Tensor, k: int, seed: int, how: Clustering | None = None) -> Modes:
    """``k`` clusters of a class's latents by k-means. Raises ``ValueError`` for fewer latents than clusters."""
    from sklearn.cluster import KMeans
    from sklearn.neighbors import LocalOutlierFactor

    how, flat = how or Clustering(), latents_NCHW.flatten(1).numpy()
    inside = torch.ones(len(flat), dtype=torch.bool)
    if how.outliers:
        neighbours = min(NEIGHBOURS, len(flat) - 1)
        inside = torch.from_numpy(LocalOutlierFactor(n_neighbors=neighbours, contamination=how.outliers).fit_predict(flat) == 1)
    kept, state = flat[inside.numpy()], seed % 2**32
    if len(kept) < k:
        raise ValueError(f"{k} modes are to be found of {len(kept)} images")
    if how.minibatch:
        centres, labels = _by_minibatches(kept, k, state, how.minibatch)
    else:
        found = KMeans(n_clusters=k, n_init=10, random_state=state).fit(kept)
        centres, labels = found.cluster_centers_, found.labels_
    of_kept = torch.from_numpy(labels).long()
    sizes = of_kept.bincount(minlength=k)
    order = sizes.argsort(descending=True, stable=True)
    clusters = torch.full((len(flat),), -1)
    clusters[inside] = order.argsort()[of_kept]
    ordered = torch.from_numpy(centres).float()[order]
    return Modes(ordered.reshape(k, *latents_NCHW.shape[1:]), sizes[order], clusters)


def _by_minibatches(flat: Any, k: int, state: int, expand: int) -> tuple[Any, Any]:
    """Centres and labels by one pass of mini-batch k-means over the shuffled latents (D4M). The first mini-batch sets the
    centres, and each later one moves them."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    found, size = MiniBatchKMeans(n_clusters=k, batch_size=expand * k, random_state=state), expand * k
    order = np.random.default_rng(state).permutation(len(flat))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        found.partial_fit(flat[part])
    return found.cluster_centers_, found.predict(flat)


class ByModes(Steering):
    """Base of steerings in which sample i of a class belongs to mode i mod K."""

    source = "modes"

    def __init__(self, config: Any, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        super().__init__(config, k, seed, steps, shards, device)
        self._modes_of = lru_cache(REMEMBERED)(lambda label: torch.cat([shard["modes"] for shard in shards(label)]))

    @classmethod
    def clustering(cls, config: Any) -> Clustering:
        """How the modes are found."""
        return Clustering()

    @classmethod
    def common_words(cls, config: Any) -> float | None:
        """If the samples are told the captions of their clusters: words do not count in the choice of a caption if at least
        this share of the class's captions has them. None if they are told something else."""
        return None

    def modes(self, label: int, indices: Sequence[int]) -> Tensor:
        """The mode of each sample of a class, float32 [B, C, H, W]."""
        return self._modes_of(label)[[index % self.k for index in indices]]
