"""Candidates of a CTC search, scored again by the attention decoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funasr_mooer.errors import ConfigError
from funasr_mooer.u2pp_moe.decoder import MoEBiTransformerDecoder, MoETransformerDecoder
from funasr_mooer.u2pp_moe.loss import teaching
from funasr_mooer.u2pp_moe.search.hypothesis import Hypothesis

# Shapes: B utterances, C candidates of each, T encoder frames, D encoder size, N tokens, V vocabulary.
RESCORED_ROWS = 256  # candidates that the decoder reads at once


def attention_rescoring(
    decoder: MoETransformerDecoder | MoEBiTransformerDecoder,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    found: Sequence[Hypothesis],
    sos: int,
    eos: int,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.0,
) -> list[Hypothesis]:
    """Score the candidates of a CTC prefix beam search with the decoders, and choose again.

    The score is (1 - reverse_weight) * left + reverse_weight * right + ctc_weight * CTC, in log probabilities, and what
    hotwords add, whole.

    Args:
        decoder: either kind.
        encoder_out: (B, T, D).
        encoder_lengths: (B,).
        found: results of the prefix beam search, one per utterance.
        sos: start symbol.
        eos: end symbol.
        ctc_weight: of the CTC score.
        reverse_weight: of the right-to-left decoder.

    Raises:
        ConfigError: ``reverse_weight`` is above 0 and there is no right-to-left decoder.
    """
    if reverse_weight > 0 and decoder.right_to_left is None:
        raise ConfigError(f"reverse_weight={reverse_weight}: this model has no right-to-left decoder; set it to 0")
    size = max(1, RESCORED_ROWS // max((len(each.nbest) for each in found), default=1))
    results = []
    for start in range(0, len(found), size):
        part = slice(start, start + size)
        audio, candidates = (encoder_out[part], encoder_lengths[part]), [each.nbest for each in found[part]]
        left = _token_scores(decoder.left_to_right, *audio, candidates, sos, eos, backwards=False)
        right = None
        if reverse_weight > 0:
            right = _token_scores(decoder.right_to_left, *audio, candidates, sos, eos, backwards=True)
        for b, each in enumerate(found[part]):
            results.append(_rescored(each, left[b], right and right[b], ctc_weight, reverse_weight))
    return results


def _token_scores(
    decoder: MoETransformerDecoder,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    candidates: Sequence[Sequence[Sequence[int]]],
    sos: int,
    eos: int,
    backwards: bool,
) -> list[list[list[float]]]:
    """Log probabilities of each candidate's tokens, in their order, and of its end."""
    C = max(map(len, candidates))
    rows = [row for each in candidates for row in (*each, *[[]] * (C - len(each)))]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), max(1, int(lengths.max()))), eos)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = torch.tensor(ids)
    taught = teaching(tokens, lengths, sos, eos, backwards)
    device = encoder_out.device
    logits = decoder(encoder_out, encoder_lengths, taught.inputs.to(device), taught.lengths.to(device)).float()
    chosen = logits.gather(2, taught.targets.clamp(min=0).to(device)[..., None])[..., 0]
    values = (chosen - logits.logsumexp(dim=-1)).tolist()  # (B * C, N + 1)
    scores = [value[:n] for value, n in zip(values, taught.lengths.tolist())]
    if backwards:
        scores = [[*value[-2::-1], value[-1]] for value in scores]
    return [scores[b * C : b * C + len(each)] for b, each in enumerate(candidates)]


def _rescored(
    found: Hypothesis,
    left: Sequence[Sequence[float]],
    right: Sequence[Sequence[float]] | None,
    ctc_weight: float,
    reverse_weight: float,
) -> Hypothesis:
    """One utterance's candidates in their new order."""
    decoded = [sum(row) for row in left]
    if right is not None:
        decoded = [(1 - reverse_weight) * a + reverse_weight * sum(row) for a, row in zip(decoded, right)]
    bonuses = found.bonuses or [0.0] * len(decoded)
    heard = [score - bonus for score, bonus in zip(found.nbest_scores, bonuses)]
    scores = [a + ctc_weight * ctc + bonus for a, ctc, bonus in zip(decoded, heard, bonuses)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = order[0]
    confidences = [math.exp(value) for value in left[best][:-1]]
    if right is not None:
        confidences = [(a + math.exp(b)) / 2 for a, b in zip(confidences, right[best])]
    nbest, times = [found.nbest[i] for i in order], [found.nbest_times[i] for i in order]
    return Hypothesis(
        tokens=nbest[0],
        score=scores[best],
        times=times[0],
        nbest=nbest,
        nbest_scores=[scores[i] for i in order],
        nbest_times=times,
        tokens_confidence=confidences,
        confidence=math.exp(decoded[best] / (len(nbest[0]) + 1)),
        bonuses=[bonuses[i] for i in order],
    )
