"""An exponential moving average of the trained weights, on the side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Ema:
    """Averages ``parameters`` in float32; they themselves train on undisturbed.

    Args:
        parameters: those that are trained.
        decay: share of the old average that an update keeps, early on less: min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.averages: list[Tensor] = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        trained = [p.detach().clone() for p in self.parameters]
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(trained)

    def adopt(self) -> None:
        """Go on from the averaged weights."""
        self._copy(self.averages)

    def state(self) -> dict:
        """What :meth:`load` needs: the averages, and the weights as they train."""
        trained = [p.detach().clone() for p in self.parameters]  # a copy: the averages are swapped in before saving
        return {"updates": self.updates, "averages": self.averages, "trained": trained}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Put back :meth:`state`, the trained weights too (a checkpoint's parts hold the averages)."""
        self.updates = state["updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self._copy(state["trained"])

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
