"""Beam search with the attention decoder alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funasr_mooer.u2pp_moe.decoder import MoEBiTransformerDecoder, MoETransformerDecoder
from funasr_mooer.u2pp_moe.search.hypothesis import NEVER, Hypothesis, mean_probability

# Shapes: B utterances, C candidates of each, T encoder frames, D encoder size, N tokens, V vocabulary.


def attention_search(
    decoder: MoETransformerDecoder | MoEBiTransformerDecoder,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    sos: int,
    eos: int,
    beam_size: int = 10,
    length_penalty: float = 0.0,
) -> list[Hypothesis]:
    """Beam search with the left-to-right decoder; a candidate has at most as many tokens as its audio has frames.

    Args:
        decoder: either kind.
        encoder_out: (B, T, D).
        encoder_lengths: (B,).
        sos: start symbol.
        eos: end symbol.
        beam_size: candidates C.
        length_penalty: scores are divided by length to this power.
    """
    B, C, device = len(encoder_out), beam_size, encoder_out.device
    decoder = decoder.left_to_right
    cache = decoder.start(encoder_out, encoder_lengths)
    tokens = torch.full((B * C, 0), eos, device=device)
    token_scores = torch.zeros(B * C, 0, device=device)
    last = torch.full((B * C,), sos, device=device)
    scores = torch.full((B, C), NEVER, device=device)
    scores[:, 0] = 0.0
    ended = torch.zeros(B, C, dtype=torch.bool, device=device)
    first_row = torch.arange(B, device=device)[:, None] * C
    for step in range(int(encoder_lengths.max())):
        ended = ended | (encoder_lengths <= step)[:, None]
        if bool(ended.all()):
            break
        log_probs = decoder.step(last, cache).view(B, C, -1)
        best, chosen = log_probs.topk(min(C, log_probs.shape[-1]), dim=-1)  # (B, C, C)
        # A candidate that has ended goes on once, for nothing, with the end symbol.
        nothing = torch.full_like(best, NEVER)
        nothing[..., 0] = 0.0
        best = torch.where(ended[..., None], nothing, best)
        chosen = chosen.masked_fill(ended[..., None], eos)
        scores, places = (scores[..., None] + best).flatten(1).topk(C, dim=-1)  # (B, C)
        rows = (first_row + places // best.shape[-1]).flatten()
        last = chosen.flatten(1).gather(1, places).flatten()
        value = best.flatten(1).gather(1, places).flatten()
        tokens = torch.cat((tokens[rows], last[:, None]), dim=1)
        token_scores = torch.cat((token_scores[rows], value[:, None]), dim=1)
        cache.select(rows)
        ended = (last == eos).view(B, C)
    lengths = (tokens != eos).sum(dim=1).view(B, C)
    ranked = scores / lengths.clamp(min=1).to(scores.dtype).pow(length_penalty)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    return [
        _candidates(*(x.view(B, C, *x.shape[1:])[b][order[b]] for x in (tokens, token_scores, ranked.flatten())), eos)
        for b in range(B)
    ]


def _candidates(tokens: Tensor, token_scores: Tensor, scores: Tensor, eos: int) -> Hypothesis:
    """One utterance's candidates (C, N), best first."""
    scored = [score for score in scores.tolist() if score > NEVER]
    nbest = [row[row != eos].tolist() for row in tokens[: len(scored)]]
    values = token_scores[0].tolist()
    confidences = [math.exp(value) for value in values[: len(nbest[0])]]
    end = values[: len(nbest[0]) + 1]
    return Hypothesis(nbest[0], scored[0], None, nbest, scored, None, confidences, mean_probability(end))
