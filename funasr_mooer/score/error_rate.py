"""Character, word and mixed error rates from an edit-distance alignment; every reference counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score.normalise import IDEOGRAPHS, KANA, Normaliser, get_normaliser

Pair = tuple[str | None, str | None]  # (reference token, hypothesis token); None where one side has nothing

_MIXED_TOKEN = re.compile(rf"[{IDEOGRAPHS}{KANA}]|[^\s{IDEOGRAPHS}{KANA}]+")
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")

TOKENISERS = {
    "cer": lambda text: list("".join(text.split())),  # every character, Latin letters too; spaces are not counted
    "wer": str.split,
    "mer": _MIXED_TOKEN.findall,  # CJK characters and Latin words: MooER's and WeNet's `compute-wer --char=1`
}


@dataclass(frozen=True)
class Counts:
    """What an alignment counts: reference tokens N, substitutions S, deletions D, insertions I."""

    N: int = 0
    S: int = 0
    D: int = 0
    I: int = 0  # noqa: E741  the field's letter for insertions

    @property
    def C(self) -> int:
        """Correct tokens."""
        return self.N - self.S - self.D

    @property
    def errors(self) -> int:
        """S + D + I."""
        return self.S + self.D + self.I

    @property
    def rate(self) -> float:
        """Errors in per cent of N; for an empty reference each insertion is 100."""
        return 100.0 * self.errors / max(self.N, 1)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.N + other.N, self.S + other.S, self.D + other.D, self.I + other.I)


@dataclass(frozen=True)
class ErrorRate:
    """The score of one test set; percentages throughout."""

    metric: str
    normaliser: str
    total: Counts
    interval: tuple[float, float]
    utterances: dict[str, Counts]
    languages: dict[str, Counts]
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong_script: list[str] = field(default_factory=list)
    runaway: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The error rate over all references."""
        return self.total.rate

    @property
    def without_wrong_script(self) -> Counts:
        """Counts over the utterances that were answered in a script of their reference."""
        wrong = set(self.wrong_script)
        return sum((counts for utt, counts in self.utterances.items() if utt not in wrong), Counts())

    @property
    def signature(self) -> str:
        """How the number was made, in one word for a table."""
        return f"{self.metric}|norm:{self.normaliser}|utts:{len(self.utterances)}"


def read_transcripts(path: str | Path) -> dict[str, str]:
    """Read a Kaldi ``text`` file, ``utt_id words ...`` a line; an id alone is an empty transcript.

    Raises:
        DataError: no such file, not UTF-8, or an id that occurs twice (file and line are named).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such transcript file")
    texts: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                utt_id, *words = line.split(maxsplit=1) or [""]
                if utt_id in texts:
                    raise DataError(f"{path}:{number}: utt {utt_id} has a transcript already; keep one line per id")
                if utt_id:
                    texts[utt_id] = words[0].strip() if words else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    return texts


def error_rate(
    refs: Mapping[str, str],
    hyps: Mapping[str, str],
    metric: str = "mer",
    normaliser: str | Normaliser = "basic",
    *,
    allow_extra: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> ErrorRate:
    """Score hypotheses against references, both by utterance id.

    A reference without hypothesis is all deletions. An answer has the wrong script where a reference has CJK
    characters and no Latin letters and the answer the reverse, or the other way round; it is a run-away where
    it is longer than 3 times its reference + 10 tokens.

    Args:
        refs: every utterance of the test set.
        hyps: what was recognised.
        metric: ``cer``, ``wer`` or ``mer``.
        normaliser: applied to both sides.
        allow_extra: count hypotheses without reference instead of refusing them.
        resamples: bootstrap resamples of the utterances behind the 95 % interval.
        seed: of the bootstrap.

    Raises:
        ConfigError: unknown metric or normaliser.
        DataError: no references, or hypotheses without reference.
    """
    tokens, normalise = tokeniser(metric), as_normaliser(normaliser)
    missing, extra = compare_ids(refs, hyps, allow_extra)
    utterances: dict[str, Counts] = {}
    languages: dict[str, Counts] = {}
    wrong_script, runaway = [], []
    for utt_id, text in refs.items():
        ref_text, hyp_text = normalise(text), normalise(hyps.get(utt_id, ""))
        ref, hyp = tokens(ref_text), tokens(hyp_text)
        pairs = align(ref, hyp)
        utterances[utt_id] = count(pairs)
        for name, counts in _by_language(pairs).items():
            languages[name] = languages.get(name, Counts()) + counts
        if {_script(ref_text), _script(hyp_text)} == {"zh", "en"}:
            wrong_script.append(utt_id)
        if len(hyp) > 3 * len(ref) + 10:
            runaway.append(utt_id)
    return ErrorRate(
        metric=metric,
        normaliser=normalise.label,
        total=sum(utterances.values(), Counts()),
        interval=bootstrap_interval(list(utterances.values()), resamples, seed),
        utterances=utterances,
        languages=dict(sorted(languages.items(), key=lambda item: -item[1].N)),
        missing=missing,
        extra=extra,
        wrong_script=wrong_script,
        runaway=runaway,
    )


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[Pair]:
    """A cheapest alignment of two token sequences; every edit costs 1.

    Where several cost the same, the one is taken that, read from the end, deletes before it inserts and inserts
    before it substitutes, so the split into S, D and I is always the same.
    """
    cost = _distances(ref, hyp)
    pairs: list[Pair] = []
    i, j = len(ref), len(hyp)
    while i or j:
        here = cost[i][j]
        if i and cost[i - 1][j] + 1 == here:
            i -= 1
            pairs.append((ref[i], None))
        elif j and cost[i][j - 1] + 1 == here:
            j -= 1
            pairs.append((None, hyp[j]))
        else:
            i, j = i - 1, j - 1
            pairs.append((ref[i], hyp[j]))
    return pairs[::-1]


def count(pairs: Sequence[Pair]) -> Counts:
    """N, S, D, I of an alignment."""
    deleted = sum(hyp is None for _, hyp in pairs)
    inserted = sum(ref is None for ref, _ in pairs)
    different = sum(ref != hyp for ref, hyp in pairs)
    return Counts(N=len(pairs) - inserted, S=different - deleted - inserted, D=deleted, I=inserted)


def language(token: str) -> str:
    """``zh``, ``en`` or ``digits`` for a token of one kind of letters, ``other`` for the rest."""
    kinds = {_kind(char) for char in token if char.isalnum()}
    return kinds.pop() if len(kinds) == 1 else "other"


def bootstrap_interval(utterances: Sequence[Counts], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the error rate, per cent, when test sets are drawn from these utterances anew."""
    rng = np.random.default_rng(seed)
    errors = np.array([counts.errors for counts in utterances])
    totals = np.array([counts.N for counts in utterances])
    rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(utterances), size=len(utterances))
        rates.append(100.0 * errors[drawn].sum() / max(totals[drawn].sum(), 1))
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def tokeniser(metric: str) -> Callable[[str], list[str]]:
    """The function from text to tokens that ``metric`` counts."""
    if metric not in TOKENISERS:
        raise ConfigError(f"metric '{metric}' is not an error rate{suggest(metric, TOKENISERS)}")
    return TOKENISERS[metric]


