"""Several utterances in one row, without padding: each sees itself alone, and its positions begin at 0.

Most of a layer works on one position at a time and gains from a full row. Attention does not: there, utterances are
laid out side by side as in a padded batch, so that no work is spent between them and any attention kernel will do.
"""

# Shapes: n utterances, S positions of the row, L positions of the longest utterance, H heads, d size of a head.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Which positions of a row belong to one utterance.

    Attributes:
        position_ids: (1, S), counted from 0 in each utterance.
        places: (S,) where each position stands in the (n * L) positions of the padded layout.
        utterances: n; what pads the end of the row counts as one.
        longest: L.
    """

    position_ids: Tensor
    places: Tensor
    utterances: int
    longest: int

    def spread(self, x: Tensor) -> Tensor:
        """(1, H, S, d) -> (n, H, L, d), zero where an utterance is shorter than the longest."""
        _, H, _, d = x.shape
        rows = x.new_zeros(self.utterances * self.longest, H, d).index_copy(0, self.places, x[0].transpose(0, 1))
        return rows.view(self.utterances, self.longest, H, d).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(n, L, H, d) -> (1, S, H, d), the inverse of :meth:`spread` up to a transposition."""
        return x.flatten(0, 1).index_select(0, self.places)[None]


def lay_out(segments: Tensor) -> Packing:
    """The packing of one row.

    Args:
        segments: (1, S), one number for all positions of an utterance, another than its neighbours'.
    """
    row = segments[0]
    _, numbers, lengths = row.unique_consecutive(return_inverse=True, return_counts=True)  # (S,), (n,)
    starts = lengths.cumsum(0) - lengths  # (n,)
    positions = torch.arange(len(row), device=row.device) - starts[numbers]  # (S,)
    longest = int(lengths.max())
    return Packing(positions[None], numbers * longest + positions, len(lengths), longest)
