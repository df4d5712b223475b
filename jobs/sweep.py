"""Search the settings of a distillation: λ_IM, α, β, G and others, for the price of the distinct fine-tunes.

    python jobs/sweep.py                                     the embedded Fashion-MNIST: λ_IM × α × β × G
    python jobs/sweep.py --dry-run                           points, fine-tunes, pools, selections, hours
    python jobs/sweep.py --config configs/sweeps/imagewoof.yaml
    python jobs/sweep.py space.selection.groups=[2,5,10]     another space
    ray job submit --working-dir . -- python jobs/sweep.py --config FILE storage=s3://bucket/sweeps

Leaves best.yaml (for jobs/distill.py), report.html, figures/, points.csv and points.parquet. Interrupted, the same command
continues. Exit codes: 0 done, 1 trials failed, 2 bad input or too small a cluster, 130 interrupted.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.config import SweepConfig
from ims3_ray.plan import make_sweep
from ims3_ray.report.terminal import print_sweep
from ims3_ray.search.driver import sweep
from ims3_ray.search.results import describe_sweep


def run(config: SweepConfig) -> None:
    print_sweep(sweep(config))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", SweepConfig, run, lambda config: describe_sweep(make_sweep(config))))
