"""The command `ims3 pack`: a labelled image set, or a part of it, as Parquet in the Hub's layout."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ims3_ray.config import DataConfig, Section
from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io.files import new_file
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes


class PackConfig(Section):
    """What `ims3 pack` reads and writes."""

    data: DataConfig = DataConfig()
    split: str = "train"
    """Split of the data to read."""
    per_class: int | None = Field(default=None, ge=1)
    """Number of images per class, drawn at random; all images when unset."""
    seed: int = 0
    """Seed of the random choice."""
    out: str = "packed.parquet"
    """Parquet file to write."""


def pack(config: PackConfig) -> None:
    """Write the packed images. Raises :class:`UserError` for a class with too few, and for a file that exists."""
    out = new_file(config.out)
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
    rows = []
    for i in chosen.tolist():
        try:
            rows.append((encode_png(source.image(i)), f"{i:05d}.png", int(source.labels[i])))
        except Undecodable as error:
            raise UserError(f"'{source.identify(i)}' cannot be decoded ({error}); replace or remove it") from error
    out.write_bytes(parquet_bytes(image_table(rows, source.class_names)))
    print(f"{out}: {len(rows)} images, {out.stat().st_size / 1e6:.1f} MB")
