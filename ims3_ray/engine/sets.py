"""Sets of images to train on: pixels and, optionally, soft labels (logits) and weights; one shard per class, one content hash
per set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.mapped import joined
from ims3_ray.engine.pool import ImagePool
from ims3_ray.engine.shards import by_class, commit_units, pack_tensors, read_many
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.files import natural
from ims3_ray.io.storage import Storage
from ims3_ray.training.accuracy import Labelled, resident
from ims3_ray.training.students import LabelledSet

EXTRAS = {"logits": torch.float16, "weights": torch.float32}
"""Optional tensors of a shard from which students learn, beside ``pixels`` → their type. The content hash covers them."""


def write_class(artifact: Artifact, unit: str, pixels: Tensor, **more: Tensor) -> dict[str, Any]:
    """Write a class's uint8 images [K, C, H, W]; returns its entry for the manifest.

    ``more`` may hold ``logits`` float16 [K, num_classes] (soft labels), ``weights`` float32 [K], and ``indices`` int64 [K], the
    indices of the images among the candidates.
    """
    more = {name: tensor.cpu().to(EXTRAS.get(name, tensor.dtype)) for name, tensor in more.items()}
    digest = artifact.write(f"{unit}.safetensors", pack_tensors(pixels=pixels, **more))
    content = hashlib.sha256(pixels.numpy().tobytes())
    for name in EXTRAS:
        if name in more:
            content.update(name.encode() + more[name].numpy().tobytes())
    return {"sha256": digest, "images": len(pixels), "content": content.hexdigest()}


def add_to_class(
    start: Artifact, made: Artifact, unit: str, more: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Write a class of the set ``start`` again, with the tensors that ``more`` computes from those of its shard; returns its
    entry for the manifest."""
    tensors = load(start.read(f"{unit}.safetensors"))
    kept = {name: tensor for name, tensor in tensors.items() if name in (*EXTRAS, "indices")}
    return write_class(made, unit, tensors["pixels"], **{**kept, **more(tensors)})


def commit_set(artifact: Artifact, entries: Mapping[str, dict[str, Any]], seconds: float, **extra: Any) -> None:
    """Commit all classes, given in order. The manifest's ``content`` is the hash by which later stages identify the set."""
    content = hashlib.sha256("".join(entry["content"] for entry in entries.values()).encode()).hexdigest()[:16]
    commit_units(artifact, entries, seconds, content=content, **extra)


def read_set(images: Artifact, classes: int | None = None, size: int | None = None) -> LabelledSet:
    """A committed set, class by class; only its first ``classes`` classes if that is not None. Its images are scaled to
    ``size`` if that is given. Those of a large set are mapped from the machine's cache."""
    entries, units = images.units, class_shards(images)[:classes]

    def parts(numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for _, shard in read_many(images, [units[number] for number in numbers], "safetensors"):
            tensors = load(shard)
            extras = {name: tensors[name] for name in EXTRAS if name in tensors}
            yield {"pixels": resident(tensors["pixels"], size or tensors["pixels"].shape[-1]), **extras}

    count, made_of = sum(entries[unit]["images"] for unit in units), [content_of(images), len(units), size]
    (like,) = parts([0])
    found = joined(like, parts, len(units), count, made_of, f"the set in {images.address}")
    return LabelledSet(found["pixels"], found["part"], **{name: found[name] for name in EXTRAS if name in found})


def held_out(val: Artifact, train: Artifact, size: int, keep: float) -> Labelled:
    """The images of ``val`` that are not in the set ``train``, cropped to the share ``keep`` of each side and scaled to
    ``size``. Many of them are mapped from the machine's cache."""
    entries, units = val.units, class_shards(val)

    def parts(numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        known = set[bytes]()
        for _, shard in read_many(train, class_shards(train), "safetensors"):
            known.update(map(_digest, load(shard)["pixels"]))
        for _, shard in read_many(val, [units[number] for number in numbers], "safetensors"):
            pixels = load(shard)["pixels"]
            left = torch.tensor([_digest(image) not in known for image in pixels], dtype=torch.bool)
            yield {"pixels": resident(pixels[left], size, keep)}

    count, made_of = sum(entries[unit]["images"] for unit in units), [content_of(val), content_of(train), size, keep]
    like = {"pixels": resident(load(val.read(f"{units[0]}.safetensors"))["pixels"][:1], size, keep)}
    found = joined(like, parts, len(units), count, made_of, "the held-out images")
    return found["pixels"], found["part"]


def class_shards(images: Artifact) -> list[str]:
    """The units of a committed set, in the order of its classes."""
    return sorted(images.units, key=natural)


def content_of(images: Artifact) -> str:
    """The hash of a committed set's images."""
    return str((images.manifest() or {})["content"])


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class RealSplit:
    """Decoded real images. ``units`` holds the units of each class, in order."""

    store: ImageStore
    units: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, encode: ImagePool, storage: Storage) -> RealSplit:
        units = by_class(encode.units)
        return cls(encode.store(storage), tuple(tuple(units[label]) for label in encode.labels))

    def read(self, size: int | None = None, keep: float = 1.0) -> Labelled:
        """uint8 pixels [N, C, H, W] and the positions of their classes [N], cropped to the share ``keep`` of each side and
        scaled to ``size`` if that is given. Many images are mapped from the machine's cache."""

        def parts(numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
            for number in numbers:
                pixels = self.read_class(number)
                yield {"pixels": resident(pixels, size or pixels.shape[-1], keep)}

        artifact = self.store.artifact
        count = sum(artifact.units[unit]["images"] for units in self.units for unit in units)
        made_of = [artifact.key, self.units, size, keep]
        (like,) = parts([0])
        found = joined(like, parts, len(self.units), count, made_of, f"the images of {artifact.address}")
        return found["pixels"], found["part"]

    def read_class(self, position: int) -> Tensor:
        """uint8 pixels of one class."""
        return self.store.read_units(self.units[position])
