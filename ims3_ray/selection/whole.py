"""All images of a class: the whole training split, which shows what a set could be worth at most."""

from __future__ import annotations

from ims3_ray.selection.base import Selector


class Whole(Selector):
    """Takes every image, whatever K is, so there is nothing to choose. It is for real images alone."""

    name = "all"
    whole = True
