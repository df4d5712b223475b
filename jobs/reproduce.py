"""Make a table or a figure of the paper: ``ims3 reproduce`` as a script, for ``ray job submit``."""

import sys

from ims3_ray.cli import job

if __name__ == "__main__":
    sys.exit(job("reproduce"))
