"""Images of many shards as one tensor, which all processes of a machine share if it is large."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ims3_ray.io.node_cache import cached

MAPPED_ABOVE = 2**28
"""Size in bytes; images that take more are mapped from the machine's cache, others are held in memory."""

Parts = Callable[[Sequence[int]], Iterable[Mapping[str, Tensor]]]
"""Numbers of parts → their tensors, one part after another: ``pixels`` uint8 [n, C, H, W], and perhaps others of n rows."""


def joined(parts: Parts, count: int, images: int, made_of: object, what: str) -> dict[str, Tensor]:
    """The tensors of ``count`` parts, joined: ``pixels`` [N, C, H, W], ``part`` int64 [N], the number of each image's part, and
    those others that all parts have.

    ``images`` is the number N, or more. If the images take more than :data:`MAPPED_ABOVE` bytes, the first process of a machine
    that asks for them writes them to the cache (:mod:`ims3_ray.io.node_cache`), part by part, and all processes map the file.
    ``made_of`` holds plain values that differ for different images; ``what`` names the images in error messages.
    """
    (first,) = parts([0])
    shape = first["pixels"].shape[1:]
    if images * shape.numel() <= MAPPED_ABOVE:
        found = [first, *parts(range(1, count))]
        return {"pixels": torch.cat([part["pixels"] for part in found]), **_rows(found)}

    def write(folder: Path) -> None:
        folder.mkdir()
        rows = []
        with Path(folder, PIXELS).open("wb") as file:
            for part in parts(range(count)):
                file.write(part["pixels"].contiguous().numpy().data)
                rows.append({**part, "pixels": torch.empty(len(part["pixels"]), 0)})
        save_file(_rows(rows), folder / ROWS)

    name = f"images-{hashlib.sha256(json.dumps([made_of, *shape]).encode()).hexdigest()[:16]}"
    folder = cached(name, write, images * shape.numel(), what)
    rows = load_file(folder / ROWS)
    number = len(rows["part"])
    pixels = torch.from_file(str(folder / PIXELS), size=number * shape.numel(), dtype=torch.uint8)
    return {"pixels": pixels.reshape(number, *shape), **rows}


PIXELS, ROWS = "pixels", "rows.safetensors"


def _rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts beside their pixels, joined, with the number of each image's part."""
    names = [name for name in parts[0] if name != "pixels" and all(name in part for part in parts)]
    counts = torch.tensor([len(part["pixels"]) for part in parts])
    return {
        "part": torch.arange(len(parts)).repeat_interleave(counts),
        **{name: torch.cat([part[name] for part in parts]) for name in names},
    }
