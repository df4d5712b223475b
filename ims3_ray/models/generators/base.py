"""The interface of a generator, a pretrained conditional diffusion model in a weights file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ims3_ray.component import Component, Registry
from ims3_ray.diffusion.prediction import Parametrisation, Predictor, guided
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError


class Generator(Component, ABC):
    """The description of a generator, read from its weights file without the weights. :meth:`load` returns the network.

    A network is called as ``network(z, t, condition)`` with latents [B, C, H, W], integer timesteps [B] and conditions [B, …].
    It returns the quantity that :attr:`parametrisation` names, [B, C, H, W], followed by C channels of variance if it learns
    one. If all samples share timestep and condition, these may be [1] and [1, …].
    """

    registry = Registry["type[Generator]"]("generator family", "ims3_ray.models.generators")
    hub_files: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files that are downloaded for a hub id."""
    path: Path
    schedule: NoiseSchedule
    """The noise schedule that the network was trained with."""
    parametrisation: Parametrisation
    latent: tuple[int, int, int]
    """Shape [C, H, W] of a sample: an autoencoder's latent, or pixels in [−1, 1]."""
    learns_variance: bool
    null: Tensor
    """The null condition of classifier-free guidance, [1, …]."""
    names: tuple[str, ...] = ()
    """Names of the classes that the weights know; empty if they do not name them."""
    knows_null: bool = True
    """Whether the network was trained with the null condition, without which there is no guidance."""
    takes_words: ClassVar[bool] = False
    """Whether the condition is a text, which :meth:`told` gives for each class, instead of a label."""
    trainable: ClassVar[tuple[str, ...]] = ("difffit", "all")
    """The parameters that fine-tuning can train: ``difffit``, ``lora`` or ``all``."""
    any_size: ClassVar[bool] = False
    """Whether images of another size than that of the data are scaled to it; otherwise the sizes must be equal."""

    @property
    def title(self) -> str:
        """Name of the generator in messages."""
        return self.path.name

    @classmethod
    @abstractmethod
    def find(cls, folder: Path) -> Path | None:
        """The weights file in a folder that has the layout of this family; None for any other folder."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Generator:
        """The description of the generator in ``path``. Raises :class:`UserError` for a file that is not of this family."""

    @abstractmethod
    def check(self) -> None:
        """Raises :class:`UserError` naming the first tensor that does not fit the network; reads no weights."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The network with its weights, float32, in evaluation mode."""

    @abstractmethod
    def labels(self, class_names: Sequence[str]) -> list[int]:
        """The label of each class, which units of work and seeds use. Raises :class:`UserError` for an unknown class."""

    def adopting(self, class_names: Sequence[str], like: Mapping[str, str] | None = None) -> Generator:
        """This generator with additional classes, which it does not know yet and may be taught by fine-tuning. ``like`` maps
        some of them to known classes, with whose conditions they begin; the others begin with that of no class.

        Raises :class:`UserError` for a family that takes no further classes, and for a class that is not known.
        """
        raise UserError(f"generator '{self.title}' cannot be taught new classes; use one of the family dit")

    def told(self, class_names: Sequence[str], prompts: Sequence[str], negative: str) -> Generator:
        """This generator with these classes, a prompt for each, and the prompt of its null condition. Raises
        :class:`UserError` for a family that takes no words."""
        raise UserError(f"generator '{self.title}' is told labels, not words; use one of the family stable-diffusion")

    @abstractmethod
    def condition(self, label: int, words: str | None = None) -> Tensor:
        """The condition, [1, …], that the network is given for a class, or for the ``words`` that are to be said of it."""

    def trained_condition(self, label: int, words: str | None = None) -> Tensor:
        """The condition, [1, …], for fine-tuning, of one shape for all words."""
        return self.condition(label, words)

    @property
    def trained_null(self) -> Tensor:
        """The null condition, [1, …], for fine-tuning."""
        return self.null

    def null_beside(self, condition: Tensor) -> Tensor:
        """The null condition, [1, …], in the shape of a ``condition``."""
        return self.null

    @property
    def parts(self) -> Sequence[Path]:
        """The files that the condition and the network depend on."""
        return (self.path,)

    @property
    def brings_autoencoder(self) -> bool:
        """Whether the generator's folder or hub id holds its autoencoder too."""
        return False

    @abstractmethod
    def forward_flops(self) -> float:
        """Floating-point operations (2 per multiply-add) of one forward pass of one sample."""

    @abstractmethod
    def choose_trained(self, network: nn.Module, parameters: str, scaled_blocks: int, rank: int) -> list[str]:
        """Prepare ``network`` for fine-tuning of its ``parameters``, one of :attr:`trainable`: freeze all others, and return
        the names of the trained ones. ``scaled_blocks`` is for ``difffit``, ``rank`` for ``lora``."""

    @property
    def table(self) -> str:
        """Name of the parameter of the network that holds the conditions of the classes; empty if there is none."""
        return ""

    @abstractmethod
    def merge(self, network: nn.Module, adapter: Mapping[str, Tensor]) -> None:
        """Load fine-tuned parameters into a plain ``network``, which then computes the fine-tuned function."""

    @abstractmethod
    def repeated(self, network: nn.Module) -> Iterable[nn.Module]:
        """The blocks that make up the network. They are compiled one by one, which costs only one compilation."""

    def predictor(
        self, network: nn.Module, label: int, count: int = 1, cfg_scale: float = 1.0, cfg_channels: int | None = None,
        *, cfg_interval: tuple[float, float] = (0.0, 1.0), variance: bool = False,
        words: Sequence[str] | None = None,
    ) -> Predictor:  # fmt: skip
        """The predictor of ε for the class with this label, for any number of samples if ``count`` is 1, otherwise for
        ``count`` samples. ``words`` are said of each of these samples in place of the class's prompt; their conditions must
        have one shape.

        The other arguments are those of :func:`ims3_ray.diffusion.prediction.guided`.
        """
        device = next(network.parameters()).device
        told = [self.condition(label, each) for each in words or (None,)]
        condition = torch.cat(told).to(device)
        null = self.null_beside(condition).to(device)
        return guided(
            network, condition.expand(count, *condition.shape[1:]), null, cfg_scale, cfg_channels,
            cfg_interval=cfg_interval, variance=variance, schedule=self.schedule, parametrisation=self.parametrisation,
        )  # fmt: skip


def labels_as_conditions(label: int) -> Tensor:
    """The condition of networks that are given the label of the class, int64 [1]."""
    return torch.tensor([label])
