"""Compare methods of distillation on one engine: all arms at several numbers of images per class, from shared artifacts.

    python jobs/compare.py --config configs/compare/fashion_mnist.yaml
    python jobs/compare.py --config configs/compare/fashion_mnist.yaml budgets=[10] draws=[0,1,2] --dry-run

Leaves table.md, report.html and results.json with differences and their standard errors. Interrupted, the same command
continues.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.config import CompareConfig
from ims3_ray.estimate import describe
from ims3_ray.pipeline import compare
from ims3_ray.plan import make_comparison
from ims3_ray.report.terminal import print_comparison


def run(config: CompareConfig) -> None:
    print_comparison(compare(config))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", CompareConfig, run, lambda config: describe(make_comparison(config))))
