"""The interface of a synthesis method, which makes a set of images from another set or from nothing, part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ims3_ray.component import Component, Registry, Section
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule

Need = Literal["real", "generator", "teacher"]
"""What a method may need: the real training images, the generator that the given images come from, or the classifier that
``evaluation.teacher`` names."""

Part = Sequence[tuple[int, int]]
"""The images that are made together: for each, the position of its class and its number within the class (0 … K−1)."""

Save = Callable[[bytes], object]
"""Stores a state, from which :meth:`Synthesis.make` resumes after an interruption."""


class Denoiser(Protocol):
    """The generator's interface for methods. The latents of a generator without autoencoder are pixels in [−1, 1]."""

    schedule: NoiseSchedule

    def label(self, position: int) -> int:
        """The generator's label of the class at ``position``."""

    def predictor(self, position: int, count: int) -> Predictor:
        """ε_θ for ``count`` latents of the class at ``position``, without guidance, differentiable in the latents."""

    def latents(self, given: Given) -> Tensor:
        """Latents of the given images, float32 [N, C, h, w]: the sampled ones if they were kept, otherwise encoded anew."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents on the device to uint8 pixels on the CPU."""


@dataclass(frozen=True)
class Given:
    """The input of a method for one part, which has N images, in the order of the part."""

    pixels: Tensor
    """Images of the set that the method starts from, uint8 [N, C, H, W]; N is 0 where it starts from nothing."""
    classes: Tensor
    """Position of each image's class, int64 [N]."""
    indices: Tensor
    """Index of each image among the candidates or real images of its class, int64 [N]; it seeds the image's random numbers."""
    num_classes: int
    seed: int
    """Seed of the run."""
    device: str
    real: Callable[[int], Tensor]
    """Position of a class → its real training images, uint8 [M, C, H, W]. The method's needs must include ``real``."""
    generator: Denoiser | None = None
    teacher: Callable[[Tensor], Tensor] | None = None
    """Images in [0, 1] → logits [B, num_classes], differentiable in the images."""


class Synthesis(Component, ABC):
    """A synthesis method. An arm names it by ``synthesise``; its settings are ``synthesis.NAME``."""

    registry = Registry["type[Synthesis]"]("synthesis method", "ims3_ray.synthesis")
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, config: Section | None = None) -> None:
        self.config: Any = config or self.Config()

    @classmethod
    def parts(cls, config: Any, num_classes: int, k: int) -> list[Part]:
        """The parts of a set of ``k`` images per class: by default each class is one part.

        Parts are made independently of each other and in any order. A part is stored only when it is complete.
        """
        return [[(position, number) for number in range(k)] for position in range(num_classes)]

    @classmethod
    @abstractmethod
    def flops(cls, config: Any, forward: Mapping[Need, float]) -> float:
        """Floating-point operations per image, given those of one forward pass of each network that the method needs."""

    @abstractmethod
    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        """Make one part: ``pixels``, uint8 [N, C, H, W], and optionally ``logits`` (soft labels, float [N, num_classes]) and
        ``weights`` (float [N]).

        ``state`` is the last state that an interrupted attempt passed to ``save``; None if there is none.
        """
