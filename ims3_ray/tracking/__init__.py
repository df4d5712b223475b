"""Tracking with MLflow: one run per job, with a child run per set or per point of a sweep. One thread of the driver is the only
writer.

Everything that is tracked is also on the storage, so a lost server does not delay the job, and the same command sends it the
rest later.
"""

from ims3_ray.tracking.entries import DistilledSet, slug, slugs, table_of
from ims3_ray.tracking.places import check_server, follow_moved_folder, tracking_uri
from ims3_ray.tracking.tracker import PARENT, Tracker, Untracked

__all__ = [
    "PARENT", "DistilledSet", "Tracker", "Untracked", "check_server", "follow_moved_folder", "slug", "slugs", "table_of",
    "tracking_uri",
]  # fmt: skip
