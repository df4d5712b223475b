"""Training of a network for a number of epochs, with AdamW and a learning rate of one cycle: the code of one worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ims3_ray.data.batches import batch_indices, weight_of_part
from ims3_ray.seeds import seed_for
from ims3_ray.training.divergence import check_losses

Wrap = Callable[[nn.Module], nn.Module]
"""Prepares a network for several workers (DistributedDataParallel)."""


class EpochTraining(Protocol):
    """The settings that all trainings by epochs have."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


S = TypeVar("S", bound=EpochTraining)


class EpochTrainer(ABC, Generic[S]):
    """A network in training and its optimizer. The worker takes the ``rank``-th of ``world`` parts of each global batch."""

    setting: ClassVar[str]
    """The setting to lower if the training diverges."""

    def __init__(
        self, config: S, network: nn.Module, labels: Tensor, seed: int, device: torch.device | str, rank: int,
        world: int, wrap: Wrap | None,
    ) -> None:  # fmt: skip
        """``network.forward`` is what the loss is computed from, in one call per step; ``labels`` are those of all images."""
        self.labels, self.seed, self.device, self.rank, self.world = labels, seed, torch.device(device), rank, world
        self.config = config
        self.wrapped = wrap(network) if wrap is not None else network.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.wrapped.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.steps_per_epoch = -(-len(labels) // config.batch_size)
        self.decay = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.lr, total_steps=config.epochs * self.steps_per_epoch
        )
        self.losses: list[float] = []
        """The loss of every step so far."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network whose values are stored."""

    @abstractmethod
    def loss(self, index: Tensor) -> Tensor:
        """The loss of the next step on the images at ``index``."""

    @abstractmethod
    def weights(self) -> bytes:
        """The network as a weights file in half precision."""

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.losses)

    def epochs(self) -> Iterator[int]:
        """Train to the end; after each epoch, yield the number of epochs done. Raises :class:`Diverged` after an epoch with a
        loss that is not finite."""
        batches = batch_indices(
            len(self.labels), self.config.batch_size, self.rank, self.world, self.seed, first_step=self.steps
        )
        self.wrapped.train()
        while self.steps < self.config.epochs * self.steps_per_epoch:
            if self.steps % self.steps_per_epoch == 0:  # what dropout draws does not depend on interruptions
                torch.manual_seed(seed_for(self.seed, "epoch", self.steps, self.rank))
            self._step(next(batches))
            if self.steps % self.steps_per_epoch == 0:
                recent = self.losses[-self.steps_per_epoch :]
                check_losses(recent, self.steps - len(recent) + 1, self.setting, self.device)
                yield self.steps // self.steps_per_epoch

    def _step(self, index: Tensor) -> None:
        loss = self.loss(index)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * weight_of_part(self.config.batch_size, self.rank, self.world)).backward()
        self.optimizer.step()
        self.decay.step()
        self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        """Everything that is needed to resume the training exactly."""
        return {"model": self.trained.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, possibly by a training of fewer epochs: the learning rate then goes on as in a
        training of this trainer's number of epochs."""
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.decay.load_state_dict({"last_epoch": self.steps - 1, "_step_count": self.steps})
        self.decay.step()
