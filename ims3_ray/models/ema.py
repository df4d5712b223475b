"""Exponential moving average of trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Average of the named parameters, warmed up so that early averages are not dominated by the start."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {name: p.detach().clone().float() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.updates += 1
        named = dict(parameters)
        average = get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        average(list(self.average.values()), [named[name].detach().float() for name in self.average], self.updates)

    def state(self) -> dict[str, Tensor | int]:
        return {**self.average, "updates": self.updates}

    def restore(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.average[name].copy_(value)
