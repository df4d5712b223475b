"""Train the weights that a distillation starts from: the generator (a class-conditional DiT) or the encoder φ.

    python jobs/pretrain.py --config configs/pretrain/fashion-mnist-dit.yaml --dry-run
    python jobs/pretrain.py --config configs/pretrain/fashion-mnist-dit.yaml
    python jobs/pretrain.py data.path=photos data.size=32 data.channels=3 generator.minutes=60

It works with every data source of the project. After an interruption the same command continues from the last checkpoint.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main

JOBS = "ims3_ray.commands.jobs"

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", "ims3_ray.config:PretrainConfig", f"{JOBS}:run_pretrain", f"{JOBS}:plan_pretrain"))
