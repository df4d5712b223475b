"""The interface of a steering: it moves the samples of a class by what was computed from the class's real images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ims3_ray.component import Component, Registry

Shards = Callable[[int], Sequence[Mapping[str, Tensor]]]
"""Label of a class → the tensors that the stage named by :attr:`Steering.source` has stored for each unit of the class."""

REMEMBERED = 64
"""Number of classes, or of groups of K samples, whose results a steering keeps in its cache."""


class Steering(Component, ABC):
    """Sets the start of sampling or guides its steps. Its settings are ``sampling.NAME`` in a config."""

    registry = Registry["type[Steering]"]("steering of sampling", "ims3_ray.diffusion.steering")
    version: ClassVar[int] = 1
    """Version of the samples that it leads to; it is raised when they change for the same settings."""
    source: ClassVar[str]
    """Kind of the stage that computes from the real images what the steering needs."""
    option: ClassVar[str]
    """The option that samplers must take (:attr:`ims3_ray.diffusion.samplers.base.Sampler.takes`)."""
    switch: ClassVar[str]
    """Name of the setting that turns the steering on; its value 0 turns it off."""
    least_steps: ClassVar[int] = 1
    """The fewest sampling steps with which the steering can work."""

    def __init__(self, config: Any, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        """``k`` is the number of images per class in a set, ``seed`` the run's seed, ``steps`` the number of sampling steps."""
        self.config, self.k, self.seed, self.steps, self.shards, self.device = config, k, seed, steps, shards, device

    @classmethod
    def is_on(cls, config: Any) -> bool:
        """Whether the steering is turned on."""
        return bool(getattr(config, cls.switch))

    @classmethod
    def share(cls, config: Any) -> float:
        """Share of the sampling steps that remain after the start."""
        return 1.0

    @classmethod
    def says_captions(cls, config: Any) -> bool:
        """Whether the generator is told captions, and so must be one that takes words."""
        return False

    @classmethod
    @abstractmethod
    def title(cls, config: Any, k: int) -> str:
        """Description of the samples for titles."""

    @abstractmethod
    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        """Options of :func:`ims3_ray.diffusion.samplers.base.sample` for the samples ``indices`` of a class."""

    def words(self, label: int, indices: Sequence[int]) -> list[str] | None:
        """What a generator that takes words is told for each of the samples ``indices`` of a class; None if that is the
        prompt of the class."""
        return None
