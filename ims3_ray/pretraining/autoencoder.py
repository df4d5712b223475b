"""An autoencoder, in whose latent space generators can be trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import AT_ONCE, KIND, Autoencoder, decoding_flops, encoding_flops, load_autoencoder
from ims3_ray.models.checkpoints import pack
from ims3_ray.plan.estimate import scaled
from ims3_ray.pretraining.by_epochs import EpochTarget
from ims3_ray.pretraining.quality import Quality, Splits
from ims3_ray.training.autoencoder import autoencoder_config

SHOWN = 5
"""Number of test images of each class on the sheet; each is followed by its reconstruction."""


class AutoencoderTarget(EpochTarget):
    """The training of an autoencoder. The error of the test images that it reconstructs judges it."""

    name, section, loop_name = "autoencoder", "autoencoding", "autoencoder_loop"

    def check(self) -> None:
        size, halvings = self.config.data.size, len(self.config.autoencoding.widths) - 1
        if size % 2**halvings:
            raise UserError(
                f"data.size={size} cannot be halved {halvings} times, once for each of autoencoding.widths but the first; "
                f"set data.size={-(-size // 2**halvings) * 2**halvings}, or fewer widths"
            )

    @property
    def network(self) -> str:
        t, size = self.config.autoencoding, self.config.data.size
        side = size // 2 ** (len(t.widths) - 1)
        return (
            f"AutoencoderKL of widths {', '.join(map(str, t.widths))}, {t.latent_channels} × {side} × {side} latents, "
            f"{scaled(self.flops)}FLOP to encode and decode an image"
        )

    @property
    def judging(self) -> str:
        return "the error of the reconstructed test images"

    @torch.inference_mode()
    def judge(self, weights: Path, splits: Splits, device: str) -> Quality:
        """The peak signal-to-noise ratio of the mean square error over all test images, whose latents are the means."""
        torch.set_num_threads(self.config.quality.threads)
        model, (pixels, labels) = load_autoencoder(weights).to(device), splits.test

        means = (model.moments(to_signed(part.to(device)))[0] for part in pixels.split(AT_ONCE))
        found = torch.cat([to_uint8(model.decode(mean)).cpu() for mean in means])
        error = (found.float() - pixels.float()).square().mean()
        psnr = 10 * math.log10(255**2 / max(error.item(), 1e-9))
        first = torch.cat([(labels == label).nonzero().flatten()[:SHOWN] for label in range(len(splits.names))])
        shown = torch.stack([pixels[first], found[first]], dim=1).flatten(0, 1)
        line = f"reconstructions of the test images: {psnr:.1f} dB (peak signal-to-noise ratio); latents are scaled by"
        return Quality([f"{line} {model.scale:g}"], {"psnr": psnr}, samples=shown)

    def untrained(self, names: Sequence[str]) -> bytes:
        return pack(Autoencoder(self._plain).vae, self._plain, KIND, torch.float16)

    @property
    def _plain(self) -> dict[str, Any]:
        return autoencoder_config(self.config.autoencoding, self.config.data.size, self.config.data.channels)

    @property
    def flops(self) -> float:
        with torch.device("meta"):
            model = Autoencoder(self._plain)
        return encoding_flops(model, self.config.data.size) + decoding_flops(model, self.config.data.size // model.factor)
