"""The images nearest to the centroid of the real ones: S3 without its second term, for images or for groups."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.selection.base import ClassImages, Selector, lowest
from ims3_ray.selection.subgroups import centroid


class ClosestToReal(Selector):
    needs = frozenset({"features", "references"})

    def images(self, images: ClassImages, k: int) -> Tensor:
        return lowest(1 - images.features_ND @ centroid(images.references_MD), k)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        centroid_SD = normalize(images.features_ND[sets_SK].mean(dim=1), dim=-1)
        return 1 - centroid_SD @ centroid(images.references_MD)
