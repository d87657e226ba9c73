"""Hotwords add what they say: to every text by definition, to searches, streams and AutoModel; and take back what they lent."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from funasr_mooer.auto import AutoModel
from funasr_mooer.errors import ConfigError
from funasr_mooer.model_dir import write_model_dir
from funasr_mooer.u2pp_moe.context import ContextGraph, context_graph, read_hotwords
from funasr_mooer.u2pp_moe.decoder import MoETransformerDecoder
from funasr_mooer.u2pp_moe.search import DecodeConf, PrefixBeam, attention_rescoring, ctc_prefix_beam_search
from funasr_mooer.u2pp_moe.streaming import Streamer
from funasr_mooer.u2pp_moe.tokenizer import MooerUnitsTokenizer, write_units

PHRASES = [((1, 2), 1.0), ((1, 1), 0.5), ((2, 1, 2), 2.0), ((2,), 0.25), ((1, 2, 2, 1), 1.5)]


def earned(text, phrases):
    """Weight times tokens, for each place where a phrase stands."""
    places = [(p, w) for p, w in phrases for i in range(len(text)) if tuple(text[i : i + len(p)]) == p]
    return sum(weight * len(phrase) for phrase, weight in places)


def lent(text, phrases):
    """Weight times tokens so far, of the phrase in progress for which it is most."""
    begun = [(k, w) for p, w in phrases for k in range(1, len(p)) if tuple(text[-k:]) == p[:k]]
    return max((k * weight for k, weight in begun), default=0.0)


def log_probs(frames, vocab, seed=0):
    return torch.randn(frames, vocab, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def test_the_automaton_counts_every_phrase_and_the_best_one_in_progress():
    draw = random.Random(0)
    for trial in range(60):
        drawn = {tuple(draw.choices((1, 2, 3), k=draw.randint(1, 4))): draw.randint(0, 8) / 4 for _ in range(4)}
        phrases = list(drawn.items()) if trial else PHRASES
        graph, text = ContextGraph(phrases), draw.choices((1, 2, 3, 4), k=12)
        state, sum_earned = graph.root, 0.0
        for n, token in enumerate(text, 1):
            state = graph.step(state, token)
            sum_earned += state.earned
            assert sum_earned == earned(text[:n], phrases), (phrases, text[:n])
            assert state.lent == lent(text[:n], phrases), (phrases, text[:n])


def test_a_wide_beam_gives_every_text_its_probability_and_its_phrases():
    probs, total = log_probs(5, 3), {}
    for path in itertools.product(range(3), repeat=5):
        text = tuple(token for token, _ in itertools.groupby(path) if token)
        total[text] = total.get(text, 0.0) + math.exp(sum(float(probs[t, token]) for t, token in enumerate(path)))
    (found,) = ctc_prefix_beam_search(probs[None], torch.tensor([5]), len(total), context=ContextGraph(PHRASES))
    assert len(found.nbest) == len(total)
    for tokens, score, bonus in zip(found.nbest, found.nbest_scores, found.bonuses):
        assert bonus == pytest.approx(earned(tokens, PHRASES))
        assert score == pytest.approx(math.log(total[tuple(tokens)]) + bonus, abs=1e-4)
    assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)


def test_weight_0_changes_nothing():
    probs, lengths = torch.stack([log_probs(30, 6, seed) for seed in range(3)]), torch.tensor([30, 21, 9])
    nothing = ContextGraph([((1, 2), 0.0), ((3,), 0.0)])
    assert ctc_prefix_beam_search(probs, lengths, 4, context=nothing) == ctc_prefix_beam_search(probs, lengths, 4)


def scores(found):
    return {tuple(tokens): score for tokens, score in zip(found.nbest, found.nbest_scores)}


def near_tie():
    """ "1 2" is a little more likely than "1 3"."""
    return torch.tensor([[0.02, 0.94, 0.02, 0.02], [0.94, 0.02, 0.02, 0.02], [0.04, 0.02, 0.48, 0.46]]).log()


def test_a_hotword_turns_a_near_tie_around():
    probs, lengths = near_tie()[None], torch.tensor([3])
    assert ctc_prefix_beam_search(probs, lengths, 4)[0].tokens == [1, 2]
    assert ctc_prefix_beam_search(probs, lengths, 4, context=ContextGraph([((1, 3), 1.0)]))[0].tokens == [1, 3]


def test_a_phrase_in_progress_keeps_its_place_and_what_it_lent_is_taken_back():
    search, plain = PrefixBeam(99, 0, ContextGraph([((1, 3, 1, 2, 1), 1.0)])), PrefixBeam(99, 0)
    for frames, leader in ((near_tie(), [1, 3]), (torch.tensor([[0.01, 0.01, 0.97, 0.01]]).log(), [1, 2])):
        for each in (search, plain):
            each.advance(frames)
        assert (
            search.beam[0][0].tokens() == leader
        )  # it leads while it may still become the phrase, until it breaks off
        found, expected = search.hypothesis(), plain.hypothesis()
        assert found.tokens == expected.tokens  # as if the audio ended here
        assert scores(found) == pytest.approx(scores(expected))


def test_decoding_hears_hotwords_alike_at_once_in_pieces_and_as_each_form_of_the_setting(model, tmp_path):
    wave = np.random.default_rng(0).normal(0, 0.1, 14000).astype(np.float32)
    (tmp_path / "hot.txt").write_text("cd 20\nab\n")
    forms = ["cd 20, ab", str(tmp_path / "hot.txt"), tmp_path / "hot.txt", ["cd 20", ("ab", 3)], {"cd": 20.0, "ab": 3}]
    write_model_dir(model, tmp_path / "model", model.part_names)
    auto = AutoModel(model=tmp_path / "model", device="cpu")
    for method in ("ctc_prefix_beam_search", "attention_rescoring"):
        chunks = {"method": method, "decoding_chunk_size": 4}
        feats = model.features(wave)[None]
        lengths = torch.tensor([feats.shape[1]])
        (plain,) = model.decode(feats, lengths, **chunks)
        (hot,) = model.decode(feats, lengths, hotwords=forms[0], **chunks)
        assert model.decode(feats, lengths, hotwords={"cd": 0.0}, **chunks) == [plain]
        assert "cd" in hot["text"]
        assert "cd" not in plain["text"]
        for form in forms[1:]:
            assert model.decode(feats, lengths, hotwords=form, **chunks) == [hot]
        assert auto.generate(wave, hotwords=forms[1], **chunks)[0]["text"] == hot["text"]
        streamer, cache = Streamer(model, DecodeConf(**chunks, hotwords=forms[0])), {}
        stream = streamer.open()
        for start in range(0, 14000, 3500):
            piece, last = wave[start : start + 3500], start == 10500
            (result,) = streamer.feed([stream], [piece], last)
            (other,) = auto.generate(piece, cache=cache, is_final=last, hotwords=forms[3], **chunks)
        assert result["tokens"] == hot["tokens"]
        assert other["text"] == hot["text"]
        assert result["score"] == pytest.approx(hot["score"], abs=1e-3)


def test_funasrs_hotword_is_the_same_setting_with_words_between_blanks(model, tmp_path):
    wave = np.random.default_rng(0).normal(0, 0.1, 14000).astype(np.float32)
    (tmp_path / "hot.txt").write_text("cd\nab a\n")
    write_model_dir(model, tmp_path / "model", model.part_names)
    auto = AutoModel(model=tmp_path / "model", device="cpu")

    def bonuses(**setting):
        return auto.generate(wave, return_token_ids=True, **setting)[0]["bonuses"]

    assert bonuses(hotword="cd ab  a") == bonuses(hotwords=["cd", "ab", "a"]) != bonuses()
    assert bonuses(hotword=str(tmp_path / "hot.txt")) == bonuses(hotwords=["cd", "ab a"])
    assert bonuses(hotword=["cd", ("ab", 5.0)]) == bonuses(hotwords={"cd": 3.0, "ab": 5.0})
    assert bonuses(hotword="") == bonuses()
    with pytest.raises(ConfigError, match="two spellings of one setting"):
        bonuses(hotword="cd", hotwords="cd")


@torch.no_grad()
def test_rescoring_adds_the_whole_bonus():
    torch.manual_seed(0)
    decoder = MoETransformerDecoder(5, 8, attention_heads=2, linear_units=12, num_blocks=1, n_expert=3).eval()
    audio, probs = (torch.randn(1, 9, 8), torch.tensor([9])), log_probs(9, 4)[None]
    (found,) = ctc_prefix_beam_search(probs, audio[1], 6)
    bonuses = [float(i % 3) for i in range(6)]
    hot = dataclasses.replace(found, nbest_scores=list(map(sum, zip(found.nbest_scores, bonuses))), bonuses=bonuses)
    before, after = (attention_rescoring(decoder, *audio, [each], 4, 4, ctc_weight=0.3)[0] for each in (found, hot))
    for tokens, score, bonus in zip(after.nbest, after.nbest_scores, after.bonuses):
        assert bonus == bonuses[found.nbest.index(tokens)]
        assert score == pytest.approx(scores(before)[tuple(tokens)] + bonus, abs=1e-5)
    assert after.nbest_scores == sorted(after.nbest_scores, reverse=True)


def test_phrases_are_cut_as_transcripts_are(tmp_path):
    write_units(["<blank>", "<unk>", "<sos/eos>", "new", "york", "上海"], tmp_path / "units.txt")
    words = MooerUnitsTokenizer(str(tmp_path / "units.txt"))
    graph = context_graph("new york 2", words)
    assert graph.root.next[3].next[4].earned == 4.0
    write_units(["<blank>", "<unk>", "<sos/eos>", "上", "海", "▁", "x"], tmp_path / "chars.txt")
    assert (
        context_graph("上海 2，x 上", MooerUnitsTokenizer(str(tmp_path / "chars.txt"))).root.next[3].next[4].earned == 4
    )
    assert read_hotwords("上海 2，new york") == {"上海": 2.0, "new york": 3.0}
    assert context_graph(None, words) is context_graph("", words) is None


@pytest.mark.parametrize(
    ("hotwords", "message"),
    [
        ("ab, xa", "'x' of 'xa' is not among the model's units; spell it with the model's units"),
        (["A"], "'A' of 'A' is not among the model's units; write 'a'"),
        ("ab -1", "weight -1 of 'ab' must lie between 0 and 50"),
        (["c 747"], "write a weight behind it: 'c 747 3'"),
        ("lists/hot.txt", r"hotwords: lists/hot.txt does not exist; give a file with a phrase per line"),
    ],
)
def test_hotwords_that_cannot_work_are_errors(model, batch, hotwords, message):
    with pytest.raises(ConfigError, match=message):
        model.decode(batch["feats"], batch["feat_lengths"], hotwords=hotwords)


def test_searches_without_hotwords_say_so():
    with pytest.raises(ConfigError, match="method=attention knows none; use ctc_prefix_beam_search or attention_resc"):
        DecodeConf(method="attention", hotwords="ab")
