"""Connectionist temporal classification: the head, its loss, greedy decoding and forced alignment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.masks import padding_mask

# Shapes: B batch, T encoder frames, D encoder size, V vocabulary, N tokens.


class Path(NamedTuple):
    """Tokens of one utterance and, for each, the encoder frame at which it starts."""

    tokens: list[int]
    frames: list[int]


class CTCHead(nn.Module):
    """A linear layer over the vocabulary, trained with CTC (Graves et al., 2006).

    Args:
        encoder_dim: size of an encoder frame, D.
        vocab_size: V.
        blank_id: the token id that means "nothing new"; never a target.

    Raises:
        ConfigError: ``blank_id`` is not in the vocabulary.
    """

    def __init__(self, encoder_dim: int, vocab_size: int, blank_id: int):
        super().__init__()
        if not 0 <= blank_id < vocab_size:
            raise ConfigError(f"CTC blank_id={blank_id} is outside the vocabulary of {vocab_size} tokens")
        self.blank_id = blank_id
        self.ctc_lo = nn.Linear(encoder_dim, vocab_size)

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        """(B, T, D) -> log probabilities (B, T, V), float32."""
        return self.ctc_lo(encoder_out).log_softmax(dim=-1, dtype=torch.float32)

    def loss(self, encoder_out: Tensor, encoder_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """CTC loss per target token, a float32 scalar.

        An utterance with more tokens than its frames can carry contributes zero instead of infinity.

        Args:
            encoder_out: (B, T, D).
            encoder_lengths: frames, (B,).
            targets: token ids, (B, N), padded with anything.
            target_lengths: tokens, (B,).
        """
        return ctc_loss(self.log_probs(encoder_out), encoder_lengths, targets, target_lengths, self.blank_id)

    def greedy(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Path]:
        """Best token per frame, repeats and blanks removed: one :class:`Path` per utterance."""
        return greedy(self.ctc_lo(encoder_out), encoder_lengths, self.blank_id)


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank_id: int) -> Tensor:
    """Negative log likelihood of all targets, over the number of target tokens; log_probs (B, T, V)."""
    flat = targets[padding_mask(target_lengths, targets.shape[1])]  # (sum of target_lengths,)
    total = F.ctc_loss(
        log_probs.transpose(0, 1).float(),
        flat,
        lengths,
        target_lengths,
        blank=blank_id,
        reduction="sum",
        zero_infinity=True,
    )
    return total / target_lengths.sum().clamp(min=1)


def greedy(scores: Tensor, lengths: Tensor, blank_id: int) -> list[Path]:
    """Greedy CTC decoding of scores or log probabilities, (B, T, V), of ``lengths`` frames, (B,)."""
    best = scores.argmax(dim=-1)  # (B, T)
    new = torch.ones_like(best, dtype=torch.bool)
    new[:, 1:] = best[:, 1:] != best[:, :-1]
    new &= (best != blank_id) & padding_mask(lengths, best.shape[1])
    return [Path(row[keep].tolist(), keep.nonzero().flatten().tolist()) for row, keep in zip(best, new)]


def align(log_probs: Tensor, tokens: list[int], blank_id: int) -> list[tuple[int, int]]:
    """Frames of each token on the most probable CTC path that spells ``tokens`` (Viterbi).

    Args:
        log_probs: one utterance, (T, V).
        tokens: N token ids, without blanks.
        blank_id: id of the blank.

    Returns:
        (first frame, last frame + 1) per token; the frames between tokens are blank.

    Raises:
        DataError: the utterance is too short: repeated tokens need a blank between them.
    """
    T, N = len(log_probs), len(tokens)
    if N == 0:
        return []
    needed = N + sum(a == b for a, b in zip(tokens, tokens[1:]))
    if needed > T:
        raise DataError(f"{N} tokens need at least {needed} encoder frames, the audio has {T}")
    states = np.full(2 * N + 1, blank_id)  # blank, token 1, blank, token 2, ..., blank
    states[1::2] = tokens
    emit = log_probs.detach().float().cpu().numpy()[:, states].astype(np.float64)  # (T, S)
    skip = np.zeros(len(states), dtype=bool)  # may a state follow the token before it without a blank?
    skip[3::2] = states[3::2] != states[1:-2:2]

    best = np.full(len(states), -np.inf)
    best[:2] = emit[0, :2]
    step = np.zeros((T, len(states)), dtype=np.int8)  # how many states the path went forward to get here
    for t in range(1, T):
        stay, one, two = best, _shift(best, 1), np.where(skip, _shift(best, 2), -np.inf)
        options = np.stack((stay, one, two))
        step[t] = options.argmax(axis=0)
        best = options.max(axis=0) + emit[t]

    state = len(states) - 1 if best[-1] >= best[-2] else len(states) - 2
    spans = [(0, 0)] * N
    for t in range(T - 1, -1, -1):
        if state % 2:
            token = state // 2
            end = spans[token][1] or t + 1
            spans[token] = (t, end)
        state -= int(step[t, state])  # step is int8, and a state may be any number
    return spans


def _shift(values: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate((np.full(by, -np.inf), values[:-by]))
