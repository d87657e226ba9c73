"""Joint ranking of LLM answers and the CTC transcript: by definition, and through a whole model."""

import itertools

import numpy as np
import pytest
import torch

from funasr_mooer.border.build import build_model
from funasr_mooer.errors import ConfigError
from funasr_mooer.mooer.generate import Answer, decode_conf
from funasr_mooer.mooer.rescore import best, candidates, ctc_log_likelihoods, llm_log_likelihoods

EOS, BLANK = 9, 0


def test_candidates_are_the_different_beams_and_the_draft_once():
    beams = [[Answer([1, EOS]), Answer([2, EOS]), Answer([1, EOS])], [Answer([3, EOS])]]
    rows = candidates(beams, drafts=[[2], [4, 5]], eos_id=EOS)
    assert [[answer.token_ids for answer in row] for row in rows] == [[[1, EOS], [2, EOS]], [[3, EOS], [4, 5, EOS]]]


def spelt(path):
    """What a CTC path spells: repeats joined, blanks removed."""
    return [token for token, _ in itertools.groupby(path) if token != BLANK]


@pytest.mark.parametrize("answer", [[], [1], [1, 1], [2, 1], [1, 2, 1]])
def test_ctc_scores_are_sums_over_all_paths_that_spell_the_answer(answer):
    log_probs = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    paths = [path for path in itertools.product(range(3), repeat=4) if spelt(path) == answer]
    total = sum(np.exp(sum(float(log_probs[0, t, token]) for t, token in enumerate(path))) for path in paths)
    (found,) = ctc_log_likelihoods(log_probs, torch.tensor([4]), [answer], BLANK).tolist()
    assert found == pytest.approx(np.log(total), abs=1e-5)


def test_what_frames_cannot_carry_or_ctc_cannot_spell_is_impossible():
    log_probs = torch.zeros(2, 2, 3).log_softmax(-1)
    scores = ctc_log_likelihoods(log_probs, torch.tensor([2, 2]), [[1, 1], [1, BLANK]], BLANK)
    assert scores.tolist() == [-torch.inf, -torch.inf]


def test_the_best_joint_score_wins_and_the_first_beam_where_none_is_possible():
    rows = [[Answer([1, EOS]), Answer([2, EOS])], [Answer([3, EOS]), Answer([4, EOS])]]
    llm, ctc = torch.tensor([-1.0, -2.0, -1.0, -2.0]), torch.tensor([-9.0, -3.0, -torch.inf, -torch.inf])
    assert [a.token_ids[0] for a in best(rows, llm, ctc, ctc_weight=0.1)] == [1, 3]
    chosen = best(rows, llm, ctc, ctc_weight=1.0)
    assert [a.token_ids[0] for a in chosen] == [2, 3]
    assert chosen[0].score == pytest.approx(-5.0)


@pytest.fixture
def heard(tiny_config):
    """A random model with a CTC head, and two utterances of different length."""
    tiny_config["ctc_conf"] = {}
    torch.manual_seed(1)
    model = build_model(tiny_config).eval()
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, n).astype(np.float32) for n in (16000, 30000)]
    return model, *model.features.batch(waves)


def test_llm_scores_are_the_sums_of_next_token_log_probabilities(heard):
    model, feats, lengths = heard
    embeds, counts = model.hear(feats, lengths)
    answers = [[20, 21, model.tokenizer.eos_id], [22, model.tokenizer.eos_id]]
    prompt = model.prompt.ids("asr")
    with torch.no_grad():
        scores = llm_log_likelihoods(model.llm, embeds, counts, prompt, answers)
        for row, answer in enumerate(answers):
            text = model.llm.embed(torch.tensor([prompt[1:] + answer]))
            whole = torch.cat((embeds[row : row + 1, : counts[row]], text), dim=1)
            log_probs = model.llm.model(inputs_embeds=whole).logits[0].double().log_softmax(-1)
            wanted = sum(log_probs[-len(answer) - 1 + i, token] for i, token in enumerate(answer))
            assert float(scores[row]) == pytest.approx(float(wanted), abs=1e-4)


def test_a_large_weight_gives_the_ctc_transcript_and_a_translation_is_left_alone(heard):
    model, feats, lengths = heard
    encoder_out, frames = model.encode(feats, lengths)
    drafts = [path.tokens for path in model.ctc.greedy(encoder_out, frames)]
    for beams in (1, 3):
        conf = decode_conf({"num_beams": beams, "max_new_tokens": 5, "ctc_weight": 1e4})
        answers = model.answer(feats, lengths, "asr", conf)
        assert [answer.token_ids[:-1] for answer in answers] == drafts
        plain = decode_conf({"num_beams": beams, "max_new_tokens": 5})
        assert model.answer(feats, lengths, "ast", conf) == model.answer(feats, lengths, "ast", plain)


def test_a_batch_is_ranked_as_its_utterances_alone(heard):
    model, feats, lengths = heard
    conf = decode_conf({"num_beams": 3, "max_new_tokens": 5, "ctc_weight": 0.3})
    together = model.answer(feats, lengths, "asr", conf)
    for row, n in enumerate(lengths):
        (alone,) = model.answer(feats[row : row + 1, :n], lengths[row : row + 1], "asr", conf)
        assert alone.token_ids == together[row].token_ids
        assert alone.score == pytest.approx(together[row].score, abs=1e-3)


def test_a_weight_without_a_ctc_head_is_refused(tiny_config):
    model = build_model(tiny_config)
    feats, lengths = model.features.batch([np.zeros(16000, np.float32)])
    with pytest.raises(ConfigError, match="ctc_weight: the model has no CTC head"):
        model.answer(feats, lengths, "asr", decode_conf({"ctc_weight": 0.3}))
    with pytest.raises(ConfigError, match="must not be below 0"):
        decode_conf({"ctc_weight": -1.0})
