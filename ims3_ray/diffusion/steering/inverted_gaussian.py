"""Starts of sampling drawn near inverted real images, D3HR (Zhao et al. 2025, arXiv 2505.18399): the latents of a class,
inverted part of the way to noise, are nearly normally distributed. Starts are drawn from this distribution in groups, of which
the one that matches its moments best is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Generator, Tensor

from ims3_ray.component import Section
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.diffusion.steering.base import REMEMBERED, Shards, Steering
from ims3_ray.seeds import generator_for

DRAWN_AT_ONCE = 2**24
"""The most values of groups that are drawn and scored at a time."""


def start_index(num_steps: int, until: float) -> int:
    """Index of the timestep that the share ``until`` of ``num_steps`` evenly spaced timesteps leads to; at least 1, if there
    are two."""
    return min(num_steps - 1, max(1, round(num_steps * until)))


def invert_to_start(predict: Predictor, z0: Tensor, schedule: NoiseSchedule, num_steps: int, until: float) -> Tensor:
    """DDIM inversion along the timesteps that sampling takes, up to the timestep of :func:`start_index`."""
    index = start_index(num_steps, until)
    t_B = schedule.respaced(num_steps)[index].to(z0.device).expand(len(z0))
    return invert(predict, z0, t_B, schedule, index, 0)


@dataclass(frozen=True)
class Gaussian:
    """Mean and standard deviation of each value of a class's inverted latents, float64 [C, H, W] each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, total: Tensor, squares: Tensor, count: int) -> Gaussian:
        """Computed from the sum of ``count`` latents and the sum of their squares."""
        mean = total / count
        return cls(mean, (squares / count - mean.square()).clamp(min=0).sqrt())


def draw_group(gaussian: Gaussian, k: int, groups: int, skewness: float, rng: Generator, device: str = "cpu") -> Tensor:
    """The one of ``groups`` draws of K starts with the best moments, float32 [K, C, H, W].

    The cost of a group S is ``‖μ_S − μ‖ + ‖σ_S − σ‖ + w·‖γ_S‖``, with mean, standard deviation (by K − 1) and skewness over its
    K starts, value by value; a normal distribution has skewness 0. (The released code takes the skewness over the values of
    each start.)
    Draws are made on the CPU, so that they are the same for every ``device``, which only computes the costs.
    """
    size = (k, *gaussian.mean.shape)
    best, found, std = float("inf"), torch.zeros(size), gaussian.std.float().to(device)
    at_once = max(1, DRAWN_AT_ONCE // (k * gaussian.mean.numel()))
    for start in range(0, groups, at_once):
        unit = torch.randn(min(at_once, groups - start), *size, generator=rng)
        cost = _cost(unit.to(device), std, skewness)
        if (lowest := cost.min().item()) < best:
            best, found = lowest, unit[int(cost.argmin())]
    return (gaussian.mean + gaussian.std * found).float()


def _cost(unit_GKCHW: Tensor, std: Tensor, skewness: float) -> Tensor:
    """Cost of groups of starts μ + σ·u, given u: all three moments come from u, the first two multiplied by σ."""
    mean = unit_GKCHW.mean(dim=1, keepdim=True)
    centred = unit_GKCHW - mean
    variance = centred.square().mean(dim=1, keepdim=True)
    skew = (centred.pow(3).mean(dim=1, keepdim=True) / variance.sqrt().clamp(min=1e-12).pow(3)).flatten(1)
    k = unit_GKCHW.shape[1]
    deviation = (variance * k / max(1, k - 1)).sqrt()
    return (std * mean).flatten(1).norm(dim=1) + (std * (deviation - 1)).flatten(1).norm(dim=1) + skewness * skew.norm(dim=1)


class InvertedGaussian(Steering):
    """Samples gK … (g+1)K−1 of a class start from the best of the groups of starts that were drawn for them."""

    name, source, option, switch = "inverted_gaussian", "inverted", "first", "groups"
    least_steps = 2  # one to invert to, and one to start from
    version = 2

    class Config(Section):
        """Start of sampling (D3HR): a normal distribution fitted to the class's real images, inverted by the generator."""

        groups: int = Field(default=0, ge=0)
        """Groups of K starts that are drawn, of which the one with the best moments is used; 0 starts from pure noise."""
        until: float = Field(default=0.6, gt=0, le=1)
        """Share of the sampling steps over which real images are inverted; sampling starts at the timestep reached."""
        skewness: float = Field(default=0.1, ge=0)
        """Weight of a group's skewness in its cost; mean and standard deviation have weight 1."""
        images_per_class: int | None = Field(default=None, ge=1)
        """Real images per class that are inverted, rounded up to whole units; all when unset."""

    def __init__(self, config: Config, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        super().__init__(config, k, seed, steps, shards, device)
        self._starts_of = lru_cache(REMEMBERED)(self._draw)

    @classmethod
    def share(cls, config: Config) -> float:
        return config.until

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"from inverted starts, K = {k}"

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        starts = torch.stack([self._starts_of(label, index // self.k)[index % self.k] for index in indices])
        return {"start": starts, "first": start_index(self.steps, self.config.until)}

    def _draw(self, label: int, group: int) -> Tensor:
        """The starts of one group of K samples of a class."""
        shards = self.shards(label)
        total, squares, count = (sum(shard[name] for shard in shards) for name in ("total", "squares", "count"))
        gaussian = Gaussian.of(total, squares, int(count))  # type: ignore[arg-type]
        rng = generator_for(self.seed, "starts", label, group)
        return draw_group(gaussian, self.k, self.config.groups, self.config.skewness, rng, self.device)
