"""Search the settings of a distillation: λ_IM, α, β, G and others. Points with the same fine-tuning share its computation.

    python jobs/sweep.py                                     embedded Fashion-MNIST: λ_IM × α × β × G
    python jobs/sweep.py --dry-run                           the plan: points, fine-tunings, pools, selections, hours
    python jobs/sweep.py --config configs/sweeps/imagewoof.yaml
    python jobs/sweep.py space.selection.groups=[2,5,10]     another space
    ray job submit --working-dir . -- python jobs/sweep.py --config FILE storage=s3://bucket/sweeps

Writes best.yaml (for jobs/distill.py), report.html, figures/, points.csv and points.parquet. After an interruption the same
command continues where it stopped. Exit codes: 0 done, 1 trials failed, 2 bad input or too small a cluster, 130 interrupted.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main

JOBS = "ims3_ray.commands.jobs"

if __name__ == "__main__":
    sys.exit(
        main(
            __doc__ or "",
            "ims3_ray.config:SweepConfig",
            f"{JOBS}:run_sweep",
            f"{JOBS}:plan_sweep",
        )
    )
