"""The representativeness and diversity terms of Minimax diffusion (Gu et al. 2024, arXiv 2311.15529, Eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.objectives.base import Objective, TrainingStep


class Minimax(Objective):
    """Per class, the real latent least like the prediction is drawn nearer, the most similar earlier prediction pushed away.

    For the predictions ẑ_0 of a class, its memory R of real latents and its memory P of earlier predictions (both the last
    ``memory`` of them, flattened, without gradient): representativeness ``1 − min cos(ẑ_0, R)``, diversity
    ``max cos(ẑ_0, P)``, each averaged over the classes of the batch whose memory holds something, and 0 where none does.
    The batch enters the memories after its loss. ``gather`` joins a tensor over all workers along its first dimension:
    with it the memories are shared, without it each worker remembers what it saw itself.
    """

    def __init__(
        self, representativeness: float, diversity: float, memory: int = 64, gather: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(representativeness=representativeness, diversity=diversity)
        self.memory, self.gather = memory, gather or (lambda tensor: tensor)
        self.real: dict[int, Tensor] = {}
        self.predicted: dict[int, Tensor] = {}

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        z0_hat = F.normalize(step.z0_hat.flatten(1), dim=1)
        near, apart = [], []
        for label in step.y_B.unique().tolist():
            of_class = z0_hat[step.y_B == label]
            if label in self.real:
                near.append(1 - (of_class @ self.real[label].T).min())
            if label in self.predicted:
                apart.append((of_class @ self.predicted[label].T).max())
        self._remember(step, z0_hat.detach())
        zero = z0_hat.new_zeros(())
        return {
            "representativeness": torch.stack(near).mean() if near else zero,
            "diversity": torch.stack(apart).mean() if apart else zero,
        }

    def _remember(self, step: TrainingStep, z0_hat: Tensor) -> None:
        """Memories hold unit vectors, newest last."""
        labels = self.gather(step.y_B)
        real, predicted = self.gather(F.normalize(step.z0.float().flatten(1), dim=1)), self.gather(z0_hat)
        for label in labels.unique().tolist():
            for store, latents in ((self.real, real), (self.predicted, predicted)):
                mine = latents[labels == label]
                store[label] = torch.cat([store[label], mine] if label in store else [mine])[-self.memory :]

    def state(self) -> dict[str, Tensor]:
        stores = {"real": self.real, "predicted": self.predicted}
        return {f"{name}/{label}": latents for name, store in stores.items() for label, latents in store.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for key, latents in state.items():
            name, label = key.split("/")
            (self.real if name == "real" else self.predicted)[int(label)] = latents
