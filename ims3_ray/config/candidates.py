"""From generator to distilled set: how candidates are sampled, kept, chosen and refined."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ims3_ray.config.base import Fraction, Section
from ims3_ray.diffusion.sampling import SamplerName


class ModeGuidanceConfig(Section):
    """Mode guidance (MGD3): candidate i of a class is drawn towards mode i of its real images, by k-means with k = K."""

    strength: float = Field(default=0.0, ge=0)
    """λ; MGD3 uses 0.1. 0 is none."""
    until: Fraction = 0.5
    """Share of the steps at the clean end that go unguided."""


class InvertedGaussianConfig(Section):
    """Start of sampling (D3HR): a normal distribution fitted to the class's real images, inverted by the generator."""

    groups: int = Field(default=0, ge=0)
    """Groups of K starts that are drawn, of which the one with the best moments is sampled; 0 starts from pure noise."""
    until: Fraction = Field(default=0.6, gt=0)
    """Share of the steps to which images are inverted, and from which samples start."""
    skewness: float = Field(default=0.1, ge=0)
    """Weight of the group's skewness beside its mean and deviation."""
    images_per_class: int | None = Field(default=None, ge=1)
    """Real images that are inverted, rounded up to whole units; all when unset."""


class SamplingConfig(Section):
    """Guided sampling of candidates."""

    sampler: SamplerName = "ddim"
    """`ddim` (Eq. 1, deterministic), `ddpm` (ancestral, as the published baselines: with the learned variance of generators
    that have one), `dpm++2m` (DPM-Solver++, second order: less error in as many steps)."""
    steps: int = Field(default=25, ge=1, lt=1000)
    """Evenly spaced denoising steps."""
    cfg_scale: float = Field(default=2.0, ge=1)
    """Classifier-free guidance; 1 is none."""
    cfg_channels: int | None = Field(default=None, ge=1)
    """Guidance acts on the first so many channels (DiT uses 3 of 4); all of them when unset."""
    cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Guidance acts on this part of the timesteps (0 is clean, 1 is noise); elsewhere a step costs half."""
    clip: bool = True
    """Clamp each predicted clean image to [-1, 1]; right for pixels, wrong for latents."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and arithmetic of generator and autoencoder; the steps themselves stay in float32."""
    compile: bool = False
    """torch.compile each transformer block (all share one compilation); pays off after some minutes of GPU work."""
    unit_size: int = Field(default=25, ge=1)
    """Images per unit of work, one batch. The batch shape is fixed, so a unit done again gives the same bytes."""

    mode_guidance: ModeGuidanceConfig = ModeGuidanceConfig()
    inverted_gaussian: InvertedGaussianConfig = InvertedGaussianConfig()

    @model_validator(mode="after")
    def _interval(self) -> SamplingConfig:
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval=[{low:g}, {high:g}] ends before it starts; swap the two")
        if self.mode_guidance.strength and self.sampler != "ddpm":
            raise ValueError(f"mode_guidance.strength needs sampler=ddpm, not {self.sampler}")
        if self.inverted_gaussian.groups and self.sampler != "ddim":
            raise ValueError(f"inverted_gaussian.groups needs sampler=ddim, not {self.sampler}")
        if self.mode_guidance.strength and self.inverted_gaussian.groups:
            raise ValueError("mode_guidance and inverted_gaussian exclude each other; set one of strength and groups to 0")
        return self


class PoolConfig(Section):
    """The candidates, addressed by class and index: a larger one extends what is there."""

    per_class: int | None = Field(default=None, ge=1)
    """Candidates drawn per class; selection.groups times images_per_class when unset."""
    store: Literal["png", "latents"] = "png"
    """`latents` keeps a tenth of the bytes and decodes the chosen ones again; needs an autoencoder."""
    mix_hardware: bool = False
    """Whether images of different devices or PyTorch versions may share a pool: they differ in their last bits."""


class SelectionConfig(Section):
    """Selective Subgroup Sampling (section 4.2, Eq. 8-11)."""

    images_per_class: int = Field(default=10, ge=1)
    """K, images per class of the distilled set and per candidate subgroup."""
    groups: int = Field(default=5, ge=1)
    """G, candidate subgroups per class."""
    alpha: float = Field(default=0.4, ge=0)
    """Weight of nearness to the own class's real centroid (Eq. 10). Only α : β matters."""
    beta: float = Field(default=0.9, ge=0)
    """Weight of distance from the other classes' candidates (Eq. 10)."""
    coupling: Literal["pool", "selected"] = "pool"
    """`pool` is Eq. 10 as printed; `selected` repels from the selected groups only."""
    references_per_class: int | None = Field(default=None, ge=1)
    """K_i of Eq. 8, drawn at random by the run's seed; all images when unset."""
    references: Literal["real", "generated"] = "real"
    """What the reference centroids are made of: real images (Eq. 8), or the class's candidates (Table 13)."""

    @model_validator(mode="after")
    def _possible(self) -> SelectionConfig:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, so every subgroup scores the same; raise one of them")
        return self


class RefineConfig(Section):
    """Optimisation of the chosen latents (CaO2): Adam on the generator's own denoising error, class label given."""

    steps: int = Field(default=100, ge=1)
    """Adam's steps per image."""
    lr: float = Field(default=6e-4, gt=0)
    timesteps: tuple[int, int] = (1, 12)
    """Drawn evenly from the first to before the second, of the process respaced to `of`."""
    of: int = Field(default=50, ge=2, le=1000)
    """Timesteps of the respaced process."""
    peak_weight: float = Field(default=10.0, ge=0)
    """Weight of the largest error of a latent beside the mean of the squares."""
    batch_size: int = Field(default=10, ge=1)
    """Images that are refined at a time."""

    @model_validator(mode="after")
    def _range(self) -> RefineConfig:
        first, end = self.timesteps
        if not 0 <= first < end <= self.of:
            raise ValueError(f"timesteps=[{first}, {end}] are no range of the {self.of} timesteps of the respaced process")
        return self
