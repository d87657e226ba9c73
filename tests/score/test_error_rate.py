"""Error rates: the alignment, who counts, and the original scorer's numbers."""

import json
import random

import pytest

from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score.error_rate import (
    Counts,
    align,
    bootstrap_interval,
    count,
    error_rate,
    language,
    read_transcripts,
    tokeniser,
)
from funasr_mooer.score.normalise import Normaliser


def test_an_alignment_names_each_edit():
    assert align("A B C".split(), "A X C D".split()) == [("A", "A"), ("B", "X"), ("C", "C"), (None, "D")]
    assert align([], ["a"]) == [(None, "a")]
    assert align(["a"], []) == [("a", None)]
    assert align([], []) == []


def test_distances_are_rapidfuzzs_on_random_pairs():
    distance = pytest.importorskip("rapidfuzz.distance").Levenshtein.distance
    rng = random.Random(0)
    for _ in range(500):
        ref, hyp = (rng.choices("abcd", k=rng.randint(0, 15)) for _ in range(2))
        pairs = align(ref, hyp)
        assert count(pairs).errors == distance(ref, hyp)
        assert [r for r, _ in pairs if r is not None] == ref
        assert [h for _, h in pairs if h is not None] == hyp


def test_word_error_rate_is_jiwers():
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(1)
    refs, hyps = ({str(u): " ".join(rng.choices("abcde", k=rng.randint(1, 12))) for u in range(50)} for _ in range(2))
    assert error_rate(refs, hyps, "wer").rate == pytest.approx(100 * jiwer.wer([*refs.values()], [*hyps.values()]))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("cer", list("打开light吧ok")), ("wer", ["打开light吧", "ok"]), ("mer", ["打", "开", "light", "吧", "ok"])],
)
def test_each_metric_has_its_tokens(metric, expected):
    assert tokeniser(metric)("打开light吧 ok") == expected


def test_a_missing_hypothesis_is_all_deletions():
    score = error_rate({"a": "x y", "b": "z"}, {"b": "z"}, "wer")
    assert (score.total, score.missing) == (Counts(N=3, D=2), ["a"])


def test_a_hypothesis_without_reference_is_an_error_that_names_it_or_is_counted():
    with pytest.raises(DataError, match=r"utt b has a hypothesis and no reference \(and 1 more\)"):
        error_rate({"a": "x"}, {"a": "x", "b": "y", "c": "z"}, "wer")
    assert error_rate({"a": "x"}, {"a": "x", "b": "y"}, "wer", allow_extra=True).extra == ["b"]


def test_an_empty_reference_counts_its_insertions():
    score = error_rate({"silence": "", "b": "好"}, {"silence": "嗯 嗯", "b": "好"}, "cer")
    assert (score.total, score.rate) == (Counts(N=1, I=2), 200.0)
    assert error_rate({"silence": ""}, {}, "cer").rate == 0.0


def test_no_references_and_unknown_metrics_are_refused():
    with pytest.raises(DataError, match="no references"):
        error_rate({}, {})
    with pytest.raises(ConfigError, match="did you mean 'wer'"):
        error_rate({"a": "b"}, {}, "werr")


def test_answers_in_the_wrong_script_are_counted_and_can_be_left_out():
    refs = {"zh": "今天很好", "en": "good morning", "mixed": "打开 light"}
    score = error_rate(refs, {"zh": "today is fine", "en": "早", "mixed": "打开灯"}, "mer")
    assert score.wrong_script == ["zh", "en"]
    assert score.without_wrong_script == score.utterances["mixed"]


def test_a_run_away_is_longer_than_three_references_and_ten_tokens():
    refs = {"a": "好", "b": "好"}
    assert error_rate(refs, {"a": "好" * 14, "b": "好" * 13}, "cer").runaway == ["a"]


def test_tokens_know_their_language():
    assert [language(token) for token in ("好", "it's", "101", "iphone15", "%", "é")] == [
        "zh", "en", "digits", "other", "other", "en"]  # fmt: skip


def test_the_interval_holds_the_rate_and_comes_out_the_same_each_time():
    rng = random.Random(2)
    utterances = [Counts(N=10, S=rng.randint(0, 4)) for _ in range(200)]
    low, high = bootstrap_interval(utterances)
    assert low < sum(utterances, Counts()).rate < high
    assert high - low < 5
    assert bootstrap_interval(utterances) == (low, high)
    assert bootstrap_interval(utterances, seed=1) != (low, high)


def test_ten_thousand_utterances_take_seconds():
    import time

    rng = random.Random(3)
    refs, hyps = ({str(u): "".join(rng.choices("天地玄黄宇宙洪荒", k=20)) for u in range(2000)} for _ in range(2))
    start = time.process_time()
    error_rate(refs, hyps, "cer")
    assert time.process_time() - start < 6  # a fifth of 10k; 0.8 s when measured


def upper(text: str) -> str:
    """The original scorer's view: case folded, and with --char=1 no Chinese punctuation."""
    return text.upper().replace("，", "").replace("。", "")


@pytest.mark.parametrize(
    ("run", "metric", "normalise"),
    [
        ("char1_v1", "mer", upper),
        ("char1_cs1", "mer", lambda text: text.replace("，", "").replace("。", "")),
        ("word_v1", "wer", str.upper),
    ],
)
def test_counts_are_the_originals_where_a_hypothesis_exists(golden, run, metric, normalise):
    told = json.loads((golden / "mooer/golden/tools.json").read_text(encoding="utf-8"))["wer"][run]
    refs, hyps = (read_transcripts(golden / "mooer/score" / name) for name in ("ref.txt", "hyp.txt"))
    score = error_rate(refs, hyps, metric, Normaliser("test", 1, normalise), allow_extra=True)
    for utt_id, theirs in told["utts"].items():
        ours = score.utterances[utt_id]
        assert {key: getattr(ours, key) for key in "NCSDI"} == {key: theirs[key] for key in "NCSDI"}, utt_id
    # The original leaves a4 out, which has no hypothesis: 3 deletions less.
    assert score.missing == ["a4"]
    kept = error_rate(
        {u: refs[u] for u in told["utts"]}, hyps, metric, Normaliser("test", 1, normalise), allow_extra=True
    )
    assert f"{kept.rate:.2f}" == f"{told['overall']['wer']:.2f}"
    names = {"Mandarin": "zh", "English": "en", "Other": "other"}
    for name, rate in told["clusters"].items():
        assert f"{kept.languages[names[name]].rate:.2f}" == rate, name


def test_transcripts_are_read_by_id_with_file_and_line_in_the_error(tmp_path):
    path = tmp_path / "text"
    path.write_text("\ufeffa 今天\u3000好\nb\n\nc\tx  y \n", encoding="utf-8")
    assert read_transcripts(path) == {"a": "今天\u3000好", "b": "", "c": "x  y"}
    path.write_text("a x\nb y\na z\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"text:3: utt a has a transcript already"):
        read_transcripts(path)
    path.write_bytes("a 今天".encode("gbk"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_transcripts(path)
    with pytest.raises(DataError, match="no such transcript"):
        read_transcripts(tmp_path / "none")
