"""Trainings whose length is a number of epochs."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.pretraining.base import Loop, Target
from ims3_ray.training.epochs import EpochTraining


class EpochTarget(Target):
    """A training by epochs, with the settings of :attr:`section`."""

    lengths = ("epochs",)
    loop_name: ClassVar[str]
    """The loop of :mod:`ims3_ray.engine.loops` that trains it."""

    @property
    def training(self) -> EpochTraining:
        """The settings of the training."""
        found: EpochTraining = getattr(self.config, self.section)
        return found

    @property
    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of a forward pass of an image."""

    @property
    def batch_size(self) -> int:
        return self.training.batch_size

    @property
    def total(self) -> tuple[float, str]:
        return float(self.training.epochs * -(-self.images // self.batch_size)), "steps"

    def length(self, rate: float) -> tuple[str, float]:
        epochs = self.training.epochs
        return f"{epochs} epochs", 3 * self.flops * epochs * self.images

    def loop(self, config: PretrainConfig) -> tuple[Loop, dict[str, Any]]:
        from ims3_ray.engine import loops  # Ray Train takes a second to import

        return getattr(loops, self.loop_name), {
            "training": canonical(getattr(config, self.section)), "images": partial(loops.source_images, config.data),
            "seed": config.seed, "threads": config.trainer.threads_per_worker,
        }  # fmt: skip
