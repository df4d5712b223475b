"""Fine-tuning of a generator by weighted objectives (section 4.1, Algorithm 1): the code of one worker.

:mod:`ims3_ray.stages.finetune` runs it on Ray Train with DeepSpeed ZeRO (:mod:`ims3_ray.stages.zero`); a single worker needs
neither of them, only PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Generator, Tensor, nn

from ims3_ray.config import FinetuneConfig, canonical
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.errors import Diverged
from ims3_ray.models.checkpoints import first_not_finite
from ims3_ray.models.ema import Ema
from ims3_ray.models.generators.base import Generator as PretrainedGenerator
from ims3_ray.objectives.base import TrainingStep, add_up
from ims3_ray.objectives.diffusion import drop_conditions
from ims3_ray.training.precision import precision_on

Row = dict[str, float]
"""Values of one step: loss, loss_TERM for each unweighted term, and grad_norm; stored rows also hold the number of the step."""


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch. The first dimension of each tensor is the number of images."""

    z0: Tensor
    y_B: Tensor
    dropped_B: Tensor
    t_B: Tensor
    noise: Tensor
    labels_B: Tensor

    def pieces(self, count: int) -> Iterator[Batch]:
        """Split the batch into ``count`` parts, none of them empty if it has at least ``count`` images."""
        tensors = (self.z0, self.y_B, self.dropped_B, self.t_B, self.noise, self.labels_B)
        yield from (Batch(*parts) for parts in zip(*(t.tensor_split(count) for t in tensors), strict=True))


def choose_trained(generator: PretrainedGenerator, model: nn.Module, config: FinetuneConfig) -> list[str]:
    """Freeze the parameters that are not trained and cast them to ``config.precision``; return the names of the others."""
    names = generator.choose_trained(model, config.parameters, config.scaled_blocks, config.rank)
    if precision_on(config.precision, next(model.parameters()).device.type) == "bf16":
        model.compute_dtype = torch.bfloat16  # type: ignore[assignment]
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return names


