"""The interface of a synthesis method, which makes a set of images from another set or from nothing, part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from PIL import Image
from torch import Tensor

from ims3_ray.component import Component, Registry, Section, check_known
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.encoder import EncoderConfig
from ims3_ray.models.teacher import TeacherNetwork
from ims3_ray.saving import Save

Need = Literal["real", "originals", "statistics", "generator", "teacher"]
"""What a method may need: the real training images at the size of the data, their files at full size, the mean and standard
deviation of the pixels of some of them (:mod:`ims3_ray.stages.statistics`), the generator that the given images come from, or
the classifier that ``evaluation.teacher`` names."""

Start = Literal["set", "nothing"]
"""What a method may start from: the images that an arm's slots before it give, or no images."""

Part = Sequence[tuple[int, int]]
"""The images that are made together: for each, the position of its class and its number within the class (0 … K−1)."""

Piece = tuple[int, int]
"""A piece of a preparation: the position of a class and a number within the class."""


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


class Originals(Protocol):
    """The files of the real training images, at their own sizes."""

    def count(self, position: int) -> int:
        """Number of images of the class at ``position``."""

    def image(self, position: int, index: int) -> Image.Image:
        """Image ``index`` of a class, decoded to grey or RGB as the data have it; raises
        :class:`~ims3_ray.data.decoding.Undecodable` for one that cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a method may use beside the set that it starts from. A member that is not among the method's needs is None."""

    num_classes: int
    seed: int
    """Seed of the run."""
    device: str
    size: int
    """Height and width of the images of the set, in pixels."""
    channels: int
    counts: Sequence[int]
    """Number of real training images of each class, including those that cannot be decoded."""
    real: Callable[[int], Tensor]
    """Position of a class → its real training images, uint8 [M, C, H, W]. The method's needs must include ``real``."""
    originals: Originals | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation of the real training pixels in [0, 1], float32 [C, 1, 1] each, on the device."""
    teacher: TeacherNetwork | None = None


@dataclass(frozen=True, kw_only=True)
class Given(Inputs):
    """The input of a method for one part, which has N images, in the order of the part."""

    pixels: Tensor
    """Images of the set that the method starts from, uint8 [N, C, H, W]; N is 0 where it starts from nothing."""
    classes: Tensor
    """Position of each image's class, int64 [N]."""
    indices: Tensor
    """Index of each image among the candidates or real images of its class, int64 [N]; it seeds the image's random numbers."""
    prepared: Callable[[Piece], Mapping[str, Tensor]]
    """Piece of the preparation → what :meth:`Synthesis.prepare` returned for it."""
    generator: Denoiser | None = None


@dataclass(frozen=True)
class Costs:
    """What the cost of a method depends on beside its settings."""

    forward: Mapping[Need, float]
    """Floating-point operations of a forward pass of one image, for the networks among the method's needs."""
    counts: Sequence[int]
    """Number of real training images of each class."""
    k: int
    """K, the number of images per class in the set."""
    size: int
    channels: int
    teacher: EncoderConfig | None = None
    """Architecture of the teacher, if it is among the method's needs."""


class Synthesis(Component, ABC):
    """A synthesis method. An arm names it by ``synthesise``; its settings are ``synthesis.NAME``.

    A method may have a preparation: computations that depend on the real images and not on the set, so that sets of all sizes
    and starts share them. It is made in pieces, before the set.
    """

    registry = Registry["type[Synthesis]"]("synthesis method", "ims3_ray.synthesis")
    version: ClassVar[int] = 1
    """Version of the output. It is raised when the output changes for the same input."""
    starts: ClassVar[frozenset[Start]] = frozenset({"set", "nothing"})
    """What the method can start from."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What :meth:`make` needs."""
    preparation_needs: ClassVar[frozenset[Need]] = frozenset()
    """What :meth:`prepare` needs; not the generator."""
    pieces_at_once: ClassVar[int] = 1
    """Number of pieces of the preparation in one task: more than one where a piece takes seconds."""
    prepared_by: ClassVar[frozenset[str]] = frozenset()
    """Names of the settings on which the preparation depends."""

    def __init_subclass__(cls) -> None:
        check_known(cls, "starts", Start)
        check_known(cls, "needs", Need)
        check_known(cls, "preparation_needs", Need)
        super().__init_subclass__()

    def __init__(self, config: Section | None = None) -> None:
        self.config: Any = config or self.Config()

    @classmethod
    def parts(cls, config: Any, num_classes: int, k: int) -> list[Part]:
        """The parts of a set of ``k`` images per class: by default each class is one part.

        Parts are made independently of each other and in any order. A part is stored only when it is complete.
        """
        return [[(position, number) for number in range(k)] for position in range(num_classes)]

    @classmethod
    def pieces(cls, config: Any, counts: Sequence[int]) -> list[Piece]:
        """The pieces of the preparation for classes of so many real images: by default none. Pieces are made independently."""
        return []

    @classmethod
    @abstractmethod
    def flops(cls, config: Any, costs: Costs) -> float:
        """Floating-point operations of making a set, without the preparation."""

    @classmethod
    def preparation_flops(cls, config: Any, costs: Costs) -> float:
        """Floating-point operations of all pieces of the preparation."""
        return 0.0

    @classmethod
    def preparation_bytes(cls, config: Any, costs: Costs) -> float:
        """Number of bytes of all pieces of the preparation."""
        return 0.0

    @classmethod
    def check(cls, config: Any, costs: Costs) -> None:
        """Raises :class:`ims3_ray.errors.UserError` if the settings do not fit the images, the set or the teacher."""

    def prepare(self, piece: Piece, inputs: Inputs) -> Mapping[str, Tensor]:
        """Make one piece of the preparation: named tensors."""
        raise ValueError(f"synthesis method '{self.name}' names pieces of a preparation; give it a method prepare()")

    @abstractmethod
    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        """Make one part: ``pixels``, uint8 [N, C, H, W], and optionally ``logits`` (soft labels, float [N, num_classes]) and
        ``weights`` (float [N]), on any device.

        ``state`` is the last state that an interrupted attempt passed to ``save``; None if there is none.
        """
