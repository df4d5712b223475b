"""How one kind of weights is trained: its length, its cost, what the workers run, and how the result is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ims3_ray.config import PretrainConfig
from ims3_ray.engine.weights import Weights
from ims3_ray.pretraining.quality import Quality, Splits

Loop = Callable[[dict[str, Any]], dict[str, Any]]
"""What each worker of Ray Train runs; rank 0 returns the weights, the losses and the seconds."""


@dataclass(frozen=True)
class Target(ABC):
    """The training of one kind of weights on one data set."""

    name: ClassVar[str]
    """Its name, `target` in the config."""
    section: ClassVar[str]
    """The section of its settings in the config."""
    lengths: ClassVar[tuple[str, ...]]
    """Keys of the section that say how long to train. A training goes on when the number is raised."""

    config: PretrainConfig
    classes: int
    """Number of classes of the data."""
    images: int
    """Number of training images."""
    weights: Mapping[str, Weights] = field(default_factory=dict)
    """Weights that the training uses, by their name in the config, as they were when it was planned."""

    @abstractmethod
    def check(self) -> None:
        """Raises :class:`UserError` for settings that do not fit the data."""

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @property
    @abstractmethod
    def total(self) -> tuple[float, str]:
        """Length of the training, and its unit."""

    @property
    @abstractmethod
    def network(self) -> str:
        """The network, in words."""

    @abstractmethod
    def length(self, rate: float) -> tuple[str, float]:
        """How long the training is, as text and in floating-point operations, at ``rate`` FLOP/s of all workers."""

    @property
    @abstractmethod
    def judging(self) -> str:
        """What judges the weights, in words."""

    @property
    def judging_flops(self) -> float:
        """Floating-point operations of the judgement."""
        return 0.0

    @abstractmethod
    def loop(self, config: PretrainConfig) -> tuple[Loop, dict[str, Any]]:
        """What the workers run, with its arguments but for ``board``; ``config`` is the target's, with absolute paths."""

    @abstractmethod
    def judge(self, weights: Path, splits: Splits, device: str) -> Quality:
        """The quality of the trained weights. The test split is used for nothing else."""

    @abstractmethod
    def untrained(self, names: Sequence[str]) -> bytes:
        """A weights file of random values, for plans; ``names`` are those of the classes."""