def as_normaliser(normaliser: str | Normaliser) -> Normaliser:
    """A normaliser as it is, or found by its name."""
    return normaliser if isinstance(normaliser, Normaliser) else get_normaliser(normaliser)


def compare_ids(
    refs: Mapping[str, str], hyps: Mapping[str, str], allow_extra: bool = False
) -> tuple[list[str], list[str]]:
    """Ids of references without hypothesis, and of hypotheses without reference.

    Raises:
        DataError: there is no reference at all, or the second list is not empty and ``allow_extra`` is false.
    """
    if not refs:
        raise DataError("there are no references to score against")
    missing = [utt_id for utt_id in refs if utt_id not in hyps]
    extra = [utt_id for utt_id in hyps if utt_id not in refs]
    if extra and not allow_extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise DataError(
            f"utt {extra[0]} has a hypothesis and no reference{more}; "
            "is this the right test set? --allow-extra counts them and goes on"
        )
    return missing, extra


def _distances(ref: Sequence[str], hyp: Sequence[str]) -> list[list[int]]:
    """Edit distances of all prefixes, ``[len(ref) + 1][len(hyp) + 1]``; one NumPy step per reference token."""
    ids = {token: number for number, token in enumerate({*ref, *hyp})}
    hyp_ids = np.array([ids[token] for token in hyp], dtype=np.int32)
    columns = np.arange(len(hyp) + 1, dtype=np.int32)
    cost = np.empty((len(ref) + 1, len(hyp) + 1), dtype=np.int32)
    cost[0], cost[:, 0] = columns, np.arange(len(ref) + 1)
    for i, token in enumerate(ref, 1):
        above, row = cost[i - 1], cost[i]
        row[1:] = np.minimum(above[1:] + 1, above[:-1] + (hyp_ids != ids[token]))
        # Insertions run along the row: cost[i][j] = min over k <= j of row[k] + (j - k).
        np.minimum.accumulate(row - columns, out=row)
        row += columns
    return cost.tolist()


def _by_language(pairs: Sequence[Pair]) -> dict[str, Counts]:
    """Counts per language of the reference token; an insertion counts for the inserted token's language."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(language(pair[0] or pair[1] or ""), []).append(pair)
    return {name: count(group) for name, group in groups.items()}


def _kind(char: str) -> str:
    if _IDEOGRAPH.match(char):
        return "zh"
    if _LATIN.match(char):
        return "en"
    return "digits" if unicodedata.category(char) == "Nd" else "other"


def _script(text: str) -> str:
    """``zh`` or ``en`` where a text has letters of one of them only, else nothing."""
    chinese, latin = bool(_IDEOGRAPH.search(text)), bool(_LATIN.search(text))
    return "" if chinese == latin else "zh" if chinese else "en"
