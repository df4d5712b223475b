"""Pretraining of a class-conditional DiT on images or latents in memory: the code of one worker.

:func:`ims3_ray.engine.loops.generator_loop` runs it on Ray Train, ``benchmarks/gpu.py`` on a machine without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ims3_ray.config.base import canonical
from ims3_ray.config.candidates import SamplingConfig
from ims3_ray.config.pretrain import GeneratorTraining
from ims3_ray.data.batches import batch_indices, weight_of_part
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.transforms import to_uint8
from ims3_ray.diffusion.prediction import target_of
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.ema import Ema
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.objectives.diffusion import diffusion_loss, drop_conditions, min_snr_weight
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.training.capture import Captured
from ims3_ray.training.divergence import check_losses
from ims3_ray.training.pace import Pace
from ims3_ray.training.precision import precision_on

FETCH_EVERY = 10
"""Number of steps between two reads of the losses from the device; a read makes the host wait."""
PREVIEW_CLASSES, PREVIEW_IMAGES = 20, 5
"""Largest number of classes on a sheet of samples during training, and the number of samples of each."""


def dit_config(
    training: GeneratorTraining, size: int, channels: int, num_classes: int, latents: bool = False
) -> DiTConfig:  # fmt: skip
    """The shape of the DiT that ``training`` asks for, for images or latents of ``channels`` × ``size`` × ``size``."""
    return DiTConfig(
        input_size=size, in_channels=channels, patch_size=training.patch_side(size, latents), hidden_size=training.hidden_size,
        depth=training.depth, num_heads=training.num_heads, num_classes=num_classes, prediction=training.prediction,
        null_row=training.label_dropout > 0,
    )  # fmt: skip


def in_bf16(config: GeneratorTraining, device: torch.device) -> bool:
    """Whether a training computes in bfloat16 on a device; by default if the device does not have to imitate it."""
    return precision_on(config.precision, device.type) == "bf16"


def packed(network: DiT, class_names: Sequence[str], **about: str) -> bytes:
    """A DiT as a weights file in half precision; ``about`` is added to its metadata."""
    return pack(network, canonical(network.config), "dit", torch.float16, classes="\n".join(class_names), **about)


class GeneratorTrainer:
    """A DiT in training, its optimizer and the moving average (EMA) that becomes the weights file.

    ``images`` are kept on ``device``; ``pixels`` maps clean images [n, C, H, W] to uint8 pixels, for latents by their
    autoencoder. The worker takes the ``rank``-th of ``world`` parts of each global batch. ``wrap`` prepares the model for
    several workers (DistributedDataParallel).
    """

    def __init__(
        self, config: GeneratorTraining, images: CleanImages, num_classes: int, seed: int,
        device: torch.device | str = "cpu", rank: int = 0, world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] | None = None, pixels: Callable[[Tensor], Tensor] = to_uint8,
    ) -> None:  # fmt: skip
        self.config, self.seed, self.device, self.rank, self.world = config, seed, torch.device(device), rank, world
        self.images, self.pixels = images.to(self.device), pixels
        self._weight = weight_of_part(config.batch_size, rank, world)
        torch.manual_seed(seed)
        shape = dit_config(config, images.shape[-1], images.shape[0], num_classes, latents="pixels" not in images.tensors)
        self.model = DiT(shape).to(self.device)
        if config.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.wrapped = wrap(self.model) if wrap is not None else self.model
        captured = config.compile and self.device.type == "cuda" and wrap is None
        self._captured = captured
        self._update = Captured(self._updated) if captured else self._updated
        lr = torch.tensor(config.lr, device=self.device) if captured else config.lr
        self._pace: dict[str, Any] = {"lr": lr, "capturable": captured}
        """Options of the optimizer that a stored state does not replace; a captured step reads its learning rate from a
        tensor."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0, fused=True, **self._pace)
        self.ema = Ema(self.model.named_parameters(), config.ema_decay)
        self.schedule = NoiseSchedule()
        half = in_bf16(config, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()
        self.steps_before = 0
        """Number of steps of an earlier training of which only the weights are known."""
        self.losses: list[float] = []
        """Loss of every step since then that was read from the device; all are finite."""
        self._unread: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self.steps_before + len(self.losses) + len(self._unread)

    def run(self, pace: Pace) -> Iterator[int]:
        """Take steps until ``pace`` ends; after each, yield the number of steps. ``losses`` is complete at the end."""
        batches = batch_indices(
            len(self.images.labels), self.config.batch_size, self.rank, self.world, self.seed, first_step=self.steps
        )
        while (factor := pace.factor(self.steps)) is not None:
            self._step(next(batches).to(self.device, non_blocking=True), self.config.lr * factor)
            if self.steps % FETCH_EVERY == 0:
                self.read_losses()
            yield self.steps
        self.read_losses()

    def _step(self, index: Tensor, lr: float) -> None:
        g, count = self.config, len(index)
        rng = torch.Generator(self.device).manual_seed(seed_for(self.seed, "generator", self.steps, self.rank))
        z0 = self.images.batch(index, rng)
        noise = torch.randn(z0.shape, generator=rng, device=self.device)
        t = torch.randint(self.schedule.num_steps, (count,), generator=rng, device=self.device)
        y = drop_conditions(self.images.labels[index], self.model.config.null_label, g.label_dropout, rng)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._unread.append(self._update(z0, noise, t, y))
        self.ema.update(self.model.named_parameters())

    def _updated(self, z0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Change the parameters by one step on a batch; return its loss."""
        kind, gamma = self.config.prediction, self.config.min_snr
        weight = None if gamma is None else min_snr_weight(t, self.schedule, gamma, kind)
        with self.autocast:
            predicted = self.wrapped(self.schedule.add_noise(z0, noise, t), t, y)
            loss = diffusion_loss(predicted, target_of(z0, noise, t, self.schedule, kind), weight)
        (loss * self._weight).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def read_losses(self) -> None:
        """Fetch the losses of the last steps. Raises :class:`Diverged` naming the first step whose loss is not finite."""
        if not self._unread:
            return
        found = torch.stack(self._unread).tolist()
        self._unread.clear()
        check_losses(found, self.steps + 1, "generator.lr", self.device)
        self.losses += found

    def state(self) -> dict[str, Any]:
        """Everything that is needed to resume the training exactly, except the elapsed seconds."""
        self.read_losses()
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema.state(),
            "steps_before": self.steps_before, "losses": self.losses,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(self._pace)
        if self._captured:  # the optimizer's state has new tensors, which an earlier graph does not know
            self._update = Captured(self._updated)
        self.ema.restore(state["ema"])
        self.steps_before, self.losses = state["steps_before"], list(state["losses"])

    def start_from(self, weights: dict[str, Tensor], steps: int) -> None:
        """Continue from the averaged weights of an earlier training of ``steps`` steps, with a new optimizer.

        Used where the full training state is too large to keep: it has eight times the size of the weights file.
        ``benchmarks/recipe.py`` measures the effect on the loss. Raises :class:`UserError` for weights of another shape.
        """
        wanted = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        if wanted != {name: tuple(value.shape) for name, value in weights.items()}:
            raise UserError("the earlier weights are of another shape than the recipe's; give another folder, or that recipe")
        self.model.load_state_dict({**self.model.state_dict(), **weights})
        for name, parameter in self.model.named_parameters():
            self.ema.average[name].copy_(parameter.detach())
        self.steps_before = steps

    def weights(self, class_names: Sequence[str], **about: str) -> bytes:
        """The moving average as a weights file in half precision; ``about`` is added to its metadata."""
        return packed(self._averaged(), class_names, **about)

    def _averaged(self) -> DiT:
        """The model with the moving averages of its parameters, on the CPU, in evaluation mode."""
        model = DiT(self.model.config)
        model.load_state_dict({**model.state_dict(), **{name: value.cpu() for name, value in self.ema.average.items()}})
        return model.eval()

    @torch.inference_mode()
    def preview(self, sampling: SamplingConfig) -> Tensor:
        """Samples of the moving average, uint8 [N, C, H, W]: ``PREVIEW_IMAGES`` of each of the first classes. They start from
        the same noise at any step of the training."""
        network = self._averaged().to(self.device)
        generator, sampler = DiTGenerator.of_shape(network.config), Sampler.registry[sampling.sampler]
        found = []
        for label in range(min(network.config.num_classes, PREVIEW_CLASSES)):
            predict = generator.predictor(network, label, 1, sampling.cfg_scale, cfg_interval=sampling.cfg_interval)
            rngs = [generator_for(self.seed, "preview", label, index) for index in range(PREVIEW_IMAGES)]
            found.append(
                sample(
                    predict, generator.latent, rngs, self.schedule, sampling.steps, sampler=sampler(sampling.of(sampler)),
                    clip=sampling.clip, device=self.device,
                )
            )  # fmt: skip
        return self.pixels(torch.cat(found)).cpu()
