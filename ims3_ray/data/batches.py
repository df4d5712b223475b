"""Images in memory and endless, seeded batches of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ims3_ray.data.sources import ImageSource
from ims3_ray.data.transforms import to_pixels
from ims3_ray.seeds import generator_for

MOST_THREADS = 16
"""Threads that decode images, one for each CPU at most."""


def load_pixels(source: ImageSource, size: int, channels: int) -> tuple[Tensor, Tensor, list[str]]:
    """All images that decode: uint8 ``[N, C, H, W]``, labels int64 ``[N]``, and the names of those that do not."""

    def decoded(index: int) -> NDArray[np.uint8] | None:
        try:
            return to_pixels(source.image(index), size, channels)
        except OSError:
            return None

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        images = list(pool.map(decoded, range(len(source.labels))))
    whole = [index for index, image in enumerate(images) if image is not None]
    pixels = [image for image in images if image is not None]
    stacked = np.stack(pixels) if pixels else np.zeros((0, channels, size, size), np.uint8)
    broken = [source.identify(index) for index, image in enumerate(images) if image is None]
    return torch.from_numpy(stacked), torch.from_numpy(source.labels[whole].astype(np.int64)), broken


def batch_indices(count: int, batch_size: int, rank: int, world: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """This rank's part of each global batch, for ever, from step ``first_step`` on.

    Every epoch is a fresh permutation that depends on (seed, epoch) alone, so a restarted worker continues with
    the very batches it would have seen. Batches run over epoch borders; all of a rank's have the same size.
    """
    first, end = batch_size * rank // world, batch_size * (rank + 1) // world
    step = first_step
    permutations: dict[int, Tensor] = {}

    def at(epoch: int) -> Tensor:
        if epoch not in permutations:
            permutations.clear()
            permutations[epoch] = torch.randperm(count, generator=generator_for(seed, "epoch", epoch))
        return permutations[epoch]

    while True:
        position, stop, parts = step * batch_size + first, step * batch_size + end, []
        while position < stop:
            epoch, offset = divmod(position, count)
            parts.append(at(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        yield torch.cat(parts)
        step += 1
