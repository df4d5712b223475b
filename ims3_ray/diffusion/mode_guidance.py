"""Mode guidance, MGD3 (Chan-Santiago et al. 2025, arXiv 2505.18963): samples of a class are drawn towards the modes of its real
images, one each."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.diffusion.sampling import Drift


def find_modes(latents_NCHW: Tensor, k: int, seed: int) -> Tensor:
    """Centres of k-means over a class's latents, [K, C, H, W] float32, those of the largest clusters first.

    Raises ``ValueError`` for fewer latents than modes.
    """
    from sklearn.cluster import KMeans

    if len(latents_NCHW) < k:
        raise ValueError(f"{k} modes are to be found of {len(latents_NCHW)} images")
    found = KMeans(n_clusters=k, n_init=10, random_state=seed % 2**32).fit(latents_NCHW.flatten(1).numpy())
    sizes = torch.from_numpy(found.labels_).long().bincount(minlength=k)
    centres = torch.from_numpy(found.cluster_centers_).float()[sizes.argsort(descending=True, stable=True)]
    return centres.reshape(k, *latents_NCHW.shape[1:])


def toward_modes(modes_BCHW: Tensor, strength: float, until: float) -> Drift:
    """``−λ·(ẑ_0 − m)`` for each sample's own mode, in units of the step's deviation σ_t; none in the last share ``until``."""

    def drift(z0_BCHW: Tensor, noise_left: float) -> Tensor | None:
        return -strength * (z0_BCHW - modes_BCHW) if noise_left > until else None

    return drift
