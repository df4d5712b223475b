"""The interface of a sampler, and :func:`sample`, which draws samples with one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ims3_ray.component import Component, Registry, Section
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule, Spacing

Draw = Callable[[], Tensor]
"""Returns standard normal noise of the shape of z; each sample's noise comes from a random generator of its own."""

Drift = Callable[[Tensor, float], Tensor | None]
"""(ẑ_0, share of the steps that are left) → the shift that a step adds to z, in units of its standard deviation σ_t."""


class Sampler(Component, ABC):
    """Turns noise into a clean latent. A config names it by ``sampling.sampler``; its settings are ``sampling.NAME``."""

    registry = Registry["type[Sampler]"]("sampler", "ims3_ray.diffusion.samplers")
    calls: ClassVar[float] = 1.0
    """Calls of the predictor in each step."""
    more_calls: ClassVar[int] = 0
    """Calls of the predictor beyond those of the steps."""
    uses_variance: ClassVar[bool] = False
    """Whether the sampler uses the variance of generators that predict one."""
    spacing: ClassVar[Spacing] = "linspace"
    """How its timesteps are spaced: see :meth:`NoiseSchedule.respaced`."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """The options that a sampling with it may have: ``first`` (index of the timestep at which a ``start`` of one's own begins),
    ``around`` (clean latents to start near, with ``first``, see :func:`sample`), ``drift`` (:data:`Drift`)."""

    @classmethod
    def first_of(cls, num_steps: int, strength: float) -> int:
        """Index of the timestep at which sampling begins that makes the share ``strength`` of ``num_steps`` steps, as
        diffusers' image-to-image pipelines count it."""
        return max(0, int(num_steps * strength) - 1)

    def __init__(self, config: Section | None = None) -> None:
        self.config: Any = config or self.Config()

    @abstractmethod
    def __call__(
        self, predict: Predictor, z: Tensor, draw: Draw, schedule: NoiseSchedule, num_steps: int, clip: bool, **options: Any
    ) -> Tensor:
        """The clean latents to which ``z`` [B, C, H, W] leads in ``num_steps`` steps.

        ``clip`` clamps each predicted clean latent to [−1, 1]. :attr:`takes` names the possible ``options``.
        """


@torch.inference_mode()
def sample(
    predict: Predictor,
    shape: Sequence[int],
    generators: Sequence[Generator],
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    sampler: Sampler | str = "ddim",
    clip: bool = False,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    around: Tensor | None = None,
    strength: float = 1.0,
    **options: Any,
) -> Tensor:
    """Draw ``len(generators)`` samples of ``shape`` [C, H, W]; sample b uses noise from ``generators[b]`` alone.

    Noise is drawn on the CPU, so that it is the same for every device. Sampling ends at ᾱ = 1, or for Stable Diffusion at a
    value near it, and the latent there is returned in float32. ``start`` [B, C, H, W] replaces the initial noise. ``around``
    [B, C, H, W] are clean latents that are noised to the timestep from which the share ``strength`` of the steps remains,
    where sampling then starts. ``options`` are passed to the sampler.
    """

    def draw() -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device, non_blocking=True)

    way = Sampler.registry[sampler]() if isinstance(sampler, str) else sampler
    z = draw() if start is None else start.to(device)
    if around is not None:
        options["first"] = way.first_of(num_steps, strength)
        t = schedule.respaced(num_steps, way.spacing)[options["first"]]
        z = schedule.add_noise(around.to(device), z, t.expand(len(z)).to(device))
    return way(predict, z, draw, schedule, num_steps, clip, **options).float()
