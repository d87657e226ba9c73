"""Decoding settings and the repetition guard."""

import pytest

from funasr_mooer.errors import ConfigError
from funasr_mooer.mooer.generate import cut_repetition, decode_conf


@pytest.mark.parametrize(
    ("ids", "limit", "expected"),
    [
        ([1, 2, 3], 1, [1, 2, 3]),
        ([1, 1, 1, 1], 0, [1, 1, 1, 1]),
        ([7, 1, 1, 1, 1, 9], 2, [7, 1, 1]),
        ([7, 1, 2, 1, 2, 1, 2, 9], 2, [7, 1, 2, 1, 2]),
        ([1, 2, 1, 2], 2, [1, 2, 1, 2]),
        ([], 1, []),
    ],
)
def test_phrases_are_cut_after_so_many_times_in_a_row(ids, limit, expected):
    assert cut_repetition(ids, limit) == expected


def test_later_settings_win_and_keys_of_others_are_passed_over():
    conf = decode_conf({"num_beams": 4, "eos_bias": -0.1}, {"num_beams": 1, "device": "cpu"})
    assert (conf.num_beams, conf.eos_bias, conf.length_penalty) == (1, -0.1, 0.8)


def test_impossible_settings_say_so():
    with pytest.raises(ConfigError, match="decode_conf.num_beam: unknown key; did you mean 'num_beams'"):
        decode_conf({"num_beam": 4})
    with pytest.raises(ConfigError, match="decode_conf.num_beams=0: must be at least 1"):
        decode_conf({"num_beams": 0})
    for name in ("no_repeat_ngram_size", "repetition_guard", "min_length"):
        with pytest.raises(ConfigError, match=f"decode_conf.{name}=-1: must be at least 0"):
            decode_conf({name: -1})
    with pytest.raises(ConfigError, match="decode_conf.repetition_penalty=0.0: must be above 0"):
        decode_conf({"repetition_penalty": 0.0})
    with pytest.raises(ConfigError, match="decode_conf.num_beams: expected int, found 'four'"):
        decode_conf({"num_beams": "four"})
