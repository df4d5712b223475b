"""Pack a labelled image set, or a part of it, as Parquet in the Hub's layout. The embedded data were made in this way:

python jobs/pack.py data.path=/usr/share/datasets/fashion-mnist split=train per_class=1000 out=train.parquet
python jobs/pack.py data.path=/usr/share/datasets/fashion-mnist split=test out=test.parquet
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydantic import Field

from ims3_ray.cli import main
from ims3_ray.config import DataConfig, Section
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes


class PackConfig(Section):
    data: DataConfig = DataConfig()
    split: str = "train"
    per_class: int | None = Field(default=None, ge=1)
    """Number of images per class, drawn at random; all images when unset."""
    seed: int = 0
    out: str = "packed.parquet"


def run(config: PackConfig) -> None:
    source = open_source(config.data.path, config.split)
    chosen = np.arange(len(source.labels))
    if config.per_class is not None:
        rng = np.random.default_rng(config.seed)
        parts = [
            rng.permutation(np.flatnonzero(source.labels == c))[: config.per_class] for c in range(len(source.class_names))
        ]
        if short := [source.class_names[c] for c, part in enumerate(parts) if len(part) < config.per_class]:
            raise UserError(f"class '{short[0]}' has fewer than per_class={config.per_class} images; lower per_class")
        chosen = np.sort(np.concatenate(parts))
    rows = [(encode_png(source.image(int(i))), f"{i:05d}.png", int(source.labels[i])) for i in chosen]
    out = Path(config.out)
    out.write_bytes(parquet_bytes(image_table(rows, source.class_names)))
    print(f"{out}: {len(rows)} images, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", PackConfig, run))
