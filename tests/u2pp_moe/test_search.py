"""Searches: against all paths that there are, alone and in batches."""

import itertools
import math

import pytest
import torch

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.ctc import greedy
from funasr_mooer.u2pp_moe.decoder import MoEBiTransformerDecoder, MoETransformerDecoder
from funasr_mooer.u2pp_moe.search import (
    DecodeConf,
    PrefixBeam,
    attention_rescoring,
    attention_search,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    decode_conf,
)

SOS = EOS = 4


def log_probs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def spelled(path, blank=0):
    """What a CTC path spells."""
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def test_a_wide_beam_finds_the_probability_of_every_text():
    probs = log_probs(5, 3)
    total = {}
    for path in itertools.product(range(3), repeat=5):
        value = math.exp(sum(float(probs[t, token]) for t, token in enumerate(path)))
        total[spelled(path)] = total.get(spelled(path), 0.0) + value
    (found,) = ctc_prefix_beam_search(probs[None], torch.tensor([5]), beam_size=len(total))
    assert len(found.nbest) == len(total)
    for tokens, score in zip(found.nbest, found.nbest_scores):
        assert math.exp(score) == pytest.approx(total[tuple(tokens)], rel=1e-5)
    assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)
    assert sum(map(math.exp, found.nbest_scores)) == pytest.approx(1, rel=1e-5)


def test_a_narrow_beam_is_filled_frame_by_frame_or_at_once_alike():
    probs = log_probs(30, 6)
    whole, pieces = PrefixBeam(4, 0), PrefixBeam(4, 0)
    whole.advance(probs)
    for frame in probs:
        pieces.advance(frame[None])
    assert whole.hypothesis() == pieces.hypothesis()
    found = whole.hypothesis()
    assert all(a < b for a, b in zip(found.times, found.times[1:]))
    assert len(found.times) == len(found.tokens) == len(found.tokens_confidence)


def test_greedy_search_takes_the_best_path():
    probs, lengths = log_probs(3, 20, 5), torch.tensor([20, 11, 1])
    found = ctc_greedy_search(probs, lengths)
    assert [(each.tokens, each.times) for each in found] == [(p.tokens, p.frames) for p in greedy(probs, lengths, 0)]
    assert found[1].score == pytest.approx(float(probs[1, :11].max(-1).values.sum()), rel=1e-5)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    sizes = {"attention_heads": 2, "linear_units": 12, "num_blocks": 2, "n_expert": 3}
    return MoETransformerDecoder(5, 8, **sizes).eval()


@pytest.fixture(scope="module")
def two_ways():
    torch.manual_seed(1)
    sizes = {"attention_heads": 2, "linear_units": 12, "num_blocks": 2, "n_expert": 3}
    return MoEBiTransformerDecoder(5, 8, **sizes).eval()


@pytest.fixture(scope="module")
def audio():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 9, 8, generator=generator), torch.tensor([9, 4, 6])


