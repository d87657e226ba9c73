"""Sinusoidal positions: handed to relative attention, or added to the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Positions(nn.Module):
    """Scale the input by sqrt(D) and hand out the sinusoids of its frames.

    The table is a function of D, grows on demand and is not saved. WeNet's newer checkpoints hold it as
    ``pe``: that key is read and ignored.

    Args:
        size: model size D, even.
        dropout: applied to the scaled input and to the sinusoids.
    """

    def __init__(self, size: int, dropout: float = 0.0):
        super().__init__()
        self.scale = math.sqrt(size)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("pe", sinusoids(512, size), persistent=False)  # (1, frames, D)

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> scaled x and the sinusoids (1, T, D) of frames ``offset`` to ``offset + T``."""
        return self.dropout(x * self.scale), self.table(offset, x.shape[1])

    def table(self, offset: int, count: int) -> Tensor:
        """Sinusoids of ``count`` frames from ``offset`` on, (1, count, D), with dropout in training."""
        return self.dropout(self.rows(offset, count))

    def rows(self, offset: int, count: int) -> Tensor:
        """The same without dropout."""
        if offset + count > self.pe.shape[1]:
            grown = sinusoids(2 * (offset + count), self.pe.shape[2])
            self.pe = grown.to(self.pe)
        return self.pe[:, offset : offset + count]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "pe", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AddedPositions(Positions):
    """Scale the input by sqrt(D) and add the sinusoids of its places; dropout on the sum."""

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D), whose first place is number ``offset``."""
        return self.dropout(x * self.scale + self.rows(offset, x.shape[1]))


def sinusoids(count: int, size: int) -> Tensor:
    """(1, count, size): sines in the even channels, cosines in the odd ones (Attention Is All You Need, 3.5)."""
    frames = torch.arange(count, dtype=torch.float32)[:, None]
    angles = frames * torch.exp(torch.arange(0, size, 2, dtype=torch.float32) * -(math.log(10000.0) / size))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[None]
