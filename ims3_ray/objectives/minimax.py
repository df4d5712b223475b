"""The representativeness and diversity terms of Minimax diffusion (Gu et al. 2024, arXiv 2311.15529, Eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.objectives.base import Objective, TrainingStep


class Minimax(Objective):
    """Per class, pulls predictions towards the least similar real latent and away from the most similar earlier prediction.

    Each class has a memory R of real latents and a memory P of earlier predictions (the last ``memory`` of each, flattened,
    without gradient). For the predictions ẑ_0 of the class, representativeness is ``1 − min cos(ẑ_0, R)`` and diversity is
    ``max cos(ẑ_0, P)``, each averaged over the classes of the batch whose memory is not empty, and 0 if all are empty. The
    batch enters the memories after its loss is computed. Unless they are ``shared``, each worker keeps memories of its own.
    """

    name = "minimax"
    couples_samples = True

    class Config(Section):
        """The two terms of Minimax diffusion, which use a memory of latents for each class."""

        representativeness: float = Field(default=0.0, ge=0)
        """Weight λ_r of representativeness; Minimax uses 0.002."""
        diversity: float = Field(default=0.0, ge=0)
        """Weight λ_d of diversity; Minimax uses 0.008."""
        memory: int = Field(default=64, ge=1)
        """Number of real latents, and of predicted latents, that are kept per class."""
        shared: bool = False
        """Whether all workers share the memories; otherwise each worker has its own."""

    config: Config

    @classmethod
    def terms(cls, config: Config) -> Mapping[str, float]:
        return {"representativeness": config.representativeness, "diversity": config.diversity}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.real: dict[int, Tensor] = {}
        self.predicted: dict[int, Tensor] = {}

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        z0_hat = F.normalize(step.z0_hat.flatten(1), dim=1)
        near, apart = [], []
        for label in step.class_B.unique().tolist():
            of_class = z0_hat[step.class_B == label]
            if label in self.real:
                near.append(1 - (of_class @ self.real[label].T).min())
            if label in self.predicted:
                apart.append((of_class @ self.predicted[label].T).max())
        self._remember(step, z0_hat.detach())
        zero = z0_hat.sum() * 0  # of the first step, which has nothing to compare with, and may have no other objective
        return {
            "representativeness": torch.stack(near).mean() if near else zero,
            "diversity": torch.stack(apart).mean() if apart else zero,
        }

    def _remember(self, step: TrainingStep, z0_hat: Tensor) -> None:
        """Add the batch to the memories, which hold unit vectors, newest last."""
        seen = (step.class_B, F.normalize(step.z0.float().flatten(1), dim=1), z0_hat)
        labels, real, predicted = map(_of_all_workers, seen) if self.config.shared else seen
        for label in labels.unique().tolist():
            for store, latents in ((self.real, real), (self.predicted, predicted)):
                mine = latents[labels == label]
                store[label] = torch.cat([store[label], mine] if label in store else [mine])[-self.config.memory :]

    def state(self) -> dict[str, Tensor]:
        stores = {"real": self.real, "predicted": self.predicted}
        return {f"{name}/{label}": latents for name, store in stores.items() for label, latents in store.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for key, latents in state.items():
            name, label = key.split("/")
            (self.real if name == "real" else self.predicted)[int(label)] = latents


def _of_all_workers(tensor: Tensor) -> Tensor:
    """The ``tensor`` of every worker, concatenated in order of rank along the first dimension, whose size may differ."""
    if not dist.is_initialized():
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    padded = tensor.new_zeros((int(max(counts)), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
