"""List, verify, repair or prune artifacts: ``ims3 artifacts`` as a script, for ``ray job submit``."""

import sys

from ims3_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("artifacts"))
