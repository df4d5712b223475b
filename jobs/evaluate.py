"""Score sets of images: ``ims3 evaluate`` as a script, for ``ray job submit``."""

import sys

from ims3_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("evaluate"))
