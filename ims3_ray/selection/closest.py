"""The images, or the subgroup, nearest to the centroid of the real images: S3 without its second term."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.selection.base import ClassImages, ClassSelector, lowest
from ims3_ray.selection.subgroups import centroid


class ClosestToReal(ClassSelector):
    name = "closest"
    needs = frozenset({"features", "references"})

    def images(self, images: ClassImages, k: int) -> Tensor:
        return lowest(1 - images.features_ND @ centroid(images.references_MD), k)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        centroid_SD = normalize(images.features_ND[sets_SK].mean(dim=1), dim=-1)
        return 1 - centroid_SD @ centroid(images.references_MD)
