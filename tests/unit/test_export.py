"""What the folder of a distilled set holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image

from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.io.storage import Storage
from ims3_ray.stages.export import unpack


def test_nothing_stays_of_an_earlier_set(tmp_path: Path):
    storage = Storage.at(str(tmp_path))
    context = cast(Context, SimpleNamespace(storage=storage))

    def exported(key: str, names: list[str], units: tuple[str, ...]) -> Stage:
        artifact, found = Artifact(storage, "export", key * 16), dict[str, Any]()
        for unit in units:
            rows = [
                (encode_png(Image.fromarray(np.zeros((4, 4), np.uint8))), f"{name}/{unit}.png", label)
                for label, name in enumerate(names)
            ]
            digest = artifact.write(f"{unit}.parquet", parquet_bytes(image_table(rows, names)))
            found[unit] = {"sha256": digest, "images": len(rows)}
        commit_units(artifact, found, 1.0)
        return cast(Stage, SimpleNamespace(artifact=lambda _: artifact, units=units))

    folder = tmp_path / "run" / "distilled"
    unpack(context, exported("a", ["cat", "dog"], ("train-00000-of-00002", "train-00001-of-00002")), "run/distilled")
    (folder / "README.md").write_text("a card")
    unpack(context, exported("b", ["cat", "eel"], ("train-00000-of-00001",)), "run/distilled")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "README.md", "data", "data/train-00000-of-00001.parquet", "images", "images/cat",
        "images/cat/train-00000-of-00001.png", "images/eel", "images/eel/train-00000-of-00001.png",
    ]  # fmt: skip
