"""Fine-tuning of a DiT by weighted objectives (section 4.1, Algorithm 1): one worker's part of it.

:mod:`ims3_ray.stages.finetune` runs it on Ray Train with DeepSpeed ZeRO (:mod:`ims3_ray.stages.zero`); alone it needs PyTorch
and nothing else.
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

from ims3_ray.config import FinetuneConfig, ObjectivesConfig, canonical
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.dit import DiT
from ims3_ray.models.ema import Ema
from ims3_ray.objectives.base import Objective, TrainingStep, add_up
from ims3_ray.objectives.diffusion import Diffusion, drop_labels
from ims3_ray.objectives.inversion_matching import InversionMatching
from ims3_ray.objectives.inversion_matching_released import InversionMatchingReleased
from ims3_ray.objectives.minimax import Minimax

Row = dict[str, float]
"""loss, loss_TERM for each term (unweighted) and grad_norm of a step; its number too where rows are kept."""


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch. Each tensor's first dimension counts its images."""

    z0: Tensor
    y_B: Tensor
    dropped_B: Tensor
    t_B: Tensor
    noise: Tensor

    def pieces(self, count: int) -> Iterator[Batch]:
        """The batch cut into ``count`` parts, none empty if it has as many images."""
        tensors = (self.z0, self.y_B, self.dropped_B, self.t_B, self.noise)
        yield from (Batch(*parts) for parts in zip(*(t.tensor_split(count) for t in tensors), strict=True))


def objectives_of(config: ObjectivesConfig) -> list[Objective]:
    """The objectives with a weight; a Minimax memory that is shared gathers over the workers of the process group."""
    found: list[Objective] = []
    if (im := config.inversion_matching).weight:  # first, so that its pass takes the shared one along
        found.append(InversionMatching(im.weight, im.n_steps, im.grad_steps, im.similarity))
    if config.diffusion.weight:
        found.append(Diffusion(config.diffusion.weight, config.diffusion.variance))
    if config.inversion_matching_released.weight:
        found.append(InversionMatchingReleased(config.inversion_matching_released.weight))
    if (m := config.minimax).representativeness or m.diversity:
        found.append(Minimax(m.representativeness, m.diversity, m.memory, _gather if m.shared else None))
    return found


def _gather(tensor: Tensor) -> Tensor:
    """``tensor`` of every worker, in order of rank, joined along its first dimension, which may differ."""
    if not dist.is_initialized():
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    padded = tensor.new_zeros((int(max(counts)), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def choose_trained(model: DiT, config: FinetuneConfig) -> list[str]:
    """Freeze what is not trained, cast it to the precision asked for; returns the names of the trained parameters."""
    if config.parameters == "difffit":
        names = add_difffit(model, config.scaled_blocks)
    else:
        names = [name for name, _ in model.requires_grad_().named_parameters()]
    if config.precision == "bf16":
        model.compute_dtype = torch.bfloat16
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return names


class Engine(Protocol):
    """What turns losses into optimizer steps."""

    module: nn.Module
    """The model as it has to be called: with its hooks, if the engine has some."""

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradient of a piece's mean ``loss``; the piece is this ``share`` of the images of all workers' batch."""

    def step(self) -> Tensor | float | None:
        """Called after each piece. After the last one of a batch: update the weights, return the norm of the gradient."""

    def gathered(self) -> AbstractContextManager[Any]:
        """While it is open, the trained parameters are whole on every worker."""

    def save(self, folder: Path) -> None:
        """Write this worker's part of the trained parameters and of the optimizer's state."""

    def load(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote."""


Trained = Sequence[tuple[str, nn.Parameter]]
"""The trained parameters with their names."""
BuildEngine = Callable[[nn.Module, torch.optim.Optimizer, Trained, FinetuneConfig, int], Engine]
"""(model, optimizer, trained parameters, config, number of workers) → engine."""


def gradient_norm(trained: Trained) -> Tensor:
    """ℓ2 norm of the gradients that are there, over all trained parameters."""
    return torch.nn.utils.get_total_norm([p.grad for _, p in trained if p.grad is not None])


class TorchEngine:
    """PyTorch alone, for one worker."""

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
    """One worker of a fine-tuning: model, engine, objectives, and (on rank 0) the moving average that becomes the adapter."""

    def __init__(
        self, model: DiT, config: FinetuneConfig, device: torch.device | str, rank: int = 0, world: int = 1,
        build_engine: BuildEngine = TorchEngine,
    ) -> None:  # fmt: skip
        self.config, self.device, self.rank, self.world = config, torch.device(device), rank, world
        self.null_label = model.config.null_label
        self.schedule, self.objectives = NoiseSchedule(), objectives_of(config.objectives)
        names = set(choose_trained(model.to(device), config))
        self.trained = [(n, p) for n, p in model.named_parameters() if n in names]
        averaged = self.trained if rank == 0 else []
        self.ema = Ema(averaged, config.ema_decay, config.ema_warmup)  # before ZeRO-3 takes the parameters apart
        model.recompute = config.activation_checkpointing
        if config.compile:
            for block in model.blocks:
                block.compile(dynamic=False)
        optimizer = torch.optim.AdamW([p for _, p in self.trained], lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.engine = build_engine(model, optimizer, self.trained, config, world)

    def draw(self, images: CleanImages, index: Tensor, rng: Generator) -> Batch:
        """This worker's part of the global batch of images ``index``.

        Every worker draws for the whole batch and takes its part: how many they are changes rounding, nothing else.
        """
        size = self.config.batch_size
        mine = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        noise = torch.randn((size, *images.shape), generator=rng)
        t = torch.randint(self.schedule.num_steps, (size,), generator=rng)
        labels = images.labels[index]
        dropped = drop_labels(labels, self.null_label, self.config.label_dropout, rng)
        z0 = images.batch(index, rng)
        return Batch(*(tensor[mine].to(self.device) for tensor in (z0, labels, dropped, t, noise)))

    def step(self, batch: Batch) -> Row:
        """One optimizer step; the row's losses are means over the global batch.

        A value that is not finite leaves the average as it was, and the weights spoilt: the caller has to stop.
        """
        sums, norm = dict[str, Tensor](), None
        for piece in batch.pieces(self.config.accumulate):
            forward = TrainingStep(
                self.engine.module, self.schedule, piece.z0, piece.y_B, piece.dropped_B, piece.t_B, piece.noise,
                output_is_needed=any(objective.needs_output for objective in self.objectives),
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
        """Every worker writes its part of what :meth:`load` needs."""
        self.engine.save(folder)
        torch.save([objective.state() for objective in self.objectives], folder / f"objectives-{self.rank}.pt")
        if self.rank == 0:
            torch.save(self.ema.state(), folder / "ema.pt")

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote; the number of workers may differ under ZeRO 0 alone."""
        self.engine.load(folder)
        writers = len(list(folder.glob("objectives-*.pt")))  # a worker that has joined takes over a copy of a memory
        found = torch.load(folder / f"objectives-{self.rank % writers}.pt", map_location=self.device, weights_only=True)
        for objective, state in zip(self.objectives, found, strict=True):
            objective.restore(state)
        if self.rank == 0:
            self.ema.restore(torch.load(folder / "ema.pt", map_location=self.device, weights_only=True))

    def adapter(self, **about: Any) -> bytes:
        """Rank 0's moving average as safetensors; its metadata say how it was trained (and what else is given)."""
        tensors = {name: value.contiguous().cpu() for name, value in self.ema.average.items()}
        # One entry: the order of several would change from file to file.
        return save(tensors, metadata={"adapter": json.dumps({"config": canonical(self.config), **about})})
