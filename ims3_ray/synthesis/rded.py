"""RDED (Sun et al. 2024, arXiv 2312.03526): mosaics of the crops of real images that a teacher finds most realistic.

The preparation draws some crops of each image from its file at full size and keeps the one that the teacher recognises best,
with its loss. It does not depend on the number of images per class. A set takes the crops of the least loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Generator, Tensor
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.data.augment import crop_boxes, padded
from ims3_ray.data.decoding import Undecodable
from ims3_ray.errors import UserError
from ims3_ray.saving import Save
from ims3_ray.seeds import generator_for
from ims3_ray.synthesis.base import Costs, Given, Inputs, Piece, Synthesis
from ims3_ray.synthesis.pixels import as_jpeg, image_tensor

IMAGES_PER_PIECE = 50
"""Number of real images whose crops are one piece of the preparation."""


def crops_of(image: Image.Image, size: int, count: int, scale: tuple[float, float], rng: Generator) -> Tensor:
    """Random square boxes of an RGB or grey image, scaled (bilinear, antialiased) to uint8 [count, C, size, size].

    Each is torchvision's RandomResizedCrop with a ratio of 1: the box has a share of the image's area between ``scale``.
    """
    boxes = crop_boxes(count, image.height, image.width, scale, rng, ratio=(1.0, 1.0)).tolist()
    parts = [image.crop((left, top, left + w, top + h)) for top, left, h, w in boxes]
    return torch.stack([image_tensor(part.resize((size, size), Image.Resampling.BILINEAR)) for part in parts])


def mosaics(ranked: Tensor, factor: int, size: int) -> Tensor:
    """n·factor² crops in the order of their loss, uint8 [n·factor², C, s, s] → n images [n, C, size, size].

    The crop at row i and column j of image m has rank ``m + (i·factor + j)·n``, so every image has a share of the best.
    """
    n = len(ranked) // factor**2
    edges = _edges(size, factor)
    whole = ranked.new_zeros(n, ranked.shape[1], size, size)
    for place in range(factor**2):
        i, j = divmod(place, factor)
        (top, bottom), (left, right) = edges[i], edges[j]
        part = ranked[place * n : (place + 1) * n].float()
        whole[:, :, top:bottom, left:right] = F.interpolate(part, (bottom - top, right - left)).to(torch.uint8)
    return whole


def _edges(size: int, factor: int) -> list[tuple[int, int]]:
    """First and end pixel of each part of a side; the first parts are one pixel longer where the side is not divisible."""
    lengths = [size // factor + (number < size % factor) for number in range(factor)]
    ends = torch.tensor(lengths).cumsum(dim=0).tolist()
    return [(end - length, end) for length, end in zip(lengths, ends, strict=True)]


class RDED(Synthesis):
    """Mosaics of the crops with the least cross-entropy of the teacher."""

    name = "rded"
    starts = frozenset({"nothing"})
    pieces_at_once = 20
    preparation_needs = frozenset({"originals", "teacher"})
    prepared_by = frozenset({"images_per_class", "crops", "crop", "factor"})

    class Config(Section):
        """RDED: mosaics of the crops of real images that the teacher recognises best."""

        factor: int = Field(default=2, ge=1)
        """Number of crops per side of a mosaic (2, or 1 for images of 32 and 64 pixels)."""
        images_per_class: int = Field(default=300, ge=1)
        """Number of real images of each class, drawn at random, from which crops are taken."""
        crops: int = Field(default=5, ge=1)
        """Number of crops of each image, of which the teacher chooses one."""
        crop: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of an image's area in a crop, above 0 and up to 1."""
        jpeg: int | None = Field(default=75, ge=1, le=100)
        """Quality of the JPEG compression that the published sets have; no compression when unset."""

        @model_validator(mode="after")
        def _area(self) -> RDED.Config:
            if not 0 < self.crop[0] <= self.crop[1] <= 1:
                raise ValueError(f"crop=[{self.crop[0]:g}, {self.crop[1]:g}] is no range of areas above 0 and up to 1")
            return self

    config: Config

    @classmethod
    def pieces(cls, config: Config, counts: Sequence[int]) -> list[Piece]:
        taken = [min(count, config.images_per_class) for count in counts]
        return [(position, n) for position, count in enumerate(taken) for n in range(-(-count // IMAGES_PER_PIECE))]

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        return 0.0

    @classmethod
    def preparation_flops(cls, config: Config, costs: Costs) -> float:
        images = sum(min(count, config.images_per_class) for count in costs.counts)
        return images * config.crops * costs.forward["teacher"]

    @classmethod
    def preparation_bytes(cls, config: Config, costs: Costs) -> float:
        images = sum(min(count, config.images_per_class) for count in costs.counts)
        return float(images * costs.channels * (costs.size // config.factor) ** 2)

    @classmethod
    def check(cls, config: Config, costs: Costs) -> None:
        if config.factor > costs.size:
            raise UserError(f"synthesis.rded.factor={config.factor} is more than the {costs.size} pixels of an image; lower it")
        _check_count(config, costs.k, min(costs.counts))

    @torch.no_grad()
    def prepare(self, piece: Piece, inputs: Inputs) -> Mapping[str, Tensor]:
        """``crops`` uint8 [n, C, s, s], the best crop of each image that can be decoded, and ``losses`` float32 [n]."""
        c, (position, number) = self.config, piece
        originals, side, crops, losses = inputs.originals, inputs.size // self.config.factor, [], []
        assert originals is not None
        drawn = torch.randperm(originals.count(position), generator=generator_for(inputs.seed, "rded", position))
        chosen = drawn[: c.images_per_class][number * IMAGES_PER_PIECE : (number + 1) * IMAGES_PER_PIECE]
        for index in chosen.tolist():
            try:
                image = originals.image(position, index)
            except Undecodable:
                continue  # the encoded split names and counts the images that cannot be decoded
            found = crops_of(image, side, c.crops, c.crop, generator_for(inputs.seed, "rded-crops", position, index))
            loss = self._losses(found, position, inputs)
            crops.append(found[loss.argmin()])
            losses.append(loss.min())
        shape = (0, inputs.channels, side, side)
        return {
            "crops": torch.stack(crops) if crops else torch.zeros(shape, dtype=torch.uint8),
            "losses": torch.stack(losses) if losses else torch.zeros(0),
        }

    def _losses(self, crops: Tensor, position: int, inputs: Inputs) -> Tensor:
        """Cross-entropy of the teacher for each crop, padded with the teacher's mean colour to the size of an image."""
        teacher = inputs.teacher
        assert teacher is not None
        images = padded(crops.to(inputs.device).float() / 255 - teacher.mean, inputs.size) + teacher.mean
        labels = torch.full((len(images),), position, device=images.device)
        return F.cross_entropy(teacher(images), labels, reduction="none").cpu()

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        c, position, k = self.config, int(given.classes[0]), len(given.classes)
        pieces = [given.prepared(piece) for piece in self.pieces(c, given.counts) if piece[0] == position]
        crops, losses = (torch.cat([piece[name] for piece in pieces]) for name in ("crops", "losses"))
        _check_count(c, k, len(crops))
        best = losses.argsort(stable=True)[: k * c.factor**2]
        made = mosaics(crops[best], c.factor, given.size)
        return {"pixels": made if c.jpeg is None else as_jpeg(made, c.jpeg)}


def _check_count(config: RDED.Config, k: int, count: int) -> None:
    """Raises :class:`UserError` if a class of ``count`` real images has too few for a set of ``k`` mosaics."""
    taken, wanted = min(count, config.images_per_class), k * config.factor**2
    if taken < wanted:
        raise UserError(
            f"{k} mosaics of {config.factor}×{config.factor} images take {wanted} real images of a class, and there are "
            f"{taken} (of {count}, synthesis.rded.images_per_class={config.images_per_class}); lower synthesis.rded.factor or "
            "selection.images_per_class, or raise synthesis.rded.images_per_class if the class has more"
        )
