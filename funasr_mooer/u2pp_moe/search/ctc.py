"""CTC searches that take frames as they come: greedy, and over prefixes."""

from __future__ import annotations

import math

from torch import Tensor

from funasr_mooer.u2pp_moe.context import ContextGraph, State
from funasr_mooer.u2pp_moe.search.hypothesis import NEVER, Hypothesis, mean_probability

# Shapes: B utterances, T encoder frames, V vocabulary.


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
            tokens,
            self.score,
            times,
            [tokens],
            [self.score],
            [times],
            list(map(math.exp, self.best)),
            mean_probability(self.best),
        )


class _Node:
    """One prefix: a token, the prefix before it, the known prefixes that go on from it, and what hotwords add to it."""

    __slots__ = ("before", "earned", "lent", "next", "state", "token")

    def __init__(self, token: int, before: _Node | None, state: State | None):
        self.token, self.before, self.state = token, before, state
        self.next: dict[int, _Node] = {}
        self.earned = self.lent = 0.0
        if before is not None and state is not None:
            self.earned, self.lent = before.earned + state.earned, state.lent

    def after(self, token: int, context: ContextGraph | None) -> _Node:
        node = self.next.get(token)
        if node is None:
            state = None if context is None else context.step(self.state, token)
            node = self.next[token] = _Node(token, self, state)
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
        context: hotwords; what they add ranks the prefixes, and leaves the probabilities of paths alone.
    """

    def __init__(self, beam_size: int, blank_id: int, context: ContextGraph | None = None):
        self.beam_size, self.blank_id, self.context, self.frame = beam_size, blank_id, context, 0
        start = _Score()
        start.s = start.v_s = start.v_ns = 0.0
        root = _Node(-1, None, None if context is None else context.root)
        self.beam: list[tuple[_Node, _Score]] = [(root, start)]

    def advance(self, log_probs: Tensor) -> None:
        """Take frames (T, V)."""
        values, tokens = log_probs.topk(min(self.beam_size, log_probs.shape[-1]), dim=-1)
        for frame_values, frame_tokens in zip(values.tolist(), tokens.tolist()):
            self._advance_frame(frame_values, frame_tokens)
            self.frame += 1

    def _advance_frame(self, values: list[float], tokens: list[int]) -> None:
        t, context, found = self.frame, self.context, {}

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
                    new = score_of(node.after(token, context))  # it comes again, after a blank
                    new.ns = _log_add(new.ns, score.s + value)
                    if new.v_ns < score.v_s + value:
                        new.v_ns, new.path_ns = score.v_s + value, (score.path_s, t, value)
                else:
                    new = score_of(node.after(token, context))
                    new.ns = _log_add(new.ns, total + value)
                    if new.v_ns < best + value:
                        new.v_ns, new.path_ns = best + value, (path, t, value)
        self.beam = sorted(found.items(), key=_promise, reverse=True)[: self.beam_size]

    def hypothesis(self) -> Hypothesis:
        """The candidates, as if the audio ended here: what unfinished hotwords lent is taken back."""
        beam = sorted(self.beam, key=lambda item: item[1].total + item[0].earned, reverse=True)
        nbest = [node.tokens() for node, _ in beam]
        paths = [_unlink(score.path) for _, score in beam]
        scores = [score.total + node.earned for node, score in beam]
        times = [[t for t, _ in path] for path in paths]
        best = [value for _, value in paths[0]]
        confidences, bonuses = list(map(math.exp, best)), [node.earned for node, _ in beam]
        return Hypothesis(
            nbest[0], scores[0], times[0], nbest, scores, times, confidences, mean_probability(best), bonuses
        )


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """Greedy CTC decoding of (B, T, V) with lengths (B,); scores are of the best path."""
    return [_search(GreedyPath(1, blank_id), row, n) for row, n in zip(log_probs, lengths.tolist())]


def ctc_prefix_beam_search(
    log_probs: Tensor, lengths: Tensor, beam_size: int = 10, blank_id: int = 0, context: ContextGraph | None = None
) -> list[Hypothesis]:
    """Prefix beam search over (B, T, V) with lengths (B,), ``context`` holding hotwords."""
    return [_search(PrefixBeam(beam_size, blank_id, context), row, n) for row, n in zip(log_probs, lengths.tolist())]


def _search(search: GreedyPath | PrefixBeam, log_probs: Tensor, length: int) -> Hypothesis:
    search.advance(log_probs[:length])
    return search.hypothesis()


def _promise(item: tuple[_Node, _Score]) -> float:
    """By what a prefix keeps its place in the beam."""
    node, score = item
    return score.total + node.earned + node.lent


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
