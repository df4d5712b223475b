"""Choosing subgroups and images. Tensors in, tensors out."""

from ims3_ray.selection.subgroups import SubgroupSelection, centroid, select_subgroups

__all__ = ["SubgroupSelection", "centroid", "select_subgroups"]
