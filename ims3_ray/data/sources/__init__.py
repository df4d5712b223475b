"""Sources of labelled image sets. Each kind of source is one file."""

from ims3_ray.data.sources.base import Source, copied_files, open_source, shared_file

__all__ = ["Source", "copied_files", "open_source", "shared_file"]
