"""Training of a timm network as a classifier, for φ or for a teacher: the code of one worker.

:func:`ims3_ray.engine.loops.encoder_loop` runs it on Ray Train; without Ray it needs only PyTorch and timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.config import EncoderTraining, canonical
from ims3_ray.data.augment import Scale, augment
from ims3_ray.data.batches import batch_indices
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.training.divergence import check_losses

Images = tuple[Tensor, Tensor, tuple[str, ...]]
"""uint8 pixels [N, C, H, W], positions of their classes [N], and the names of the classes."""


class Classifier(nn.Module):
    """φ with its classification head as ``forward``, which is the method that DistributedDataParallel supports."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder.logits(x_BCHW)


def encoder_config(training: EncoderTraining, pixels: Tensor, num_classes: int) -> EncoderConfig:
    """The network that ``training`` asks for, with the mean and standard deviation of the ``pixels``, scaled to [−1, 1]."""
    counts = sum(part.flatten().bincount(minlength=256) for part in pixels.split(1000))
    values = to_signed(torch.arange(256, dtype=torch.uint8)).double()
    shares = counts / pixels.numel()  # from the histogram, to avoid a copy of all images in floats
    mean = (shares * values).sum().item()
    std = (shares * (values - mean).square()).sum().sqrt().item()
    return EncoderConfig(
        model=training.model, model_args=training.model_args, channels=pixels.shape[1], num_classes=num_classes,
        mean=round(mean, 4), std=round(std, 4),
    )  # fmt: skip


class EncoderTrainer:
    """A network in training and its optimizer. The worker takes the ``rank``-th of ``world`` parts of each global batch.

    ``wrap`` prepares the model for several workers (DistributedDataParallel).
    """

    def __init__(
        self, config: EncoderTraining, images: Images, seed: int, device: torch.device | str = "cpu", rank: int = 0,
        world: int = 1, wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.seed, self.device, self.rank, self.world = config, seed, torch.device(device), rank, world
        self.pixels, self.labels, self.names = images
        torch.manual_seed(seed_for(seed, "encoder-init"))
        self.encoder = Encoder(encoder_config(config, self.pixels, len(self.names)))
        classifier = Classifier(self.encoder)
        self.wrapped = wrap(classifier) if wrap is not None else classifier.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.wrapped.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.steps_per_epoch = -(-len(self.labels) // config.batch_size)
        self.decay = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.lr, total_steps=config.epochs * self.steps_per_epoch
        )
        self.losses: list[float] = []
        """The loss of every step so far."""
        shape = self.encoder.config
        mean, std = (torch.tensor(value).reshape(-1, 1, 1).to(self.device) for value in (shape.mean, shape.std))
        self.scale = Scale((mean + 1) / 2, std / 2)  # of pixels in [0, 1]

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
            self._step(next(batches))
            if self.steps % self.steps_per_epoch == 0:
                recent = self.losses[-self.steps_per_epoch :]
                setting = "the learning rate (encoder.lr, evaluation.teacher.training.lr)"
                check_losses(recent, self.steps - len(recent) + 1, setting, self.device)
                yield self.steps // self.steps_per_epoch

    def _step(self, index: Tensor) -> None:
        e = self.config
        rng = torch.Generator(self.device).manual_seed(seed_for(self.seed, "encoder", self.steps, self.rank))
        cpu_rng = generator_for(self.seed, "encoder-choices", self.steps, self.rank)
        images = self.pixels[index].to(self.device).float() / 255
        batch = augment(images, self.pixels.shape[-1], rng, cpu_rng=cpu_rng, scale=self.scale, **dict(e.augment))
        labels = self.labels[index].to(self.device)
        loss = F.cross_entropy(self.wrapped(2 * batch - 1), labels, label_smoothing=e.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.decay.step()
        self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        """Everything that is needed to resume the training exactly."""
        return {
            "model": self.encoder.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, possibly by a training of fewer epochs: the learning rate then goes on as in a
        training of this trainer's number of epochs."""
        self.encoder.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.decay.load_state_dict({"last_epoch": self.steps - 1, "_step_count": self.steps})
        self.decay.step()

    def weights(self) -> bytes:
        """The network as a weights file in half precision."""
        return pack(self.encoder, canonical(self.encoder.config), "encoder", torch.float16, classes="\n".join(self.names))
