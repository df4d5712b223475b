"""The command `ims3 pack`: a labelled image set, or a part of it, as Parquet in the Hub's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ims3_ray.config import DataConfig, Section
from ims3_ray.config.work import Split
from ims3_ray.data.classes import chosen_labels
from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import Source, check_apart, open_source
from ims3_ray.data.sources.folder import check_classes_are_no_splits
from ims3_ray.data.sources.location import Location
from ims3_ray.errors import UserError
from ims3_ray.io.files import drafted, new_file
from ims3_ray.io.parquet import EXTRAS, encode_png, image_table, parquet_bytes


class PackConfig(Section):
    """What `ims3 pack` reads and writes. Images are written as the source has them, so that settings of their size and colour
    have no effect."""

    replaced: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f"data.{key}" for key in ("size", "channels", "background", "prompts", "captions", "unit_size", "keep")), ""
    )
    data: DataConfig = DataConfig()
    split: str = "train"
    """Split of the data to read."""
    per_class: int | None = Field(default=None, ge=1)
    """Number of images per class, drawn at random; all images when unset."""
    seed: int = 0
    """Seed of the random choice."""
    out: str = "packed.parquet"
    """Parquet file to write. Its name ends in `.parquet`."""


def _opened(config: PackConfig) -> Source:
    """The images of the split. Raises :class:`UserError` for a split that has training images without being the training split,
    and for folders of splits that would be read as classes."""
    data, split = config.data, _split_of(config)
    source = open_source(data.path, config.split, data.limit) if split is None else open_source(*data.place(split))
    for notice in source.notices:
        print(f"note: {notice}", flush=True)
    check_classes_are_no_splits(source, data.path)
    if split != "train" and data.test_share is None and (train := _training_images(data)) is not None:
        check_apart(train, source, data.test_path or data.path, config.split)
    return source


def _split_of(config: PackConfig) -> Split | None:
    """Which of a run's two splits is meant: the one of this name or, if the data have no split that is called so, the one that
    `train` and `test` stand for. None for another split."""
    data = config.data
    names: dict[str, Split] = {data.test_split: "test", data.train_split: "train"}
    meant: dict[str, Split] = {"test": "test", "train": "train"}
    elsewhere = data.test_share is not None or (config.split == "test" and data.test_path is not None)
    if config.split in names or config.split not in meant:
        return names.get(config.split)
    return meant[config.split] if elsewhere or config.split not in Location(data.path, config.split).splits else None


def _training_images(data: DataConfig) -> Source | None:
    """The training split; None, which a note says, if it cannot be read, as where there is none."""
    try:
        return open_source(*data.place("train"))
    except UserError as error:
        print(f"note: that the images are no copy of the training split was not checked: {error}", flush=True)
        return None


def pack(config: PackConfig) -> None:
    """Write the packed images. Raises :class:`UserError` for a class with too few, and for a file that exists."""
    if not config.out.endswith(".parquet"):
        raise UserError(f"out='{config.out}' is no name of a Parquet file; end it in .parquet")
    out = new_file(config.out)
    source = _opened(config)
    labels = chosen_labels(source.class_names, config.data.classes)
    parts = [np.flatnonzero(source.labels == label) for label in labels]
    if config.per_class is not None:
        rng = np.random.default_rng(config.seed)
        parts = [rng.permutation(part)[: config.per_class] for part in parts]
        if short := [source.class_names[c] for c, part in zip(labels, parts, strict=True) if len(part) < config.per_class]:
            raise UserError(f"class '{short[0]}' has fewer than per_class={config.per_class} images; lower per_class")
    numbers, rows = {label: number for number, label in enumerate(labels)}, []
    chosen = np.sort(np.concatenate(parts)).tolist()
    for i in chosen:
        try:
            rows.append((encode_png(source.image(i)), f"{i:05d}.png", numbers[int(source.labels[i])]))
        except Undecodable as error:
            raise UserError(f"'{source.identify(i)}' cannot be decoded ({error}); replace or remove it") from error
    extras = _extras(source, chosen, labels)
    with drafted(out) as draft:
        draft.write_bytes(parquet_bytes(image_table(rows, [source.class_names[label] for label in labels], extras)))
    with_what = f" with {' and '.join(EXTRAS[name] for name in extras)}" if extras else ""
    print(f"{out}: {len(rows)} images{with_what}, {out.stat().st_size / 1e6:.1f} MB")


def _extras(source: Source, indices: Sequence[int], labels: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """The soft labels and weights of a set's images. Raises :class:`UserError` if soft labels are to be packed of some of the
    set's classes, since students of a part would be told of classes that they do not have."""
    extras = source.extras(indices)
    if "logits" in extras and list(labels) != list(range(len(source.class_names))):
        raise UserError(
            f"'{source.location}' has soft labels of all its classes; pack all of them, in their order (without data.classes)"
        )
    return extras
