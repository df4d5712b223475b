"""How many images φ recognises: whether samples of a generator look like their classes at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def recognised(features: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
    """For each class, the share of its ``features`` [n, D] that are closer, by cosine, to the mean of the class's
    ``references`` [m, D] than to that of any other class. All means are of ℓ2-normalised features."""
    centroids = torch.stack([normalize(normalize(each.double(), dim=-1).mean(dim=0), dim=-1) for each in references])
    found = [normalize(each.double(), dim=-1) @ centroids.T for each in features]
    return [(scores.argmax(dim=1) == label).double().mean().item() for label, scores in enumerate(found)]
