"""Sources of labelled image sets. Each kind of source is one file."""

from ims3_ray.data.sources.base import Source, open_source
from ims3_ray.data.sources.copies import check_apart, copies_noticed, shared_file

__all__ = ["Source", "check_apart", "copies_noticed", "open_source", "shared_file"]