class Engine(Protocol):
    """Turns losses into optimizer steps."""

    module: nn.Module
    """The model as it must be called, including any hooks of the engine."""

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradient of a piece's mean ``loss``; the piece holds this ``share`` of the images of the global batch."""

    def step(self) -> Tensor | float | None:
        """Called after each piece. After the last piece of a batch it updates the weights and returns the gradient norm."""

    def gathered(self) -> AbstractContextManager[Any]:
        """A context within which every worker holds the trained parameters in full."""

    def save(self, folder: Path) -> None:
        """Write this worker's part of the trained parameters and of the optimizer's state."""

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote."""


Trained = Sequence[tuple[str, nn.Parameter]]
"""The trained parameters with their names."""
BuildEngine = Callable[[nn.Module, torch.optim.Optimizer, Trained, FinetuneConfig, int], Engine]
"""(model, optimizer, trained parameters, config, number of workers) → engine."""


def gradient_norm(trained: Trained) -> Tensor:
    """ℓ2 norm of the gradient over all trained parameters that have one."""
    return torch.nn.utils.get_total_norm([p.grad for _, p in trained if p.grad is not None])


class TorchEngine:
    """An engine that uses PyTorch alone, for one worker."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, trained: Trained, config: FinetuneConfig, world: int
    ) -> None:  # fmt: skip
        if world != 1:
            raise ValueError(f"this engine is for one worker, not {world}; several need ims3_ray.stages.zero")
        self.module, self.optimizer, self.trained, self.pieces = model, optimizer, trained, config.accumulate
        self._taken = 0

    def backward(self, loss: Tensor, share: float) -> None:
        (loss * share).backward()

    def step(self) -> Tensor | None:
        self._taken += 1
        if self._taken % self.pieces:
            return None
        norm = gradient_norm(self.trained)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        values = {name: parameter.detach() for name, parameter in self.trained}
        torch.save({"trained": values, "optimizer": self.optimizer.state_dict()}, folder / "engine.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.trained:
            parameter.copy_(state["trained"][name])


class Finetuner:
    """One worker of a fine-tuning: the generator's network, the engine, the objectives and, on rank 0, the moving average
    (EMA) that becomes the adapter."""

    def __init__(
        self, model: nn.Module, generator: PretrainedGenerator, config: FinetuneConfig, device: torch.device | str,
        rank: int = 0, world: int = 1, build_engine: BuildEngine = TorchEngine,
    ) -> None:  # fmt: skip
        self.config, self.device, self.rank, self.world = config, torch.device(device), rank, world
        self.generator, self.schedule, self.objectives = generator, generator.schedule, config.objectives.made()
        names = set(choose_trained(generator, model.to(device), config))
        self.trained = [(n, p) for n, p in model.named_parameters() if n in names]
        averaged = self.trained if rank == 0 else []
        self.ema = Ema(averaged, config.ema_decay, config.ema_warmup)  # before ZeRO-3 partitions the parameters
        model.recompute = config.activation_checkpointing  # type: ignore[assignment]
        if config.compile:
            for block in generator.repeated(model):
                block.compile(dynamic=False)
        optimizer = torch.optim.AdamW(
            _groups(self.trained, generator.table, config), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.engine = build_engine(model, optimizer, self.trained, config, world)

    def draw(self, images: CleanImages, index: Tensor, rng: Generator) -> Batch:
        """This worker's part of the global batch of images ``index``.

        Every worker draws random numbers for the whole batch and takes its part of them, so that the number of workers
        changes nothing but rounding.
        """
        size = self.config.batch_size
        mine = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        noise = torch.randn((size, *images.shape), generator=rng)
        t = torch.randint(self.schedule.num_steps, (size,), generator=rng)
        labels = images.labels[index]
        conditions = self.conditions_of(labels, images.captions_of(index))
        dropped = drop_conditions(conditions, self.generator.trained_null, self.config.label_dropout, rng)
        z0 = images.batch(index, rng)
        return Batch(*(tensor[mine].to(self.device) for tensor in (z0, conditions, dropped, t, noise, labels)))

    def conditions_of(self, labels: Tensor, captions: Sequence[str | None]) -> Tensor:
        """The condition that the model is given for each image, by its label or, if it has one, by its caption, [B, …]."""
        told = zip(labels.tolist(), captions, strict=True)
        return torch.cat([self.generator.trained_condition(label, caption) for label, caption in told])

    def step(self, batch: Batch) -> Row:
        """Take one optimizer step; the losses of the returned row are means over the global batch.

        If a value is not finite, the moving average is not updated but the weights are already corrupted: the caller has to
        stop.
        """
        sums, norm = dict[str, Tensor](), None
        for piece in batch.pieces(self.config.accumulate):
            forward = TrainingStep(
                self.engine.module, self.schedule, piece.z0, piece.y_B, piece.dropped_B, piece.t_B, piece.noise,
                output_is_needed=any(objective.needs_output for objective in self.objectives),
                parametrisation=self.generator.parametrisation, labels_B=piece.labels_B,
            )  # fmt: skip
            losses = add_up(self.objectives, forward)
            share = len(piece.y_B) / self.config.batch_size
            self.engine.backward(losses.total, share)
            found = {"loss": losses.total, **{f"loss_{name}": loss for name, loss in losses.terms.items()}}
            for name, loss in found.items():
                sums[name] = sums.get(name, torch.zeros_like(loss, dtype=torch.float32)) + share * loss.detach()
            norm = self.engine.step()
        values = torch.stack(list(sums.values()))
        if dist.is_initialized():
            dist.all_reduce(values)
        assert norm is not None, "the batch has as many pieces as the engine expects"
        row = dict(zip([*sums, "grad_norm"], [*values.tolist(), float(norm)], strict=True))
        if all(map(math.isfinite, row.values())):
            self._average()
        return row

    def _average(self) -> None:
        with self.engine.gathered():
            if self.rank == 0:
                self.ema.update(self.trained)

    def save(self, folder: Path) -> None:
        """Write this worker's part of the state that :meth:`load` needs."""
        self.engine.save(folder)
        torch.save([objective.state() for objective in self.objectives], folder / f"objectives-{self.rank}.pt")
        if self.rank == 0:
            torch.save(self.ema.state(), folder / "ema.pt")

    def load(self, folder: Path) -> None:
        """Resume from what :meth:`save` wrote; the number of workers may differ from that at the save under ZeRO 0 only."""
        self.engine.load(folder)
        writers = len(list(folder.glob("objectives-*.pt")))  # an additional worker gets a copy of another's state
        found = torch.load(folder / f"objectives-{self.rank % writers}.pt", map_location=self.device, weights_only=True)
        for objective, state in zip(self.objectives, found, strict=True):
            objective.restore(state)
        if self.rank == 0:
            self.ema.restore(torch.load(folder / "ema.pt", map_location=self.device, weights_only=True))

    def adapter(self, **about: Any) -> bytes:
        """Rank 0's moving average as safetensors bytes, with the config of the training and ``about`` in the metadata."""
        tensors = {name: value.contiguous().cpu() for name, value in self.ema.average.items()}
        if bad := first_not_finite(tensors):
            raise Diverged(f"the adapter has values that are not finite ('{bad}'); lower its learning rate")
        # A single entry, since the order of several entries would differ from file to file.
        return save(tensors, metadata={"adapter": json.dumps({"config": canonical(self.config), **about})})


def _groups(trained: Trained, table: str, config: FinetuneConfig) -> list[dict[str, Any]]:
    """The trained parameters as groups of the optimizer: one, or two if the table of labels has its own learning rate."""
    if config.table_lr == 1 or table not in dict(trained):
        return [{"params": [parameter for _, parameter in trained]}]
    others = [parameter for name, parameter in trained if name != table]
    own = {"params": [dict(trained)[table]], "lr": config.lr * config.table_lr}
    return [own, *([{"params": others}] if others else [])]


def finetune_flops(generator: PretrainedGenerator, config: FinetuneConfig) -> float:
    """Floating-point operations of one step for one image. A backward pass costs as much as a forward pass for the gradients
    of activations and, if all weights are trained, as much again for those of the weights."""
    forward, differentiated = config.objectives.passes
    return (forward + differentiated * (2 if config.parameters == "all" else 1)) * generator.forward_flops()
