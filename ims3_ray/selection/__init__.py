"""Choosing subgroups and images. Tensors in, tensors out."""

from ims3_ray.selection.base import ClassImages, Per, Selector
from ims3_ray.selection.closest import ClosestToReal
from ims3_ray.selection.confidence import Confidence
from ims3_ray.selection.first_k import FirstK
from ims3_ray.selection.herding import Herding
from ims3_ray.selection.k_center import KCenter
from ims3_ray.selection.moments import MomentMatching
from ims3_ray.selection.path import SelectionPath, path
from ims3_ray.selection.random_k import RandomK
from ims3_ray.selection.subgroups import SubgroupSelection, centroid, select_subgroups

SELECTORS: dict[str, Selector] = {
    "first": FirstK(),
    "random": RandomK(),
    "closest": ClosestToReal(),
    "herding": Herding(),
    "k_center": KCenter(),
    "moments": MomentMatching(),
    "confidence": Confidence(),
    "least_confidence": Confidence(least=True),
}
"""By the name that a config gives them (``arms.NAME.select``). S3 is not among them: it looks at all classes at once."""

__all__ = [
    "SELECTORS",
    "ClassImages",
    "Per",
    "SelectionPath",
    "Selector",
    "SubgroupSelection",
    "centroid",
    "path",
    "select_subgroups",
]