def test_one_token_at_a_time_the_decoder_says_what_it_says_at_once(decoder, audio):
    tokens = torch.tensor([[SOS, 1, 2, 3], [SOS, 3, 3, 1], [SOS, 0, 1, 2]])
    with torch.no_grad():
        whole = decoder(*audio, tokens, torch.full((3,), 4)).log_softmax(-1)
        cache = decoder.start(*audio)
        steps = torch.stack([decoder.step(tokens[:, i], cache) for i in range(4)], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


def test_candidates_share_their_audio(decoder, audio):
    tokens = torch.randint(0, 5, (6, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = decoder(*audio, tokens, torch.full((6,), 3))
        repeated = [x.repeat_interleave(2, 0) for x in audio]
        apart = decoder(*repeated, tokens, torch.full((6,), 3))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_what_comes_later_and_what_is_padding_change_nothing(decoder, audio):
    tokens = torch.tensor([[SOS, 1, 2, 3]] * 3)
    other, (frames, lengths) = tokens.clone(), audio
    other[:, 2:] = 0
    noisy = frames.masked_fill(torch.arange(9)[None, :, None] >= lengths[:, None, None], 1e3)
    with torch.no_grad():
        a = decoder(*audio, tokens, torch.tensor([4, 4, 4]))
        b = decoder(noisy, lengths, other, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(a[:, :2], b[:, :2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_wide_attention_beam_finds_the_best_of_all_texts(decoder, audio):
    frames, lengths = audio[0][:1, :3], torch.tensor([3])
    (found,) = attention_search(decoder, frames, lengths, SOS, EOS, beam_size=5**3)
    best, score = None, -math.inf
    for size in range(4):
        for tokens in itertools.product(range(4), repeat=size):
            said = torch.tensor([[SOS, *tokens]])
            values = decoder(frames, lengths, said, torch.tensor([size + 1])).log_softmax(-1)[0]
            value = sum(float(values[i, token]) for i, token in enumerate(tokens))
            value += float(values[size, EOS]) if size < 3 else 0.0  # the longest ones are cut before they end
            if value > score:
                best, score = list(tokens), value
    assert found.tokens == best
    assert found.score == pytest.approx(score, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("search", ["attention", "rescoring"])
def test_a_batch_finds_what_its_utterances_find_alone(two_ways, audio, search):
    probs = log_probs(3, 9, 5)

    def run(rows):
        frames, lengths = audio[0][rows], audio[1][rows]
        size = int(lengths.max())
        if search == "attention":
            return attention_search(two_ways, frames[:, :size], lengths, SOS, EOS, beam_size=3)
        found = ctc_prefix_beam_search(probs[rows], lengths, 4)
        return attention_rescoring(two_ways, frames[:, :size], lengths, found, SOS, EOS, 0.3, 0.4)

    together = run([0, 1, 2])
    turned = run([2, 0, 1])
    for row, place in zip(range(3), (1, 2, 0)):
        (alone,) = run([row])
        for other in (together[row], turned[place]):
            assert other.tokens == alone.tokens
            assert other.nbest == alone.nbest
            assert other.nbest_scores == pytest.approx(alone.nbest_scores, abs=1e-4)


@torch.no_grad()
def test_rescoring_is_the_sum_that_it_says(two_ways, audio):
    frames, lengths = audio[0][:1], audio[1][:1]
    (found,) = ctc_prefix_beam_search(log_probs(1, 9, 5), lengths, 4)
    (best,) = attention_rescoring(two_ways, frames, lengths, [found], SOS, EOS, ctc_weight=0.3, reverse_weight=0.4)
    scores = {}
    for tokens, ctc in zip(found.nbest, found.nbest_scores):
        score = 0.3 * ctc
        for decoder, text, weight in (
            (two_ways.left_decoder, tokens, 0.6),
            (two_ways.right_decoder, tokens[::-1], 0.4),
        ):
            said = torch.tensor([[SOS, *text]])
            values = decoder(frames, lengths, said, torch.tensor([said.shape[1]])).log_softmax(-1)[0]
            score += weight * sum(float(values[i, token]) for i, token in enumerate([*text, EOS]))
        scores[tuple(tokens)] = score
    assert tuple(best.tokens) == max(scores, key=scores.get)
    for tokens, score in zip(best.nbest, best.nbest_scores):
        assert score == pytest.approx(scores[tuple(tokens)], abs=1e-4)


def test_settings_that_cannot_work_are_errors(decoder, audio):
    with pytest.raises(ConfigError, match="did you mean 'attention_rescoring'"):
        decode_conf({"method": "attention_rescore"})
    with pytest.raises(ConfigError, match="decoding_chunk_size=0: a chunk holds at least 1 frame"):
        DecodeConf(decoding_chunk_size=0)
    with pytest.raises(ConfigError, match="beam_size=0"):
        DecodeConf(beam_size=0)
    found = ctc_prefix_beam_search(log_probs(3, 9, 5), audio[1], 2)
    with pytest.raises(ConfigError, match="has no right-to-left decoder"):
        attention_rescoring(decoder, *audio, found, SOS, EOS, 0.3, reverse_weight=0.3)
    with pytest.raises(ConfigError, match="n_expert_activated=3 must lie between 1 and n_expert=2"):
        MoETransformerDecoder(5, 8, attention_heads=2, n_expert=2, n_expert_activated=3)
    with pytest.raises(ConfigError, match="use decoder: MoETransformerDecoder"):
        MoEBiTransformerDecoder(5, 8, attention_heads=2, r_num_blocks=0)
