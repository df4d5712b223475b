"""Images in memory and endless, seeded batches of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import Source
from ims3_ray.data.transforms import WHITE, Colour, to_pixels
from ims3_ray.seeds import generator_for

T = TypeVar("T")

MOST_THREADS = 16
"""Largest number of threads that decode images; there is at most one for each CPU."""
TRIED = 8
"""Number of images whose decoding is timed before threads are started."""
SMALL_IMAGE_S = 0.001
"""Images that take less than this many seconds each are decoded by one thread. Most of this time is spent in Python, where
threads only wait for each other."""


def load_pixels(
    source: Source, size: int, channels: int, classes: Sequence[str] | None = None, background: Colour = WHITE
) -> tuple[Tensor, Tensor, list[str]]:  # fmt: skip
    """All images of the ``classes`` (all when None) that can be decoded, uint8 ``[N, C, H, W]``; their labels, int64 ``[N]``,
    which are positions in ``classes``; and the names of the images that cannot be decoded."""
    names = source.class_names if classes is None else classes
    positions = np.full(len(source.class_names), -1)
    positions[[source.class_names.index(name) for name in names]] = np.arange(len(names))
    wanted = np.flatnonzero(positions[source.labels] >= 0)

    def decoded(index: int) -> NDArray[np.uint8] | None:
        try:
            return to_pixels(source.image(index), size, channels, background=background)
        except Undecodable:
            return None

    images = in_threads(decoded, wanted.tolist(), min(MOST_THREADS, os.cpu_count() or 1))
    whole = [int(index) for index, image in zip(wanted, images, strict=True) if image is not None]
    pixels = [image for image in images if image is not None]
    stacked = np.stack(pixels) if pixels else np.zeros((0, channels, size, size), np.uint8)
    broken = [source.identify(int(index)) for index, image in zip(wanted, images, strict=True) if image is None]
    return torch.from_numpy(stacked), torch.from_numpy(positions[source.labels[whole]].astype(np.int64)), broken


def in_threads(decode: Callable[[int], T], indices: Sequence[int], threads: int) -> list[T]:
    """``decode(index)`` for all ``indices``, in order, by at most so many threads; by one if the images are small."""
    began = time.perf_counter()
    found = [decode(index) for index in indices[:TRIED]]
    if threads == 1 or time.perf_counter() - began < SMALL_IMAGE_S * len(found):
        return found + [decode(index) for index in indices[TRIED:]]
    with ThreadPoolExecutor(threads) as pool:
        return found + list(pool.map(decode, indices[TRIED:]))


def part_of_batch(batch_size: int, rank: int, world: int) -> range:
    """The positions within each global batch that a worker computes."""
    return range(batch_size * rank // world, batch_size * (rank + 1) // world)


def weight_of_part(batch_size: int, rank: int, world: int) -> float:
    """What a worker's mean loss is multiplied by, so that the mean of the workers' gradients weighs all images of the global
    batch equally: 1 if all parts have the same size."""
    return len(part_of_batch(batch_size, rank, world)) * world / batch_size


def batch_indices(count: int, batch_size: int, rank: int, world: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Yield this rank's part of each global batch, without end, from step ``first_step`` on.

    Every epoch is a new permutation that depends only on (seed, epoch), so a worker that is restarted continues with the same
    batches. Batches continue across the borders of epochs; all batches of a rank have the same size.
    """
    part, step = part_of_batch(batch_size, rank, world), first_step
    permutations: dict[int, Tensor] = {}

    def at(epoch: int) -> Tensor:
        if epoch not in permutations:
            permutations.clear()
            permutations[epoch] = torch.randperm(count, generator=generator_for(seed, "epoch", epoch))
        return permutations[epoch]

    while True:
        position, stop, parts = step * batch_size + part.start, step * batch_size + part.stop, []
        while position < stop:
            epoch, offset = divmod(position, count)
            parts.append(at(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        yield torch.cat(parts)
        step += 1
