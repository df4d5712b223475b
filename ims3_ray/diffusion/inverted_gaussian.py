"""Starts of sampling from where real images come from, D3HR (Zhao et al. 2025, arXiv 2505.18399): latents inverted part of the
way to noise are nearly normal, class by class, so starts are drawn from that normal, a group at a time that matches its
moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.sampling import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule

DRAWN_AT_ONCE = 2**24
"""Values of the groups that are drawn and judged at a time."""


def start_index(num_steps: int, until: float) -> int:
    """Index of the timestep, of ``num_steps`` evenly spaced ones, to which the share ``until`` of them leads; at least 1."""
    return max(1, min(num_steps - 1, round(num_steps * until)))


def invert_to_start(predict: Predictor, z0: Tensor, schedule: NoiseSchedule, num_steps: int, until: float) -> Tensor:
    """DDIM inversion along the timesteps that sampling takes, to that of :func:`start_index`."""
    index = start_index(num_steps, until)
    t_B = schedule.respaced(num_steps)[index].to(z0.device).expand(len(z0))
    return invert(predict, z0, t_B, schedule, index, 0)


@dataclass(frozen=True)
class Gaussian:
    """Mean and deviation of each value of a class's inverted latents, float64 [C, H, W]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, total: Tensor, squares: Tensor, count: int) -> Gaussian:
        """From sums over ``count`` latents of themselves and of their squares."""
        mean = total / count
        return cls(mean, (squares / count - mean.square()).clamp(min=0).sqrt())


def draw_group(gaussian: Gaussian, k: int, groups: int, skewness: float, rng: Generator, device: str = "cpu") -> Tensor:
    """The one of ``groups`` draws of K starts with the best moments, float32 [K, C, H, W].

    Cost of a group S: ``‖μ_S − μ‖ + ‖σ_S − σ‖ + w·‖γ_S‖``, mean, deviation and skewness over its K starts, value by value; a
    normal has skewness 0. (The released code takes the skewness over the values of each start.) The CPU draws, so that every
    ``device`` is given the same to judge.
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
    """Of starts μ + σ·u, given u: all three moments are those of u, the first two times σ."""
    mean = unit_GKCHW.mean(dim=1, keepdim=True)
    centred = unit_GKCHW - mean
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    skew = (centred.pow(3).mean(dim=1, keepdim=True) / deviation.clamp(min=1e-12).pow(3)).flatten(1)
    return (std * mean).flatten(1).norm(dim=1) + (std * (deviation - 1)).flatten(1).norm(dim=1) + skewness * skew.norm(dim=1)
