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


def joined(
    like: Mapping[str, Tensor], parts: Parts, count: int, images: int, made_of: object, what: str
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of ``count`` parts, joined: ``pixels`` [N, C, H, W], ``part`` int64 [N], the number of each image's part, and
    those others that all parts have.

    ``like`` are the tensors of some part, of which only the names, the types and the shape of an image are used. ``images`` is
    the number N, or more. If the images take more than :data:`MAPPED_ABOVE` bytes, the first process of a machine that asks for
    them writes them to the cache (:mod:`ims3_ray.io.node_cache`), part by part, and all processes map the file. ``made_of``
    holds plain values that differ for different images; ``what`` names the images in error messages.
    """
    shape, others = like["pixels"].shape[1:], [name for name in like if name != "pixels"]
    if images * shape.numel() <= MAPPED_ABOVE:
        found = list(parts(range(count)))
        shared = [name for name in others if all(name in part for part in found)]
        return {
            "part": _numbers([len(part["pixels"]) for part in found]),
            **{name: torch.cat([part[name] for part in found]) for name in ("pixels", *shared)},
        }

    def write(folder: Path) -> None:
        """Write the images part by part. Nothing that PyTorch allocates is kept from one part to the next: it would lie between
        large freed blocks and keep the allocator from reusing them, so that the process would grow with each part."""
        folder.mkdir()
        counts, kept = list[int](), {name: bytearray() for name in others}
        with Path(folder, PIXELS).open("wb") as file:
            for part in parts(range(count)):
                file.write(part["pixels"].contiguous().numpy().data)
                counts.append(len(part["pixels"]))
                kept = {name: values for name, values in kept.items() if name in part}
                for name, values in kept.items():
                    values += part[name].contiguous().numpy().tobytes()
        rows = {
            name: torch.frombuffer(values, dtype=like[name].dtype).reshape(-1, *like[name].shape[1:])
            for name, values in kept.items()
        }
        save_file({"part": _numbers(counts), **rows}, folder / ROWS)

    name = f"images-{hashlib.sha256(json.dumps([VERSION, made_of, *shape]).encode()).hexdigest()[:16]}"
    folder = cached(name, write, images * shape.numel(), what)
    rows = load_file(folder / ROWS)
    number = len(rows["part"])
    pixels = torch.from_file(str(folder / PIXELS), size=number * shape.numel(), dtype=torch.uint8)
    return {"pixels": pixels.reshape(number, *shape), **rows}


PIXELS, ROWS = "pixels", "rows.safetensors"
VERSION = 1
"""Version of the code that scales and crops the images of the cache. It is raised when it makes others of the same files."""


def _numbers(counts: Sequence[int]) -> Tensor:
    """The number of its part for each image, int64 [N]; ``counts`` says how many images each part has."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
