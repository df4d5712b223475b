"""``python -m ims3_ray``, which is ``ims3``."""

import sys

from ims3_ray.cli import ims3

if __name__ == "__main__":
    sys.exit(ims3())
