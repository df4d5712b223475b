"""Decodes a split of the real images to scaled and cropped pixels, which are stored once for all later stages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ims3_ray.config import DataConfig
from ims3_ray.config.work import Split
from ims3_ray.data.batches import in_threads
from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import Source
from ims3_ray.data.transforms import Filter, is_transparent, to_pixels
from ims3_ray.engine.images import ImageStore, Produced, Producer
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.pool import ImagePool
from ims3_ray.engine.shards import by_class, parse_unit, units_of
from ims3_ray.engine.stage import Context
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.storage import Storage

KEPT_BYTES = 5e10
"""Decoded images of a split that take more than this are not stored unless the config says so."""
DECODE_S_PER_VALUE = 4e-8
"""Seconds that a core takes to decode one value (one channel of one pixel) of a scaled image: some 8 ms for a photograph at
256 pixels."""


@dataclass(eq=False)
class Encode(ImagePool):
    """Decodes real images. Each unit holds ``data.unit_size`` images of one class, in the order of the source."""

    name = "encode"

    data: DataConfig = field(default_factory=DataConfig)
    needed: int = 1
    """Images that every class must have once they are decoded."""
    filter: Filter = "area"

    @classmethod
    def plan(cls, planner: Planner, split: Split, data: DataConfig, needed: int = 1, filter: Filter = "area") -> Encode:
        """Plan to decode ``split`` at the size of ``data``, scaled by ``filter`` (see :func:`to_pixels`). Every class must have
        ``needed`` images that can be decoded."""
        source = planner.data.train if split == "train" else planner.data.test
        units: list[str] = []
        images = 0
        labels = tuple(map(source.class_names.index, planner.classes.names))
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        for label in labels:
            images += int(counts[label])
            units += units_of(label, int(counts[label]), data.unit_size)
        params = {
            **planner.data.params(split), "split": data.place(split)[1], "size": data.size, "channels": data.channels,
            "unit_size": data.unit_size, **({} if filter == "area" else {"filter": filter}), **data.background_params,
            **({} if labels == planner.classes.source_labels else {"labels": labels}),
        }  # fmt: skip
        at = "" if data.size == planner.work.data.size and filter == "area" else f" at {data.size} pixels"
        found = planner.add(
            cls(
                f"encode {split} images{at}", params, units=tuple(units), images=images, label=split, data=data,
                labels=labels, unit_size=data.unit_size, filter=filter, data_source=source,
            )
        )  # fmt: skip
        found.needed, found.stored = max(found.needed, needed), found.pixel_bytes if found.keeps else 0.0
        return found

    @property
    def batch(self) -> Hashable:
        return "real images"

    @property
    def pixel_bytes(self) -> float:
        """Bytes of the decoded images."""
        return float(self.images * self.data.channels * self.data.size**2)

    @property
    def keeps(self) -> bool:
        return self.pixel_bytes <= KEPT_BYTES if self.data.keep is None else self.data.keep

    def seconds_beside_flops(self) -> float:
        return self.pixel_bytes * DECODE_S_PER_VALUE

    def store(self, storage: Storage) -> ImageStore:
        again = partial(RealImages, self.data, self.opened, self.filter)
        return ImageStore(self.artifact(storage), "pixels", again=again)

    def producer(self, context: Context) -> Callable[[str], Producer]:
        threads = max(1, int(context.config.actors.cpus))
        return partial(_real_images, self.data, self.opened, self.filter, threads)

    def counts(self, storage: Storage) -> Mapping[str, int]:
        """Number of decoded images in each unit, without broken ones."""
        entries = (self.manifest(storage) or {})["units"]
        return {unit: entries[unit]["images"] for unit in self.units}

    def check(self, context: Context) -> None:
        """Say how many images are transparent. Raises :class:`UserError` for a class of which too few images could be
        decoded."""
        units = (self.manifest(context.storage) or {})["units"]
        if count := sum(units[unit].get("transparent", 0) for unit in self.units):
            print(
                f"note: {count} of {self.images} {self.label} images have transparent pixels; they are laid on "
                f"{self.data.background} (data.background)",
                flush=True,
            )
        decoded = dict.fromkeys(self.labels, 0)
        broken: dict[int, list[str]] = {label: [] for label in self.labels}  # "name: reason"
        for unit in self.units:
            decoded[parse_unit(unit)[0]] += units[unit]["images"]
            broken[parse_unit(unit)[0]] += units[unit]["broken"]
        for name, label in zip(context.classes.names, self.labels, strict=True):
            if decoded[label] < self.needed:
                count = len(broken[label])
                others = f"{count} cannot, as {broken[label][0]}" if count else "none cannot"
                raise UserError(
                    f"class '{name}' has {decoded[label]} {self.label} images that can be decoded ({others}), fewer than "
                    f"{self.needed}; replace these files or leave the class out with data.classes"
                )


def decoded_indices(encode: Encode, storage: Storage) -> dict[int, list[int]]:
    """Source label of each class → the positions in the source of its images that could be decoded, in their order."""
    source = encode.opened
    entries, units = (encode.manifest(storage) or {})["units"], by_class(encode.units)

    def decoded(label: int) -> list[int]:
        mine = np.flatnonzero(source.labels == label).tolist()
        broken = [line for unit in units[label] for line in entries[unit]["broken"]]  # "name: reason"
        if not broken:
            return mine
        return [index for index in mine if not any(line.startswith(f"{source.identify(index)}: ") for line in broken)]

    return {label: decoded(label) for label in encode.labels}


class RealImages:
    """Decodes a data source. Unit u of a class is its images u·unit_size … in the source's order."""

    on_host = True

    def __init__(self, data: DataConfig, source: Source, filter: Filter, threads: int = 1) -> None:
        self.data, self.source, self.filter, self.threads = data, source, filter, threads

    def at(self, unit: str, offsets: Sequence[int]) -> Tensor:
        """uint8 pixels of the images at ``offsets`` of a unit of which no image is broken. Raises
        :class:`Undecodable` if one is broken by now."""
        pixels = []
        for index in self._indices(unit)[list(offsets)].tolist():
            if isinstance(found := self._decoded(index), Undecodable):
                raise found
            pixels.append(found[0])
        return torch.from_numpy(np.stack(pixels))

    def _indices(self, unit: str) -> NDArray[np.int64]:
        (label, number), size = parse_unit(unit), self.data.unit_size
        return np.flatnonzero(self.source.labels == label)[number * size : (number + 1) * size]

    def __call__(self, unit: str) -> Produced:
        indices = self._indices(unit)
        pixels, names, broken, transparent = [], [], [], 0
        decoded = in_threads(self._decoded, indices.tolist(), self.threads)
        for index, found in zip(indices.tolist(), decoded, strict=True):
            name = self.source.identify(index)
            if isinstance(found, Undecodable):
                broken.append(f"{name}: {first_line(found)}")
            else:
                pixels.append(found[0])
                transparent += found[1]
                names.append(name)
        empty = np.zeros((0, self.data.channels, self.data.size, self.data.size), np.uint8)
        return Produced(torch.from_numpy(np.stack(pixels) if pixels else empty), names, broken, transparent=transparent)

    def _decoded(self, index: int) -> tuple[NDArray[np.uint8], bool] | Undecodable:
        """The pixels of an image, and whether it is transparent; the error if it cannot be decoded."""
        try:
            image = self.source.image(index)
            pixels = to_pixels(image, self.data.size, self.data.channels, self.filter, self.data.colour)
            return pixels, is_transparent(image)
        except Undecodable as error:
            return error


def _real_images(data: DataConfig, source: Source, filter: Filter, threads: int, device: str) -> RealImages:
    return RealImages(data, source, filter, threads)
