"""Distil a labelled image set with IMS3: a few generated images a class that train classifiers almost as well.

    python jobs/distill.py                              the embedded Fashion-MNIST, results in runs/demo
    python jobs/distill.py --dry-run                    the plan: what is there, images, FLOPs, hours, storage, money
    python jobs/distill.py name=mine data.path=photos   your own images (one folder per class, IDX or Parquet)
    python jobs/distill.py --config FILE selection.alpha=0.4 selection.groups=10
    ray job submit --working-dir . -- python jobs/distill.py storage=s3://bucket/distill

Interrupted, the same command continues. docs/configuration.md names every key.
Exit codes: 0 done, 1 a fault, 2 bad input or too small a cluster (one line says what to do), 130 interrupted.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.config import RunConfig
from ims3_ray.estimate import describe
from ims3_ray.pipeline import distill
from ims3_ray.plan import make_plan
from ims3_ray.report.terminal import print_result


def run(config: RunConfig) -> None:
    print_result(distill(config))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", RunConfig, run, lambda config: describe(make_plan(config))))
