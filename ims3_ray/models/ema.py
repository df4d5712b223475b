"""Exponential moving average of trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Exponential moving average of the named parameters. With ``warmup`` the n-th decay is at most (1+n)/(10+n), so that the
    average soon forgets the initial values."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average: dict[str, Tensor] = {name: p.detach().clone().float() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.updates += 1
        named = dict(parameters)
        most = (1 + self.updates) / (10 + self.updates) if self.warmup else 1.0
        average = get_ema_multi_avg_fn(min(self.decay, most))
        average(list(self.average.values()), [named[name].detach().float() for name in self.average], self.updates)

    def state(self) -> dict[str, Tensor | int]:
        return {**self.average, "updates": self.updates}

    def restore(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.average[name].copy_(value)
