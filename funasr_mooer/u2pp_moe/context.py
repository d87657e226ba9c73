"""Hotwords: phrases that a CTC search is told to expect, as an Aho-Corasick automaton over tokens.

A phrase of n tokens and weight w adds n * w to the log probability of a text for each time that it stands there.
So that the beam keeps a text until then, a phrase in progress lends what it has earned so far, w per token; it is
taken back when the phrase breaks off or the audio ends. Of several phrases in progress the one that lends most counts.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from funasr_mooer.errors import ConfigError

WEIGHT = 3.0  # per token, where none is given: e^3, a token counts as twenty times as likely
LARGEST_WEIGHT = 50.0  # beyond, a number is rather the last word of its phrase

Hotwords = str | os.PathLike | Sequence | Mapping


class Tokenizer(Protocol):
    """What hotwords need of :class:`~funasr_mooer.u2pp_moe.tokenizer.MooerUnitsTokenizer`."""

    table: Mapping[str, int]

    def split(self, text: str) -> list[str]: ...

    def encode(self, text: str) -> list[int]: ...


class State:
    """How far phrases have come after some tokens: the longest end of the text that begins a phrase.

    Attributes:
        next: states that go on from here, by token.
        shorter: the state of the longest shorter end that begins a phrase; None at the root.
        earned: what phrases that end exactly here add.
        lent: what phrases in progress lend.
    """

    __slots__ = ("earned", "lent", "next", "shorter")

    def __init__(self) -> None:
        self.next: dict[int, State] = {}
        self.shorter: State | None = None
        self.earned = self.lent = 0.0


class ContextGraph:
    """The automaton of some phrases.

    Args:
        phrases: (tokens, weight) each; a phrase that is given twice has the larger weight.

    Attributes:
        root: the state before the first token.
    """

    def __init__(self, phrases: Iterable[tuple[Sequence[int], float]]):
        weights: dict[tuple[int, ...], float] = {}
        for tokens, weight in phrases:
            weights[tuple(tokens)] = max(weight, weights.get(tuple(tokens), 0.0))
        self.root = State()
        for tokens, weight in weights.items():
            self._add(tokens, weight)
        self._link()

    def step(self, state: State, token: int) -> State:
        """The state after one more token."""
        while token not in state.next:
            if state.shorter is None:
                return self.root
            state = state.shorter
        return state.next[token]

    def _add(self, tokens: Sequence[int], weight: float) -> None:
        state = self.root
        for count, token in enumerate(tokens, 1):
            state = state.next.setdefault(token, State())
            if count < len(tokens):
                state.lent = max(state.lent, weight * count)
        state.earned += weight * len(tokens)

    def _link(self) -> None:
        """Breadth first, so that what is shorter is whole before what is longer takes it over."""
        queue = collections.deque([self.root])
        while queue:
            state = queue.popleft()
            for token, after in state.next.items():
                after.shorter = self.root if state.shorter is None else self.step(state.shorter, token)
                after.earned += after.shorter.earned
                after.lent = max(after.lent, after.shorter.lent)
                queue.append(after)


def context_graph(hotwords: Hotwords | None, tokenizer: Tokenizer) -> ContextGraph | None:
    """The automaton of :func:`read_hotwords`, cut into units as transcripts are; None where nothing is asked for.

    Raises:
        ConfigError: a phrase with a unit that the model does not know, or a weight that cannot be meant.
    """
    weights = read_hotwords(hotwords)
    return ContextGraph((_ids(phrase, tokenizer), weight) for phrase, weight in weights.items()) if weights else None


def funasr_hotwords(hotword: Hotwords | None) -> Hotwords | None:
    """FunASR's ``hotword`` as ours: in a string, what stands between blanks are the words; files and lists as they are."""
    return hotword.split() if isinstance(hotword, str) and not _names_file(hotword) else hotword


def read_hotwords(hotwords: Hotwords | None) -> dict[str, float]:
    """Phrases and their weights per token.

    Args:
        hotwords: ``"shanghai, new york 5"`` (phrases between commas or line breaks, each with its weight behind it if
            it has one), a file with a phrase per line, a list of such phrases or of (phrase, weight), or a mapping.

    Raises:
        ConfigError: a file that does not exist, or a weight that is negative or larger than 50.
    """
    found: dict[str, float] = {}
    for phrase, weight in _entries(hotwords):
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise ConfigError(
                f"hotwords: weight {weight:g} of '{phrase}' must lie between 0 and {LARGEST_WEIGHT:g}; "
                f"where the number belongs to the phrase, write a weight behind it: '{phrase} {weight:g} {WEIGHT:g}'"
            )
        found[phrase] = weight
    return found


def _entries(hotwords: Hotwords | None) -> Iterator[tuple[str, float]]:
    if hotwords is None:
        return
    if isinstance(hotwords, Mapping):
        yield from ((str(phrase), float(weight)) for phrase, weight in hotwords.items())
    elif isinstance(hotwords, (str, os.PathLike)):
        yield from map(_entry, filter(str.strip, _lines(hotwords)))
    else:
        for item in hotwords:
            yield _entry(item) if isinstance(item, str) else (str(item[0]), float(item[1]))


def _lines(text: str | os.PathLike) -> list[str]:
    """Of a file, if it names one; else what stands between commas or line breaks."""
    if _names_file(text):
        file = Path(text)
        if not file.is_file():
            raise ConfigError(f"hotwords: {text} does not exist; give a file with a phrase per line, or the phrases")
        return file.read_text(encoding="utf-8").splitlines()
    return text.replace("，", ",").replace("\n", ",").split(",")


def _names_file(text: str | os.PathLike) -> bool:
    return isinstance(text, os.PathLike) or text.endswith(".txt") or os.sep in text


def _entry(line: str) -> tuple[str, float]:
    """``new york 5`` -> (new york, 5)."""
    phrase, _, last = line.strip().rpartition(" ")
    try:
        weight = float(last)
    except ValueError:
        return line.strip(), WEIGHT
    if not phrase or not math.isfinite(weight):
        return line.strip(), WEIGHT
    return phrase.strip(), weight


def _ids(phrase: str, tokenizer: Tokenizer) -> list[int]:
    for unit in tokenizer.split(phrase):
        if unit not in tokenizer.table:
            other = next((form for form in (unit.lower(), unit.upper()) if form in tokenizer.table), None)
            hint = "spell it with the model's units" if other is None else f"write '{other}'"
            raise ConfigError(f"hotwords: '{unit}' of '{phrase}' is not among the model's units; {hint}")
    ids = tokenizer.encode(phrase)
    if not ids:
        raise ConfigError(f"hotwords: '{phrase}' holds nothing that is spoken; leave it out")
    return ids
