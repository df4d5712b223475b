"""Starts of sampling at prototypes, D4M (Su et al. 2024, arXiv 2407.15138) and DDVLCP: each sample begins at the centre of a
cluster of the class's real latents, which is noised part of the way, and may be told the caption of a real image of the
cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ims3_ray.component import Section
from ims3_ray.diffusion.steering.base import REMEMBERED, Shards
from ims3_ray.diffusion.steering.modes import ByModes, Clustering


class Prototypes(ByModes):
    """Starts sample i of a class at the centre of cluster i mod K of its real images (k-means with k = K)."""

    name, option, switch = "prototypes", "around", "strength"

    class Config(Section):
        """Start of sampling (D4M, DDVLCP): centre i mod K of the class's real images (k-means with k = K) for candidate i,
        noised."""

        strength: float = Field(default=0.0, ge=0, le=1)
        """Share of the sampling steps for which the centre is noised and then sampled; D4M and DDVLCP use 0.7, and 0 starts
        from pure noise."""
        minibatch: int = Field(default=0, ge=0)
        """Size of the mini-batches of k-means, in units of K, for one pass over the images as D4M makes it (its release: 1); 0
        for k-means of all images at once."""
        outliers: float = Field(default=0.0, ge=0, le=0.5)
        """Share of a class's images that are left out of the clusters, by their local outlier factor (DDVLCP: 0.1)."""
        words: Literal["class", "captions"] = "class"
        """What a generator that takes words is told: the prompt of the class (D4M), or for each cluster the caption of a real
        image (DDVLCP; needs `data.captions`)."""
        common: float = Field(default=0.7, gt=0, le=1)
        """With `words: captions`, words do not count in the choice of a cluster's caption if at least this share of the class's
        captions has them (DDVLCP: 0.7, for CIFAR 0.9)."""

        @model_validator(mode="after")
        def _started(self) -> Self:
            if self.words == "captions" and not self.strength:
                raise ValueError("words: captions are those of the clusters that sampling starts at; set strength, as to 0.7")
            return self

    def __init__(self, config: Any, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        super().__init__(config, k, seed, steps, shards, device)
        self._captions_of = lru_cache(REMEMBERED)(self._read_captions)

    @classmethod
    def share(cls, config: Config) -> float:
        return config.strength

    @classmethod
    def says_captions(cls, config: Config) -> bool:
        return config.words == "captions"

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"from {k} prototypes"

    @classmethod
    def clustering(cls, config: Config) -> Clustering:
        return Clustering(config.minibatch, config.outliers)

    @classmethod
    def common_words(cls, config: Config) -> float | None:
        return config.common if cls.says_captions(config) else None

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        return {"around": self.modes(label, indices), "strength": self.config.strength}

    def words(self, label: int, indices: Sequence[int]) -> list[str] | None:
        if not self.says_captions(self.config):
            return None
        captions = self._captions_of(label)
        return [captions[index % self.k] for index in indices]

    def _read_captions(self, label: int) -> list[str]:
        (shard,) = self.shards(label)
        captions: list[str] = json.loads(bytes(shard["captions"].tolist()))
        return captions
