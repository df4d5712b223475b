"""Search the settings of a distillation: ``ims3 sweep`` as a script, for ``ray job submit``."""

import sys

from ims3_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("sweep"))
