"""Mode guidance, MGD3 (Chan-Santiago et al. 2025, arXiv 2505.18963): each sample of a class is guided towards one of the modes
of the class's real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from ims3_ray.component import Section
from ims3_ray.diffusion.samplers.base import Drift
from ims3_ray.diffusion.steering.modes import ByModes


def toward_modes(modes_BCHW: Tensor, strength: float, until: float) -> Drift:
    """``−λ·(ẑ_0 − m)`` for each sample's own mode m, in units of σ_t; None in the last share ``until`` of the steps."""

    def drift(z0_BCHW: Tensor, noise_left: float) -> Tensor | None:
        return -strength * (z0_BCHW - modes_BCHW) if noise_left > until else None

    return drift


class ModeGuidance(ByModes):
    """Guides sample i of a class towards mode i mod K."""

    name, option, switch = "mode_guidance", "drift", "strength"

    class Config(Section):
        """Mode guidance (MGD3) of candidate i of a class to mode i mod K of its real images (k-means with k = K)."""

        strength: float = Field(default=0.0, ge=0)
        """Strength λ of the guidance; MGD3 uses 0.1, and 0 turns it off."""
        until: float = Field(default=0.5, ge=0, le=1)
        """Share of the steps, at the end of sampling, that are not guided."""

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"guided to {k} modes"

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        modes = self.modes(label, indices).to(self.device)
        return {"drift": toward_modes(modes, self.config.strength, self.config.until)}
