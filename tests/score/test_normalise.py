"""Normalisers: what they change, and what they must not."""

import pytest

from funasr_mooer.errors import ConfigError
from funasr_mooer.score.normalise import NORMALISERS, get_normaliser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I LOVE 北京 so much", "I LOVE北京SO MUCH"),
        ("room 101 is open", "ROOM 101 IS OPEN"),
        ("it’s 5 o'clock now", "IT'S 5 O'CLOCK NOW"),
        ("我 想 要 一 个 iphone 15 pro max", "我想要一个IPHONE 15 PRO MAX"),
        ("Mr. Smith, hello", "MR SMITH HELLO"),
        ("你好，世界。", "你好世界"),
        ("HELLO▁HOW▁ARE▁YOU", "HELLO HOW ARE YOU"),
        ("二〇二四年", "二〇二四年"),
        ("<noise> a b", "A B"),
        ("", ""),
    ],
)
def test_mooer_writes_transcripts_as_mooer_does_with_spaces_around_digits(text, expected):
    assert get_normaliser("mooer")(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ｈello,   World!", "hello world"),
        ("'tis the boys' day, isn't it?", "tis the boys day isn't it"),
        ("3.14 and 50％.", "3.14 and 50%"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("今天，天气。很好！", "今天 天气 很好"),
    ],
)
def test_basic_folds_case_width_and_punctuation_but_keeps_words_whole(text, expected):
    assert get_normaliser("basic")(text) == expected


def test_none_leaves_the_text_alone():
    assert get_normaliser("none")(" A,  b。 ") == "A,  b。"


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalising_twice_changes_nothing(name):
    once = get_normaliser(name)("I LOVE 北京, it’s 3.14 % of ① <b> ﬁne ㍿")
    assert get_normaliser(name)(once) == once


def test_transcripts_agree_with_the_originals_wherever_it_does_not_glue_words(golden):
    import json

    cases = json.loads((golden / "mooer" / "golden" / "tools.json").read_text(encoding="utf-8"))["text_norm"]
    glued = {"u5", "u6", "u7"}  # digits and punctuation: the original's defect
    for case in cases:
        ours = get_normaliser("mooer")(case["text"])
        assert (ours == case["training_target"]) == (case["key"] not in glued), case


def test_an_unknown_name_or_version_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="did you mean 'basic'"):
        get_normaliser("basics")
    with pytest.raises(ConfigError, match="this release has basic@1"):
        get_normaliser("basic@7")
    assert get_normaliser("basic@1").label == "basic@1"
