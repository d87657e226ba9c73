"""From features to the frames of a conformer: keep their rate, or take one in two or four."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.modules.positions import Positions

# Shapes: B batch, T input frames, T' output frames, F feature size, D model size.


class LinearInput(nn.Module):
    """Project each input frame, or ``factor`` of them at once; for features that are stacked already (LFR).

    Args:
        input_size: feature size F.
        size: model size D.
        dropout: on the projected frames.
        positions: adds nothing, hands out the sinusoids.
        factor: input frames per output frame. The last T % factor frames are dropped, so that a frame never
            holds half an utterance and half padding.
    """

    def __init__(self, input_size: int, size: int, dropout: float, positions: Positions, factor: int = 1):
        super().__init__()
        self.factor = factor
        self.right_context = factor - 1  # input frames that an output frame sees beyond its first one
        self.out = nn.Sequential(nn.Linear(input_size * factor, size), nn.LayerNorm(size), nn.Dropout(dropout))
        self.pos_enc = positions

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Frames after this layer, (B,), for input lengths (B,)."""
        return lengths // self.factor

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """(B, T, F) -> (B, T', D) and the sinusoids (1, T', D) from frame ``offset`` on."""
        B, T, F_ = x.shape
        if self.factor > 1:
            x = F.pad(x, (0, 0, 0, max(0, self.factor - T)))  # too short for one frame: one frame, of length 0
            x = x[:, : x.shape[1] // self.factor * self.factor].reshape(B, -1, F_ * self.factor)
        return self.pos_enc(self.out(x), offset)


class Conv2dSubsampling4(nn.Module):
    """Two 3x3 convolutions of stride 2: one frame of 40 ms per four of 10 ms.

    Args:
        input_size: feature size F, at least 7.
        size: model size D.
        dropout: unused by WeNet in this layer, kept for one signature.
        positions: hands out the sinusoids.
    """

    factor = 4
    right_context = 6

    def __init__(self, input_size: int, size: int, dropout: float, positions: Positions):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, size, 3, 2), nn.ReLU(), nn.Conv2d(size, size, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(size * (((input_size - 1) // 2 - 1) // 2), size))
        self.pos_enc = positions

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Frames after this layer, (B,), for input lengths (B,): those whose 7 input frames are all speech."""
        return (((lengths - 1) // 2 - 1) // 2).clamp(min=0)

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """(B, T, F) -> (B, T', D) and the sinusoids (1, T', D) from frame ``offset`` on."""
        x = F.pad(x, (0, 0, 0, max(0, 7 - x.shape[1])))  # too short for one frame: one frame, of length 0
        x = self.conv(x.unsqueeze(1))  # (B, D, T', F')
        return self.pos_enc(self.out(x.transpose(1, 2).flatten(2)), offset)


INPUT_LAYERS: dict[str, Callable[..., LinearInput | Conv2dSubsampling4]] = {
    "linear": LinearInput,
    "linear2": functools.partial(LinearInput, factor=2),
    "conv2d": Conv2dSubsampling4,
}
