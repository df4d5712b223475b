"""Sets of images to train on: pixels and, optionally, soft labels (logits) and weights; one shard per class, one content hash
per set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.engine.pool import ImagePool
from ims3_ray.engine.shards import by_class, commit_units, pack_tensors, read_class, read_many
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.files import natural
from ims3_ray.io.storage import Storage
from ims3_ray.training.accuracy import Labelled
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


def read_set(images: Artifact, classes: int | None = None) -> LabelledSet:
    """A committed set, class by class; only its first ``classes`` classes if that is not None."""
    units = sorted((images.manifest() or {})["units"], key=natural)[:classes]
    parts = [load(shard) for _, shard in read_many(images, units, "safetensors")]
    labels = torch.cat([torch.full((len(part["pixels"]),), position) for position, part in enumerate(parts)])
    extras = {name: torch.cat([part[name] for part in parts]) for name in EXTRAS if all(name in part for part in parts)}
    return LabelledSet(torch.cat([part["pixels"] for part in parts]), labels, **extras)


@dataclass(frozen=True)
class RealSplit:
    """Decoded real images. ``units`` holds the units of each class, in order."""

    artifact: Artifact
    units: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, encode: ImagePool, storage: Storage) -> RealSplit:
        units = by_class(encode.units)
        return cls(encode.artifact(storage), tuple(tuple(units[label]) for label in encode.labels))

    def read(self) -> Labelled:
        """uint8 pixels [N, C, H, W] and the positions of their classes [N]."""
        parts = [self.read_class(position) for position in range(len(self.units))]
        return torch.cat(parts), torch.cat([torch.full((len(part),), position) for position, part in enumerate(parts)])

    def read_class(self, position: int) -> Tensor:
        """uint8 pixels of one class."""
        return read_class(self.artifact, self.units[position], "pixels")
