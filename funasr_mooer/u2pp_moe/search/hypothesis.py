"""What every search returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

NEVER = -math.inf  # log probability of what cannot be


@dataclasses.dataclass
class Hypothesis:
    """What was heard in one utterance.

    Attributes:
        tokens: the best candidate.
        score: its log probability, as the search counts it.
        times: encoder frame of each token, or None where the search knows no times.
        nbest: all candidates, best first.
        nbest_scores: their scores.
        nbest_times: their times, or None.
        tokens_confidence: probability of each token of the best candidate.
        confidence: geometric mean of the probabilities of its tokens (and of its end, where a decoder predicts one).
        bonuses: what hotwords add to the score of each candidate; None where the search knows no hotwords.
    """

    tokens: list[int]
    score: float
    times: list[int] | None
    nbest: list[list[int]]
    nbest_scores: list[float]
    nbest_times: list[list[int]] | None
    tokens_confidence: list[float]
    confidence: float
    bonuses: list[float] | None = None


def mean_probability(log_probs: Sequence[float]) -> float:
    """Geometric mean of probabilities; 0 for none."""
    return math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
