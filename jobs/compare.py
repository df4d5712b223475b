"""Compare distillation methods with the same code: all arms at several numbers of images per class, from shared artifacts.

    python jobs/compare.py --config configs/compare/fashion_mnist.yaml
    python jobs/compare.py --config configs/compare/fashion_mnist.yaml budgets=[10] draws=[0,1,2] --dry-run

Writes table.md, report.html and results.json with the differences between methods and their standard errors. After an
interruption the same command continues where it stopped.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main

JOBS = "ims3_ray.commands.jobs"

if __name__ == "__main__":
    sys.exit(
        main(
            __doc__ or "",
            "ims3_ray.config:CompareConfig",
            f"{JOBS}:run_compare",
            f"{JOBS}:plan_compare",
        )
    )
