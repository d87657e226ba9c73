"""MooerCTC: learns, decodes with times, saves and loads, and equals itself in batches."""

import numpy as np
import pytest
import torch

from funasr_mooer.border.build import build_model
from funasr_mooer.errors import ConfigError

WORDS = ["<pad>", "<eos>", "a", "b", "c"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tokenizer_dir):
    return {
        "model": "MooerCTC",
        "frontend": "WavFrontend",
        "frontend_conf": {"lfr_m": 7, "lfr_n": 6},
        "tokenizer": "MooerTokenizer",
        "tokenizer_conf": {"init": tokenizer_dir},
        "encoder": "MoEConformerEncoder",
        "encoder_conf": {
            "output_size": 16,
            "attention_heads": 2,
            "linear_units": 24,
            "num_blocks": 1,
            "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0,
            "input_layer": "linear",
            "mlp_type": "position_wise_feed_forward",
            "cnn_module_kernel": 3,
        },
    }


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return build_model(config)


def spoken(words: list[int], frames_each: int = 4) -> torch.Tensor:
    """Features (T, 560) in which each word is a pattern of its own, with silence between."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(len(WORDS), 560, generator=generator)
    patterns[0] = 0
    return torch.cat([patterns[[0] * 2 + [w] * frames_each] for w in words] + [patterns[[0, 0]]])


def batch():
    transcripts = [[2, 3, 4], [3, 3], [4, 2, 2, 3]]
    feats = [spoken(words) for words in transcripts]
    return {
        "feats": torch.nn.utils.rnn.pad_sequence(feats, batch_first=True),
        "feat_lengths": torch.tensor([len(f) for f in feats]),
        "transcript_ids": torch.tensor([words + [0] * (4 - len(words)) for words in transcripts]),
        "transcript_lengths": torch.tensor([len(words) for words in transcripts]),
    }


def test_it_learns_to_hear_and_says_when(model):
    inputs = batch()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-2)
    model.train()
    for _ in range(150):
        loss, stats, weight = model(**inputs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            break
    assert int(weight) == 9
    assert float(stats["loss"]) < 0.1
    results = model.eval().decode(inputs["feats"], inputs["feat_lengths"])
    assert [r["text"] for r in results] == ["a b c", "b b", "c a a b"]
    for result, frames in zip(results, inputs["feat_lengths"]):
        times = result["timestamp"]
        assert len(times) == len(result["token_ids"])
        assert all(a < b for a, b in times)
        assert all(first[1] <= second[0] for first, second in zip(times, times[1:]))
        assert times[-1][1] <= frames * 60


def test_batch_decoding_equals_one_by_one(model):
    inputs = batch()
    together = model.decode(inputs["feats"], inputs["feat_lengths"])
    for row, n, result in zip(inputs["feats"], inputs["feat_lengths"], together):
        assert model.decode(row[None, :n], n[None]) == [result]


def test_audio_goes_in_and_one_result_per_input_comes_out(model):
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    silence, click = np.zeros(16000, np.float32), noise[:200]
    results, meta = model.inference([noise, silence, click], key=["noise", "silence", "click"], return_token_ids=True)
    assert [r["key"] for r in results] == ["noise", "silence", "click"]
    assert "warning" not in results[0]
    assert "silence" in results[1]["warning"]
    assert "shorter than one encoder frame of 60 ms" in results[2]["warning"]
    assert results[1]["text"] == results[2]["text"] == ""
    assert meta["batch_data_time"] == pytest.approx(2.0125)


def test_parts_are_saved_and_loaded(model, config, tmp_path):
    model.save_parts(tmp_path, ["encoder", "ctc"])
    torch.manual_seed(1)
    other = build_model(config)
    other.load_parts(tmp_path, ["encoder", "ctc"])
    inputs = batch()
    assert torch.equal(other(**inputs)[0], model(**inputs)[0])


def test_a_frozen_encoder_trains_the_head_alone(config):
    config["encoder_conf"]["freeze"] = True
    model = build_model(config).train()
    model(**batch())[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "ctc.ctc_lo.weight",
        "ctc.ctc_lo.bias",
    }
    assert not model.encoder.training


def test_frames_of_an_utterance_are_counted_from_its_samples(model):
    samples = np.array([16000, 400, 100])
    assert model.audio_lengths(samples).tolist() == [17, 1, 0]


def test_unknown_settings_are_errors(config, model):
    config["encoder_conf"]["num_bloks"] = 3
    with pytest.raises(ConfigError, match="did you mean 'num_blocks'"):
        build_model(config)
    with pytest.raises(ConfigError, match="decode_conf: MooerCTC does not read it; remove it"):
        build_model({**config, "decode_conf": {"num_beams": 2}})
    with pytest.raises(ConfigError, match="objective 'llm' is unknown to MooerCTC"):
        model.set_objective("llm")
