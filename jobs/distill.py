"""Distil a labelled image set with IMS3: a few generated images per class that train classifiers almost as well.

    python jobs/distill.py                              embedded Fashion-MNIST; results in runs/distill
    python jobs/distill.py --dry-run                    the plan: finished stages, images, FLOPs, hours, storage, cost
    python jobs/distill.py name=mine data.path=photos   your own images (photos/train/CLASS/*.jpg, photos/test/…)
    python jobs/distill.py --config FILE selection.alpha=0.4 selection.groups=10
    ray job submit --working-dir . -- python jobs/distill.py storage=s3://bucket/distill

After an interruption the same command continues where it stopped. docs/configuration.md lists every key.
Exit codes: 0 done, 1 a fault, 2 bad input or too small a cluster (one line says what to do), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main

JOBS = "ims3_ray.commands.jobs"

if __name__ == "__main__":
    sys.exit(
        main(
            __doc__ or "",
            "ims3_ray.config:RunConfig",
            f"{JOBS}:run_distill",
            f"{JOBS}:plan_distill",
        )
    )
