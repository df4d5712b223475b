"""Selectors of subgroups and images, one file each. They take and return tensors."""

from ims3_ray.selection.base import ClassImages, ClassSelector, Per, Selector, SubgroupSelection, SubgroupSelector
from ims3_ray.selection.path import SelectionPath, path
from ims3_ray.selection.subgroups import centroid, select_subgroups

SELECTORS = Selector.registry
"""Name in a config (``arms.NAME.select``) → selector."""

__all__ = [
    "SELECTORS",
    "ClassImages",
    "ClassSelector",
    "Per",
    "SelectionPath",
    "Selector",
    "SubgroupSelection",
    "SubgroupSelector",
    "centroid",
    "path",
    "select_subgroups",
]
