"""The mini corpus' sentences: balanced, bilingual, and with a held-out part that stays held out."""

import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

LOCAL = Path(__file__).resolve().parents[2] / "egs/mini/local"


@pytest.fixture(scope="module")
def sentences():
    spec = importlib.util.spec_from_file_location("mini_sentences", LOCAL / "sentences.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def draw(sentences, count, seed=1):
    rng = random.Random(seed)
    return [sentences.sample(rng) for _ in range(count)]


def test_one_token_per_hanzi_and_word_is_enough(sentences):
    for pair in draw(sentences, 3000):
        assert all("\u4e00" <= char <= "\u9fff" for char in pair.zh), pair
        assert all(word.isascii() and word.isalpha() and word.islower() for word in pair.en.split(" ")), pair


def test_a_sentence_has_one_translation_each_way(sentences):
    pairs = set(draw(sentences, 20000))
    assert len({pair.zh for pair in pairs}) == len({pair.en for pair in pairs}) == len({(p.zh, p.en) for p in pairs})


def test_no_kind_but_digit_strings_dominates(sentences):
    share = Counter(pair.kind for pair in draw(sentences, 10000))
    assert 0.30 < share.pop("digits") / 10000 < 0.34
    assert max(share.values()) < 900
    assert min(share.values()) > 330


def test_holding_sentences_out_leaves_every_kind_most_of_its_sentences(sentences):
    test, dev = sentences.heldout_pairs()
    out = Counter(pair.kind for pair in test + dev)
    for kind in sentences.TEMPLATES:
        rng = random.Random(3)
        different = {sentences.sample_kind(kind, rng).zh for _ in range(4000)}
        assert len(different) >= 150, kind
        assert out[kind] <= 0.1 * len(different), kind


def test_dev_and_test_are_disjoint_fixed_and_in_the_proportions_of_training(sentences):
    test, dev = sentences.heldout_pairs()
    assert (len(test), len(dev), len(set(test + dev))) == (120, 60, 180)
    assert len(sentences.heldout()) == 360
    assert sum(pair.kind == "digits" for pair in test) in (38, 39)
    assert sentences.heldout_pairs() == sentences.heldout_pairs(sentences.HELDOUT_SEED)
    assert sentences.heldout(1) != sentences.heldout()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_holds_every_character_and_word_often_and_no_heldout_sentence(sentences, seed):
    pairs = sentences.draw_training(3000, random.Random(seed))
    assert not any(pair.is_in(sentences.heldout()) for pair in pairs)
    used = Counter(token for pair in pairs for token in pair.tokens())
    assert min(used.values()) >= 20
    assert {token for pair in sum(sentences.heldout_pairs(), ()) for token in pair.tokens()} <= used.keys()


@pytest.mark.parametrize(("n", "zh", "en"), [(7, "七", "seven"), (10, "十", "ten"), (40, "四十", "forty")])
def test_numbers_read_as_quantities(sentences, n, zh, en):
    assert sentences.number(n) == (zh, en)
    assert sentences.counted(2) == ("两", "two")
