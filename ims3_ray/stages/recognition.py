"""The check of a pool's first samples: a generator whose samples φ does not recognise gives sets that are worth nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load
from torch import Tensor

from ims3_ray.config import RecognitionConfig
from ims3_ray.engine.pool import DerivedStage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.selection.recognition import recognised

MOST_CLASSES = 20
"""Number of classes whose first units are looked at; of more classes, these are evenly spaced."""


LEAST_REAL = 4
"""The fewest real images of a class with which its samples are compared; half of them make the mean."""


def looked_at(count: int) -> list[int]:
    """Positions of the classes, of ``count``, that are looked at."""
    return [count * number // min(count, MOST_CLASSES) for number in range(min(count, MOST_CLASSES))]


@dataclass(frozen=True)
class Recognition:
    """Shares of images, by class, that φ assigns to their class, by the nearest mean of real images."""

    samples: dict[str, float]
    real: dict[str, float]

    @classmethod
    def of(cls, pool: DerivedStage, real: DerivedStage, names: tuple[str, ...], storage: Storage) -> Recognition | None:
        """Compare the first embedded unit of some classes of a pool with that of the real images, of which every other image
        makes the means and the others are recognised. None if fewer than two of these classes have enough real images."""
        found = {}
        for position in looked_at(len(names)):
            drawn, images = _features(pool, position, storage), _features(real, position, storage)
            if len(drawn) and len(images) >= LEAST_REAL:
                found[names[position]] = drawn, images
        if len(found) < 2:
            return None
        references = [images[::2] for _, images in found.values()]
        samples = recognised([drawn for drawn, _ in found.values()], references)
        held_out = recognised([images[1::2] for _, images in found.values()], references)
        return cls(dict(zip(found, samples, strict=True)), dict(zip(found, held_out, strict=True)))

    @property
    def relative(self) -> float:
        """The share of recognised samples as a share of that of real images."""
        return _mean(self.samples) / max(_mean(self.real), 1e-9)

    @property
    def plain(self) -> dict[str, Any]:
        """The shares as values for JSON."""
        return {"samples": self.samples, "real": self.real}

    def check(self, title: str, quality: RecognitionConfig) -> None:
        """Raises :class:`UserError` for samples that are recognised too seldom, or prints a line, as ``quality`` says."""
        if self.relative >= quality.warn_below and self.relative >= quality.stop_below:
            return
        what = (
            f"{title}: φ recognises {_mean(self.samples):.0%} of the samples and {_mean(self.real):.0%} of real images "
            f"(chance: {1 / len(self.samples):.0%}), so sets of these samples will train worse classifiers than real images "
            "do; train the generator longer, let a generator of similar images adopt the classes, or use arms without a "
            "generator (docs/own-images.md)"
        )
        if self.relative < quality.stop_below:
            raise UserError(f"{what}; quality.stop_below={quality.stop_below:g} ends the run here, and with 0 it goes on")
        print(f"note: {what}", flush=True)


def _mean(shares: dict[str, float]) -> float:
    return statistics.fmean(shares.values())


def _features(stage: DerivedStage, position: int, storage: Storage) -> Tensor:
    unit = stage.units_of_class(position)[0]
    return load(stage.artifact(storage).read(f"{unit}.safetensors"))["features"]
