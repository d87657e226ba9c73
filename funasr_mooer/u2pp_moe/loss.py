"""What the loss is made of: start and end symbols, reversed transcripts, smoothed labels."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funasr_mooer.modules.masks import padding_mask
from funasr_mooer.modules.splice import IGNORE_INDEX

# Shapes: B utterances, N tokens of a transcript, V vocabulary.


@dataclasses.dataclass
class Losses:
    """Losses of a batch as WeNet defines them: sums over tokens, means over utterances.

    Attributes:
        total: ctc_weight * ctc + (1 - ctc_weight) * attention.
        ctc: of the CTC head.
        attention: (1 - reverse_weight) * left + reverse_weight * right; None if the objective is CTC alone.
        left: of the left-to-right decoder.
        right: of the right-to-left decoder; None without one.
        accuracy: share of tokens that the left-to-right decoder predicts right.
    """

    total: Tensor
    ctc: Tensor
    attention: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    accuracy: Tensor | None = None


class Teaching(NamedTuple):
    """What a decoder reads and should say.

    Attributes:
        inputs: (B, N + 1) start symbol and tokens, filled with the end symbol.
        targets: (B, N + 1) tokens and end symbol, filled with ``IGNORE_INDEX``.
        lengths: (B,) of both.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor


def teaching(tokens: Tensor, lengths: Tensor, sos: int, eos: int, backwards: bool = False) -> Teaching:
    """Inputs and targets for transcripts (B, N), (B,); ``backwards`` for the right-to-left decoder."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    if backwards:
        tokens = tokens.gather(1, (lengths[:, None] - 1 - places).clamp(min=0))
    real = padding_mask(lengths, tokens.shape[1])
    inputs = F.pad(tokens.masked_fill(~real, eos), (1, 0), value=sos)
    targets = F.pad(tokens.masked_fill(~real, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)
    return Teaching(inputs, targets.scatter(1, lengths[:, None], eos), lengths + 1)


def smoothed_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Sum over labelled places of KL(smoothed label || prediction), float32, as in WeNet.

    Args:
        logits: (B, N, V).
        targets: (B, N), ``IGNORE_INDEX`` where there is no label.
        smoothing: probability that the label hands to the other V - 1 tokens, in equal shares.
    """
    real = targets != IGNORE_INDEX
    log_probs = logits[real].log_softmax(dim=-1, dtype=torch.float32)  # (labels, V)
    share = smoothing / (log_probs.shape[-1] - 1)
    right = log_probs.gather(1, targets[real][:, None]).sum()
    cross_entropy = -(1 - smoothing - share) * right - share * log_probs.sum()
    return cross_entropy - len(log_probs) * _entropy(1 - smoothing, smoothing, share)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of labelled places where the best token is the label, a scalar."""
    real = targets != IGNORE_INDEX
    return ((logits.argmax(-1) == targets) & real).sum() / real.sum().clamp(min=1)


def _entropy(most: float, rest: float, share: float) -> float:
    """Of a smoothed label."""
    return -sum(weight * math.log(p) for weight, p in ((most, most), (rest, share)) if weight > 0)
