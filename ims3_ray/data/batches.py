"""Images in memory and endless, seeded batches of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ims3_ray.data.sources import ImageSource
from ims3_ray.data.transforms import to_pixels
from ims3_ray.seeds import generator_for


def load_pixels(source: ImageSource, size: int, channels: int) -> tuple[Tensor, Tensor, list[str]]:
    """All images that decode: uint8 ``[N, C, H, W]``, labels int64 ``[N]``, and the names of those that do not."""
    pixels, labels, broken = [], [], []
    for index, label in enumerate(source.labels):
        try:
            pixels.append(to_pixels(source.image(index), size, channels))
            labels.append(int(label))
        except OSError:
            broken.append(source.identify(index))
    stacked = np.stack(pixels) if pixels else np.zeros((0, channels, size, size), np.uint8)
    return torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64), broken


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
