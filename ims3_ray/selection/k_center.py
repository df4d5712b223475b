"""k-center (Sener & Savarese 2018): images chosen such that every other image is close to one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector


class KCenter(ClassSelector):
    name = "k_center"
    needs = frozenset({"features"})

    def images(self, images: ClassImages, k: int) -> Tensor:
        """Greedy choice: the image nearest to the mean, then repeatedly the one farthest from all chosen ones. Its radius is at
        most twice the optimal one."""
        features_ND = images.features_ND
        chosen = [int((features_ND - features_ND.mean(dim=0)).norm(dim=1).argmin())]
        nearest_N = (features_ND - features_ND[chosen[0]]).norm(dim=1)
        nearest_N[chosen[0]] = -1  # equal images are at distance 0 and may still be chosen, once each
        while len(chosen) < k:
            chosen.append(int(nearest_N.argmax()))
            nearest_N = nearest_N.minimum((features_ND - features_ND[chosen[-1]]).norm(dim=1))
            nearest_N[chosen[-1]] = -1
        return torch.tensor(chosen)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """The radius of a set: the largest distance of any image from the nearest image of the set."""
        distance_NN = torch.cdist(images.features_ND, images.features_ND)
        return torch.stack([distance_NN[:, chosen].amin(dim=1).amax() for chosen in sets_SK])
