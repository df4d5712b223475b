"""How much of the real images a set covers, how real its images are, and whether they are copies, all in φ's space.

Precision and recall: Kynkäänniemi et al. 2019. Density and coverage: Naeem et al. 2020. Both look at balls around images, whose
radius is the distance to the k-th nearest neighbour among the images of the same kind. Shape letters: N images of a set, M real
images, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 5
"""k, the neighbour whose distance is the radius of an image's ball (Naeem et al. 2020)."""
SLACK = 1e-5
"""Share by which a ball is larger than its radius: an image on the surface of a ball counts as inside, whatever the last bits
of its features are. A set of real images has many such images."""
ROWS = 1024
"""Number of rows of a table of distances that are computed at a time."""


@dataclass(frozen=True)
class Coverage:
    """How a set lies among real images. All values are shares of images, but for the density."""

    precision: float
    """Share of the set's images that lie in the ball of a real image."""
    recall: float | None
    """Share of the real images that lie in the ball of an image of the set; None for a set of one image, which has no ball."""
    density: float
    """Mean number of real images in whose balls an image of the set lies, divided by k. Real images have about 1."""
    coverage: float
    """Share of the real images in whose ball an image of the set lies."""


def coverage(features_ND: Tensor, real_MD: Tensor, k: int = NEIGHBOURS, radii_M: Tensor | None = None) -> Coverage:
    """Compare the images of a set with real images by their features. ``radii_M`` are the :func:`radii` of the real images, if
    they are known already; their computation takes nearly all of the time.

    Where there are ``k`` images or fewer, the farthest of the others is the neighbour. Raises :class:`ValueError` for less than
    one image of the set or less than two real images.
    """
    if len(features_ND) < 1 or len(real_MD) < 2:
        raise ValueError(f"{len(features_ND)} images cannot be compared with {len(real_MD)} real ones; it takes 1 and 2")
    features_ND, real_MD = features_ND.double(), real_MD.double()
    real_radii = (1 + SLACK) * (radii(real_MD, k) if radii_M is None else radii_M)
    own_radii = (1 + SLACK) * radii(features_ND, k) if len(features_ND) > 1 else None
    inside_N, covered_M, recalled_M = features_ND.new_zeros(len(features_ND)), [], []
    for rows, distances in _distances(real_MD, features_ND):
        within = distances <= real_radii[rows, None]
        inside_N += within.sum(dim=0)
        covered_M.append(within.any(dim=1))
        if own_radii is not None:
            recalled_M.append((distances <= own_radii).any(dim=1))
    return Coverage(
        precision=_share(inside_N > 0),
        recall=_share(torch.cat(recalled_M)) if recalled_M else None,
        density=inside_N.mean().item() / min(k, len(real_MD) - 1),
        coverage=_share(torch.cat(covered_M)),
    )


def radii(features_ND: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Distance of each image to its ``k``-th nearest other image, [N]; to the farthest one if there are fewer."""
    k = min(k, len(features_ND) - 1)
    # An image is its own nearest one, so that the k-th nearest other image is at position k of the sorted distances.
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for _, distances in _distances(features_ND, features_ND)])


def reached(features_ND: Tensor, real_MD: Tensor, k: int = NEIGHBOURS, radii_M: Tensor | None = None) -> Tensor:
    """Coverage as a set grows: the share of the real images in whose ball one of the first n images lies, for n = 1 … N,
    float64 [N]. ``radii_M`` and the error are those of :func:`coverage`."""
    if len(features_ND) < 1 or len(real_MD) < 2:
        raise ValueError(f"{len(features_ND)} images cannot be compared with {len(real_MD)} real ones; it takes 1 and 2")
    real_radii = (1 + SLACK) * (radii(real_MD.double(), k) if radii_M is None else radii_M)
    counts_N = torch.zeros(len(features_ND), dtype=torch.float64)
    for rows, distances in _distances(real_MD.double(), features_ND.double()):
        within = distances <= real_radii[rows, None]
        first = within.double().argmax(dim=1)[within.any(dim=1)]
        counts_N += torch.bincount(first, minlength=len(features_ND)).cpu()
    return counts_N.cumsum(dim=0) / len(real_MD)


def boundary_distance(scores_NC: Tensor, weight_CD: Tensor, label: int) -> Tensor:
    """Distance of images to the decision boundary of a linear classifier of features, [N], for images of class ``label``: to
    the nearest hyperplane on which another class has an equal score. It is negative for images that the classifier assigns to
    another class."""
    others = torch.arange(len(weight_CD)) != label
    apart_NC = scores_NC[:, [label]] - scores_NC[:, others]
    return (apart_NC / (weight_CD[label] - weight_CD[others]).norm(dim=1)).min(dim=1).values


@dataclass(frozen=True)
class Nearest:
    """The real image that is nearest to each image of a set."""

    index: Tensor
    """Index of the real image, int64 [N]."""
    distance: Tensor
    """Distance to it, float64 [N]."""
    ratio: Tensor
    """This distance divided by that to the second nearest one, float64 [N]. It is close to 1 for a new image and close to 0 for
    a copy."""


def nearest(features_ND: Tensor, real_MD: Tensor) -> Nearest:
    """Find the nearest of at least two real images for each image of a set. A distance of 0 has the ratio 0."""
    found = [distances.topk(2, dim=1, largest=False) for _, distances in _distances(features_ND.double(), real_MD.double())]
    values, indices = torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
    first, second = values.unbind(dim=1)
    return Nearest(indices[:, 0], first, torch.where(first > 0, first / second, 0.0))


def frechet(features_ND: Tensor, real_MD: Tensor) -> float:
    """Fréchet distance between normal distributions with the means and covariances of both sets of features (the FID of
    Heusel et al. 2017, in φ's space): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½). Both need two images or more."""
    (mean, covariance), (real_mean, real_covariance) = _moments(features_ND), _moments(real_MD)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ real_covariance @ root).clamp(min=0).sqrt().sum()  # trace of (Σ₁Σ₂)^½
    return ((mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace() - 2 * mixed).item()


def _moments(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    features_ND = features_ND.double()
    return features_ND.mean(dim=0), torch.atleast_2d(torch.cov(features_ND.T))


def _distances(a_ND: Tensor, b_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances from some rows of ``a_ND`` to all rows of ``b_MD``, for all rows in turn."""
    for start in range(0, len(a_ND), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, torch.cdist(a_ND[rows], b_MD, compute_mode="donot_use_mm_for_euclid_dist")


def _share(found: Tensor) -> float:
    return found.double().mean().item()
