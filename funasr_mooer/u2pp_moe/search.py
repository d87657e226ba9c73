"""From probabilities to tokens: CTC greedy and prefix beam search, attention beam search, attention rescoring.

Each search treats the utterances of a batch apart: a batch gives what its utterances give alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funasr_mooer.config import section, suggest
from funasr_mooer.errors import ConfigError
from funasr_mooer.u2pp_moe.decoder import MoEBiTransformerDecoder, MoETransformerDecoder
from funasr_mooer.u2pp_moe.loss import teaching

# Shapes: B utterances, C candidates of each, T encoder frames, D encoder size, N tokens, V vocabulary.
METHODS = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")
NEVER = -math.inf
RESCORED_ROWS = 256  # candidates that the decoder reads at once

Decoder = MoETransformerDecoder | MoEBiTransformerDecoder


@dataclasses.dataclass
class DecodeConf:
    """How an utterance is decoded; names and meanings are WeNet's.

    Attributes:
        method: ``ctc_greedy_search``, ``ctc_prefix_beam_search``, ``attention`` or ``attention_rescoring``.
        decoding_chunk_size: encoder frames per chunk, as streaming would see them; -1 is the whole utterance.
        num_decoding_left_chunks: chunks of history that a frame sees; negative is all.
        beam_size: candidates kept.
        ctc_weight: of the CTC score in rescoring.
        reverse_weight: of the right-to-left decoder in rescoring, 0 to 1; None is the weight it was trained with.
        blank_penalty: taken off the blank's score before the softmax; above 0 fewer words are left out.
        length_penalty: attention scores are divided by length to this power.
    """

    method: str = "attention_rescoring"
    decoding_chunk_size: int = -1
    num_decoding_left_chunks: int = -1
    beam_size: int = 10
    ctc_weight: float = 0.5
    reverse_weight: float | None = None
    blank_penalty: float = 0.0
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is no decoding method{suggest(self.method, METHODS)}")
        if self.beam_size < 1:
            raise ConfigError(f"beam_size={self.beam_size} must be at least 1")
        if self.decoding_chunk_size == 0:
            raise ConfigError("decoding_chunk_size=0: a chunk holds at least 1 frame; -1 means the whole utterance")
        if self.reverse_weight is not None and not 0 <= self.reverse_weight <= 1:
            raise ConfigError(f"reverse_weight={self.reverse_weight} must lie between 0 and 1")


DECODE_KEYS = tuple(field.name for field in dataclasses.fields(DecodeConf))


def decode_conf(*layers: Mapping[str, Any] | None) -> DecodeConf:
    """Decoding settings out of several mappings, the later ones first; keys of others are passed over."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update({key: value for key, value in (layer or {}).items() if key in DECODE_KEYS})
    return section(DecodeConf, merged, "decode_conf")


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
    """

    tokens: list[int]
    score: float
    times: list[int] | None
    nbest: list[list[int]]
    nbest_scores: list[float]
    nbest_times: list[list[int]] | None
    tokens_confidence: list[float]
    confidence: float


# -- CTC ------------------------------------------------------------------------------------------------------


class GreedyPath:
    """CTC greedy search that takes frames as they come: the best token per frame, repeats and blanks removed.

    Args:
        beam_size: unused; there is one candidate.
        blank_id: the token that means "nothing new".
    """

    def __init__(self, beam_size: int, blank_id: int):
        self.blank_id = blank_id
        self.tokens: list[int] = []
        self.times: list[int] = []  # first frame of each token
        self.best: list[float] = []  # largest log probability within each token's frames
        self.score, self.frame, self.last = 0.0, 0, blank_id

    def advance(self, log_probs: Tensor) -> None:
        """Take frames (T, V)."""
        values, tokens = log_probs.max(dim=-1)
        for value, token in zip(values.tolist(), tokens.tolist()):
            self.score += value
            if token != self.blank_id:
                if token != self.last:
                    self.tokens.append(token)
                    self.times.append(self.frame)
                    self.best.append(value)
                else:
                    self.best[-1] = max(self.best[-1], value)
            self.last = token
            self.frame += 1

    def hypothesis(self) -> Hypothesis:
        """The tokens so far."""
        tokens, times = list(self.tokens), list(self.times)
        return Hypothesis(
            tokens, self.score, times, [tokens], [self.score], [times], list(map(math.exp, self.best)), _mean(self.best)
        )


class _Node:
    """One prefix: a token, the prefix before it, and the known prefixes that go on from it."""

    __slots__ = ("before", "next", "token")

    def __init__(self, token: int, before: _Node | None):
        self.token, self.before = token, before
        self.next: dict[int, _Node] = {}

    def after(self, token: int) -> _Node:
        node = self.next.get(token)
        if node is None:
            node = self.next[token] = _Node(token, self)
        return node

    def tokens(self) -> list[int]:
        found, node = [], self
        while node.before is not None:
            found.append(node.token)
            node = node.before
        return found[::-1]


class _Score:
    """Log probabilities of a prefix: over all paths that end in blank (s) or not (ns), and on the best path (v_)."""

    __slots__ = ("ns", "path_ns", "path_s", "s", "v_ns", "v_s")

    def __init__(self) -> None:
        self.s = self.ns = self.v_s = self.v_ns = NEVER
        self.path_s: tuple | None = None  # (path before, frame, largest log probability) of the last token
        self.path_ns: tuple | None = None

    @property
    def total(self) -> float:
        return _log_add(self.s, self.ns)

    @property
    def best(self) -> float:
        return max(self.v_s, self.v_ns)

    @property
    def path(self) -> tuple | None:
        return self.path_s if self.v_s > self.v_ns else self.path_ns


class PrefixBeam:
    """CTC prefix beam search (Hannun et al., 2014) that takes frames as they come.

    Prefixes are nodes of a tree and times are linked lists, so that a step costs the same late as early.

    Args:
        beam_size: prefixes kept, and tokens looked at per frame.
        blank_id: the token that means "nothing new".
    """

    def __init__(self, beam_size: int, blank_id: int):
        self.beam_size, self.blank_id, self.frame = beam_size, blank_id, 0
        start = _Score()
        start.s = start.v_s = start.v_ns = 0.0
        self.beam: list[tuple[_Node, _Score]] = [(_Node(-1, None), start)]

    def advance(self, log_probs: Tensor) -> None:
        """Take frames (T, V)."""
        values, tokens = log_probs.topk(min(self.beam_size, log_probs.shape[-1]), dim=-1)
        for frame_values, frame_tokens in zip(values.tolist(), tokens.tolist()):
            self._advance_frame(frame_values, frame_tokens)
            self.frame += 1

    def _advance_frame(self, values: list[float], tokens: list[int]) -> None:
        t, found = self.frame, {}

        def score_of(node: _Node) -> _Score:
            score = found.get(node)
            if score is None:
                score = found[node] = _Score()
            return score

        current = [(node, score, score.total, score.best, score.path) for node, score in self.beam]
        for value, token in zip(values, tokens):
            for node, score, total, best, path in current:
                if token == self.blank_id:
                    new = score_of(node)
                    new.s = _log_add(new.s, total + value)
                    new.v_s, new.path_s = best + value, path
                elif token == node.token:
                    new = score_of(node)  # the same token goes on
                    new.ns = _log_add(new.ns, score.ns + value)
                    if new.v_ns < score.v_ns + value:
                        new.v_ns = score.v_ns + value
                        if new.path_ns is None:  # as in WeNet: a token's time is its last frame on the best path
                            new.path_ns = (score.path_ns[0], t, max(score.path_ns[2], value))
                    new = score_of(node.after(token))  # it comes again, after a blank
                    new.ns = _log_add(new.ns, score.s + value)
                    if new.v_ns < score.v_s + value:
                        new.v_ns, new.path_ns = score.v_s + value, (score.path_s, t, value)
                else:
                    new = score_of(node.after(token))
                    new.ns = _log_add(new.ns, total + value)
                    if new.v_ns < best + value:
                        new.v_ns, new.path_ns = best + value, (path, t, value)
        self.beam = sorted(found.items(), key=lambda item: item[1].total, reverse=True)[: self.beam_size]

    def hypothesis(self) -> Hypothesis:
        """The candidates so far."""
        nbest = [node.tokens() for node, _ in self.beam]
        paths = [_unlink(score.path) for _, score in self.beam]
        scores = [score.total for _, score in self.beam]
        times = [[t for t, _ in path] for path in paths]
        best = [value for _, value in paths[0]]
        return Hypothesis(nbest[0], scores[0], times[0], nbest, scores, times, list(map(math.exp, best)), _mean(best))


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """Greedy CTC decoding of (B, T, V) with lengths (B,); scores are of the best path."""
    return [_search(GreedyPath(1, blank_id), row, n) for row, n in zip(log_probs, lengths.tolist())]


def ctc_prefix_beam_search(
    log_probs: Tensor, lengths: Tensor, beam_size: int = 10, blank_id: int = 0
) -> list[Hypothesis]:
    """Prefix beam search over (B, T, V) with lengths (B,)."""
    return [_search(PrefixBeam(beam_size, blank_id), row, n) for row, n in zip(log_probs, lengths.tolist())]


def _search(search: GreedyPath | PrefixBeam, log_probs: Tensor, length: int) -> Hypothesis:
    search.advance(log_probs[:length])
    return search.hypothesis()


def _unlink(path: tuple | None) -> list[tuple[int, float]]:
    found = []
    while path is not None:
        path, t, value = path
        found.append((t, value))
    return found[::-1]


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))


def _mean(log_probs: Sequence[float]) -> float:
    """Geometric mean of probabilities; 0 for none."""
    return math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0


# -- attention ------------------------------------------------------------------------------------------------


def attention_search(
    decoder: Decoder,
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
    return Hypothesis(nbest[0], scored[0], None, nbest, scored, None, confidences, _mean(end))


def attention_rescoring(
    decoder: Decoder,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    found: Sequence[Hypothesis],
    sos: int,
    eos: int,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.0,
) -> list[Hypothesis]:
    """Score the candidates of a CTC prefix beam search with the decoders, and choose again.

    The score is (1 - reverse_weight) * left + reverse_weight * right + ctc_weight * CTC, in log probabilities.

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
    scores = [a + ctc_weight * ctc for a, ctc in zip(decoded, found.nbest_scores)]
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
    )
