"""Optimisation of chosen latents, the second half of CaO2 (Wang et al. 2025, arXiv 2506.22637): each latent is changed to
minimise the denoising error of the generator, conditioned on the latent's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from ims3_ray.component import Section
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.saving import Save, Saver, unpack_state
from ims3_ray.seeds import generator_for
from ims3_ray.synthesis.base import Costs, Given, Synthesis


def refinement_loss(eps: Tensor, predicted: Tensor, peak_weight: float) -> Tensor:
    """``mean (ε − ε_θ)² + w·max |ε − ε_θ|`` of each latent, [B]."""
    error = (eps - predicted).flatten(1)
    return error.square().mean(dim=1) + peak_weight * error.abs().amax(dim=1)


def refine(
    predict: Predictor, z0: Tensor, schedule: NoiseSchedule, rngs: Sequence[Generator],
    *, steps: int, lr: float, timesteps: tuple[int, int], of: int, peak_weight: float,
) -> Tensor:  # fmt: skip
    """``z0`` [B, C, H, W] after ``steps`` of Adam on :func:`refinement_loss` (the keys of ``synthesis.cao2`` in a config).

    Each latent uses one draw of noise from its own random generator in all steps, and draws a new timestep for every step:
    an index from the first of ``timesteps`` up to, but not including, the second, in the process respaced to ``of`` timesteps.
    """
    noise = torch.stack([torch.randn(z0.shape[1:], generator=rng) for rng in rngs]).to(z0)
    spaced = schedule.respaced(of, "dit")
    z = z0.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        drawn = torch.stack([torch.randint(*timesteps, (), generator=rng) for rng in rngs])
        t_B = spaced[drawn].to(z.device)
        predicted = predict(schedule.add_noise(z, noise, t_B), t_B)[:, : z.shape[1]]
        # A sum, not a mean: Adam scales every element by itself, so each latent of a batch moves as if it were optimised alone.
        loss = refinement_loss(noise, predicted, peak_weight).sum()
        (z.grad,) = torch.autograd.grad(loss, [z])
        optimizer.step()
    return z.detach()


class CaO2(Synthesis):
    """Refines the latents of the given images with the generator that made them. The noise of each latent is seeded by
    (run seed, class, index) alone."""

    name = "cao2"
    starts = frozenset({"set"})
    needs = frozenset({"generator"})

    class Config(Section):
        """Optimisation of the chosen latents (CaO2): Adam minimises the generator's class-conditional denoising error."""

        steps: int = Field(default=100, ge=1)
        """Number of steps of Adam per image."""
        lr: float = Field(default=6e-4, gt=0)
        """Learning rate of Adam."""
        timesteps: tuple[int, int] = (1, 12)
        """First index and end index (exclusive) of the timesteps drawn uniformly, in the process respaced to `of` timesteps."""
        of: int = Field(default=50, ge=2, le=1000)
        """Number of timesteps of the respaced process."""
        peak_weight: float = Field(default=10.0, ge=0)
        """Weight of the largest absolute error of a latent, added to its mean squared error."""
        batch_size: int = Field(default=10, ge=1)
        """Number of images that are refined at a time."""

        @model_validator(mode="after")
        def _range(self) -> CaO2.Config:
            first, end = self.timesteps
            if not 0 <= first < end <= self.of:
                raise ValueError(f"timesteps=[{first}, {end}] are no range of the {self.of} timesteps of the respaced process")
            return self

    config: Config

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        """Each step of an image takes a forward pass and the gradient with respect to its input."""
        return 2.0 * config.steps * costs.k * len(costs.counts) * costs.forward["generator"]

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        generator, c, position = given.generator, self.config, int(given.classes[0])
        assert generator is not None
        label, saver, starts = generator.label(position), Saver(save), generator.latents(given)
        refined: list[Tensor] = [] if state is None else list(unpack_state(state, "cpu")["refined"].split(c.batch_size))
        batches = zip(starts.split(c.batch_size), given.indices.split(c.batch_size), strict=True)
        for z0, part in list(batches)[len(refined) :]:
            rngs = [generator_for(given.seed, "refine", label, index) for index in part.tolist()]
            refined.append(refine(
                generator.predictor(position, len(z0)), z0.to(given.device), generator.schedule, rngs, steps=c.steps, lr=c.lr,
                timesteps=c.timesteps, of=c.of, peak_weight=c.peak_weight,
            ).cpu())  # fmt: skip
            done = torch.cat(refined)
            saver(len(done) / len(starts), refined=done)
        return {"pixels": generator.decode(torch.cat(refined).to(given.device))}
