"""Training of an autoencoder on images in memory: the code of one worker.

:func:`ims3_ray.engine.loops.autoencoder_loop` runs it on Ray Train; without Ray it needs PyTorch and diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ims3_ray.config.pretrain import GROUPS, AutoencoderTraining
from ims3_ray.data.clean_images import CleanImages, sample_latents
from ims3_ray.data.transforms import to_uint8
from ims3_ray.errors import Unanimous
from ims3_ray.models.autoencoder import AT_ONCE, KIND, Autoencoder, encoded
from ims3_ray.models.checkpoints import first_not_finite, pack
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.training.epochs import EpochTrainer, Wrap

MEASURED = 2000
"""Number of images whose latents determine the scale."""


def autoencoder_config(training: AutoencoderTraining, size: int, channels: int) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL that ``training`` asks for, with latents that are not scaled."""
    levels = len(training.widths)
    return {
        "in_channels": channels, "out_channels": channels, "latent_channels": training.latent_channels,
        "block_out_channels": list(training.widths), "layers_per_block": training.layers, "norm_num_groups": GROUPS,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": size, "scaling_factor": 1.0,
    }  # fmt: skip


class Reconstruction(nn.Module):
    """An autoencoder's two halves as ``forward``, which is the method that DistributedDataParallel supports."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x_BCHW: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction of images from a sample of their latents, and mean and log-variance of the latents."""
        mean, log_variance = self.autoencoder.moments(x_BCHW)
        z = sample_latents(mean, log_variance, torch.randn(mean.shape, generator=rng, device=mean.device))
        return self.autoencoder.decode(z), mean, log_variance


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the latents' normal distributions from the standard one, averaged over their values:
    ½·(μ² + σ² − 1 − log σ²)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class AutoencoderTrainer(EpochTrainer[AutoencoderTraining]):
    """An autoencoder in training. ``wrap`` prepares it for several workers (DistributedDataParallel)."""

    setting = "autoencoding.lr"

    def __init__(
        self, config: AutoencoderTraining, images: CleanImages, seed: int, device: torch.device | str = "cpu", rank: int = 0,
        world: int = 1, wrap: Wrap | None = None,
    ) -> None:  # fmt: skip
        self.images = images.to(torch.device(device))
        channels, _, size = images.shape
        torch.manual_seed(seed_for(seed, "autoencoder-init"))
        self.plain = autoencoder_config(config, size, channels)
        self.autoencoder = Autoencoder(self.plain)
        self._scale: tuple[int, float] | None = None
        """A number of steps, and the scale of the latents after them."""
        super().__init__(config, Reconstruction(self.autoencoder), images.labels, seed, device, rank, world, wrap)

    @property
    def trained(self) -> nn.Module:
        return self.autoencoder

    def loss(self, index: Tensor) -> Tensor:
        """Mean absolute error of the pixels in [−1, 1], plus the weighted divergence."""
        rng = torch.Generator(self.device).manual_seed(seed_for(self.seed, "autoencoder", self.steps, self.rank))
        x = self.images.batch(index.to(self.device), rng)
        found, mean, log_variance = self.wrapped(x, rng)
        return (found - x).abs().mean() + self.config.kl * divergence(mean, log_variance)

    def state(self) -> dict[str, Any]:
        """Also the scale, once the training has ended: another device would measure another one in the last digits, and the
        weights would have another hash."""
        ended = self.steps >= self.config.epochs * self.steps_per_epoch
        return {**super().state(), "scale": self.scale() if ended else None}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._scale = None if state["scale"] is None else (self.steps, state["scale"])

    def weights(self) -> bytes:
        plain = {**self.plain, "scaling_factor": self.scale()}
        return pack(self.autoencoder.vae, plain, KIND, torch.float16)

    def scale(self) -> float:
        """The factor that gives the latents of some of the images, drawn at random, a mean square of one."""
        if self._scale is None or self._scale[0] != self.steps:
            self._scale = self.steps, self._measured_scale()
        return self._scale[1]

    @torch.inference_mode()
    def _measured_scale(self) -> float:
        self.autoencoder.eval()
        order = torch.randperm(len(self.labels), generator=generator_for(self.seed, "autoencoder-scale"))[:MEASURED]
        squares = []
        for part in order.to(self.device).split(AT_ONCE):
            x = self.images.batch(part, torch.Generator(self.device).manual_seed(0))
            mean, log_variance = self.autoencoder.moments(x)
            squares.append((mean.square() + log_variance.exp()).double().mean(dim=(1, 2, 3)).cpu())
        self.autoencoder.train()
        return round(float(torch.cat(squares).mean().rsqrt()), 6)


def latents_of(autoencoder: Autoencoder, images: CleanImages, device: torch.device) -> CleanImages:
    """Images as the moments of their latents, in half precision on the CPU, with those of the mirrored images if they are
    mirrored at random. Raises :class:`Unanimous` for values that are not finite in half precision."""
    parts = (part.to(device) for part in images.tensors["pixels"].split(AT_ONCE))
    tensors = encoded(autoencoder, parts, images.flip)
    if bad := first_not_finite(tensors):
        what = bad.replace("_", " ")
        raise Unanimous(f"the autoencoder gives a {what} of latents that is not finite in half precision; choose another one")
    return CleanImages(tensors, images.labels, images.flip)


@torch.inference_mode()
def pixels_of(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """uint8 pixels of latents."""
    return torch.cat([to_uint8(autoencoder.decode(part)) for part in latents.split(AT_ONCE)])
