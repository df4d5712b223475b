"""Train the weights that a distillation starts from: the generator (a class-conditional DiT) or the encoder φ.

    python jobs/pretrain.py --config configs/pretrain/fashion-mnist-dit.yaml
    python jobs/pretrain.py --config configs/pretrain/fashion-mnist-dit.yaml generator.steps=100

Works for every data source that the project reads. Interrupted, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.config import PretrainConfig


def run(config: PretrainConfig) -> None:
    from ims3_ray.pretraining import pretrain

    pretrain(config)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", PretrainConfig, run))
