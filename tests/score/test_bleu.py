"""BLEU and chrF are sacreBLEU's own, with every reference counted."""

import sys

import pytest

from funasr_mooer.errors import ConfigError, DataError, DependencyError
from funasr_mooer.score.bleu import bleu

REFS = {
    "a": "The cat sat quietly on the old mat.",
    "b": "Please turn off the light before you go.",
    "c": "It rains in Beijing today.",
}
HYPS = {
    "a": "The cat sat quietly on a mat.",
    "b": "Please turn off the light when you go.",
    "c": "It rains in Beijing today.",
}


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


def test_scores_and_signatures_are_sacrebleus(sacrebleu):
    score = bleu(REFS, HYPS)
    lists = [*HYPS.values()], [[*REFS.values()]]
    assert score.bleu == pytest.approx(sacrebleu.corpus_bleu(*lists).score)
    assert score.chrf == pytest.approx(sacrebleu.corpus_chrf(*lists).score)
    assert score.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert score.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")


def test_the_interval_holds_the_score_and_comes_out_the_same_each_time(sacrebleu):
    score = bleu(REFS, HYPS)
    low, high = score.interval
    assert 0 <= low < score.bleu < high <= 100.001
    assert bleu(REFS, HYPS).interval == score.interval
    alone = {"a": REFS["a"]}  # one sentence: every resample is the test set itself
    score = bleu(alone, {"a": HYPS["a"]}, resamples=3)
    assert score.interval == pytest.approx((score.bleu, score.bleu))
    assert bleu(REFS, {}).interval == (0, 0)


def test_order_does_not_matter_and_a_missing_translation_is_an_empty_one(sacrebleu):
    backwards = dict(reversed(HYPS.items()))
    assert bleu(REFS, backwards, resamples=1).bleu == bleu(REFS, HYPS, resamples=1).bleu
    partly = {"a": HYPS["a"], "b": HYPS["b"]}
    score = bleu(REFS, partly, resamples=1)
    assert score.missing == ["c"]
    assert score.bleu == bleu(REFS, {**partly, "c": ""}, resamples=1).bleu < bleu(REFS, HYPS, resamples=1).bleu


def test_chinese_is_scored_by_its_own_tokenisers(sacrebleu):
    refs, hyps = {"a": "今天北京天气很好"}, {"a": "今天北京天气真好"}
    assert "tok:zh" in bleu(refs, hyps, tokenise="zh").signature
    assert bleu(refs, hyps, tokenise="char").bleu > bleu(refs, hyps, tokenise="13a").bleu


def test_unknown_tokenisers_and_strangers_are_refused(sacrebleu):
    with pytest.raises(ConfigError, match="'14a' is not known"):
        bleu(REFS, HYPS, tokenise="14a")
    with pytest.raises(DataError, match="utt d has a hypothesis and no reference"):
        bleu(REFS, {**HYPS, "d": "who?"})


def test_without_sacrebleu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(DependencyError, match=r"pip install 'funasr-mooer\[score\]'"):
        bleu(REFS, HYPS)
