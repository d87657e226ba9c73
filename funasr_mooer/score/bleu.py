"""Translation scores from sacreBLEU (extra ``[score]``): corpus BLEU and chrF with their signatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError, DependencyError
from funasr_mooer.score.error_rate import as_normaliser, compare_ids
from funasr_mooer.score.normalise import Normaliser

BLEU_TOKENISERS = ("13a", "zh", "char")  # into English, into Chinese, into Chinese without a segmenter's opinion


@dataclass(frozen=True)
class Bleu:
    """The translation score of one test set; all numbers on the scale 0 to 100."""

    bleu: float
    interval: tuple[float, float]
    signature: str
    chrf: float
    chrf_signature: str
    normaliser: str
    sentences: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def bleu(
    refs: Mapping[str, str],
    hyps: Mapping[str, str],
    normaliser: str | Normaliser = "none",
    *,
    tokenise: str = "13a",
    allow_extra: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Bleu:
    """Corpus BLEU and chrF by utterance id; a missing translation is an empty one.

    Args:
        refs: one reference translation per utterance.
        hyps: what the system answered.
        normaliser: applied to both sides; published BLEU scores use none.
        tokenise: ``13a`` for English, ``zh`` or ``char`` for Chinese.
        allow_extra: count hypotheses without reference instead of refusing them.
        resamples: bootstrap resamples of the sentences behind BLEU's 95 % interval.
        seed: of the bootstrap.

    Raises:
        DependencyError: sacreBLEU is not installed.
        ConfigError: unknown tokeniser or normaliser.
        DataError: no references, or hypotheses without reference.
    """
    if tokenise not in BLEU_TOKENISERS:
        raise ConfigError(f"BLEU tokeniser '{tokenise}' is not known{suggest(tokenise, BLEU_TOKENISERS)}")
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise DependencyError("BLEU needs sacreBLEU: pip install 'funasr-mooer[score]'") from error

    normalise = as_normaliser(normaliser)
    missing, extra = compare_ids(refs, hyps, allow_extra)
    references = [normalise(text) for text in refs.values()]
    answers = [normalise(hyps.get(utt_id, "")) for utt_id in refs]
    words, characters = BLEU(tokenize=tokenise), CHRF()
    return Bleu(
        bleu=words.corpus_score(answers, [references]).score,
        interval=bootstrap_interval(answers, references, tokenise, resamples, seed),
        signature=str(words.get_signature()),
        chrf=characters.corpus_score(answers, [references]).score,
        chrf_signature=str(characters.get_signature()),
        normaliser=normalise.label,
        sentences=len(refs),
        missing=missing,
        extra=extra,
    )


def bootstrap_interval(
    answers: Sequence[str], references: Sequence[str], tokenise: str, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of corpus BLEU when test sets are drawn from these sentences anew.

    sacreBLEU 2.6 has a bootstrap of its own, which raises TypeError where one resample scores 0, as happens with
    small test sets; and its ``mean +- half`` can go below 0.
    """
    from sacrebleu.metrics import BLEU

    rng = np.random.default_rng(seed)
    metric = BLEU(tokenize=tokenise, effective_order=True)  # only its n-gram counts are used
    sentences = [metric.sentence_score(answer, [reference]) for answer, reference in zip(answers, references)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in sentences])  # (sentences, 4 + 4 + 2)
    scores = []
    for _ in range(resamples):
        drawn = counts[rng.integers(len(counts), size=len(counts))].sum(axis=0).tolist()
        scores.append(BLEU.compute_bleu(drawn[:4], drawn[4:8], drawn[8], drawn[9], smooth_method="exp").score)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
