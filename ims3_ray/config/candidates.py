"""From generator to distilled set: how candidates are sampled, stored and selected, and how sets are synthesised from them."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ims3_ray.component import Components
from ims3_ray.config.base import Fraction, Section
from ims3_ray.diffusion.samplers.base import Sampler
from ims3_ray.diffusion.steering.base import Steering
from ims3_ray.selection.base import Selector
from ims3_ray.selection.s3 import S3Config
from ims3_ray.synthesis.base import Synthesis


class SamplingConfig(Components):
    """Settings of the guided sampling of candidates."""

    registries = (Sampler.registry, Steering.registry)

    sampler: str = "ddim"
    """The sampler: `ddim` (Eq. 1, deterministic), `ddpm` (ancestral, as in the published baselines; it uses the learned
    variance of generators that have one), `dpm++2m` (DPM-Solver++ of second order: less error for the same number of steps)
    or `pndm` (the linear multistep method that Stable Diffusion uses by default)."""
    steps: int = Field(default=25, ge=1, lt=1000)
    """Number of denoising steps, evenly spaced over the timesteps."""
    cfg_scale: float = Field(default=2.0, ge=1)
    """Scale of classifier-free guidance; 1 means no guidance."""
    cfg_channels: int | None = Field(default=None, ge=1)
    """Number of channels, counted from the first, on which guidance acts (DiT uses 3 of 4); all channels when unset."""
    cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range of timesteps in which guidance acts, as shares of all timesteps (0 is clean, 1 is noise); a step outside the range
    costs half as much."""
    negative_prompt: str = ""
    """What a generator that is told words is told in the unconditional half of its guidance."""
    clip: bool = True
    """Whether each predicted clean image is clamped to [-1, 1]; right for pixels, wrong for latents."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Number format of the weights and the arithmetic of generator and autoencoder; the sampling steps themselves are computed
    in float32. `auto` is bf16 if the actors have GPUs or the CPU of the machine that starts the run computes bf16 natively, and
    fp32 otherwise. A run that is continued keeps its format."""
    compile: bool = False
    """Whether each transformer block is compiled with torch.compile. All blocks share one compilation, which pays off after
    some minutes of GPU work."""
    unit_size: int = Field(default=25, ge=1)
    """Number of images per unit of work. A unit is one batch of this fixed size, so computing a unit again gives the same
    bytes."""

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
        return Sampler.registry.checked(name)

    @model_validator(mode="after")
    def _possible(self) -> SamplingConfig:
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval=[{low:g}, {high:g}] ends before it starts; swap the two")
        on = [each for each in Steering.registry.values() if each.is_on(self.of(each))]
        for each in on:
            if each.option not in Sampler.registry[self.sampler].takes:
                able = [name for name, sampler in Sampler.registry.items() if each.option in sampler.takes]
                raise ValueError(f"{each.name}.{each.switch} needs sampler={' or '.join(able)}, not {self.sampler}")
        if len(on) > 1:
            names, switches = " and ".join(each.name for each in on), " and ".join(each.switch for each in on)
            raise ValueError(f"{names} exclude each other; set one of {switches} to 0")
        if on and self.steps < on[0].least_steps:
            raise ValueError(f"{on[0].name}.{on[0].switch} needs steps={on[0].least_steps} or more, not {self.steps}")
        return self

    @property
    def steering(self) -> type[Steering] | None:
        """The steering method that is switched on, or None."""
        return next((each for each in Steering.registry.values() if each.is_on(self.of(each))), None)


class PoolConfig(Section):
    """The pool of candidates. A candidate is identified by its class and index, so a larger pool only adds the candidates that
    are missing."""

    per_class: int | None = Field(default=None, ge=1)
    """Number of candidates per class; selection.groups times selection.images_per_class when unset."""
    store: Literal["png", "latents"] = "png"
    """Format in which candidates are stored. `latents` takes about a tenth of the bytes of `png`, but the selected candidates
    must be decoded again; it needs an autoencoder."""
    mix_hardware: bool = False
    """Whether one pool may hold images that were made on different devices or with different PyTorch versions; such images
    differ in their last bits."""


class SelectionConfig(Components, S3Config):
    """How many images are selected, from which candidates, and with which weights (section 4.2, Eq. 8-11)."""

    model_config = ConfigDict(extra="allow")
    registries = (Selector.registry,)

    images_per_class: int = Field(default=10, ge=1)
    """K, the number of images per class in the distilled set and of images in each candidate subgroup."""
    groups: int = Field(default=5, ge=1)
    """G, the number of candidate subgroups per class."""
    references_per_class: int | None = Field(default=None, ge=1)
    """K_i of Eq. 8: the number of images per class that make the reference centroid, drawn at random with the run's seed; all
    images when unset."""
    references: Literal["real", "generated"] = "real"
    """Images that make the reference centroids: real images (Eq. 8), or the candidates of the class (Table 13)."""


class SynthesisConfig(Components):
    """The settings of each synthesis method. An arm chooses a method with `synthesise`."""

    registries = (Synthesis.registry,)
