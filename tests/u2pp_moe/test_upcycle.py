"""A dense model becomes one with experts that says the same, and can part ways from there."""

import pytest
import torch

from funasr_mooer.bin import convert
from funasr_mooer.border.build import build_model
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.model_dir import read_model_dir, write_model_dir
from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.u2pp_moe.upcycle import upcycle

DENSE = {"mlp_type": "position_wise_feed_forward"}


@pytest.fixture
def dense(config, tmp_path):
    for part in ("encoder_conf", "decoder_conf"):
        config[part] |= DENSE
    torch.manual_seed(3)
    model = build_model(config)
    write_model_dir(model, tmp_path / "dense", model.part_names)
    return model


def test_at_the_start_the_experts_say_what_the_dense_model_says(dense, batch, tmp_path):
    command = ["upcycle", "--dense", str(tmp_path / "dense"), "--num-experts", "4", "--out", str(tmp_path / "moe")]
    assert convert.main(command) == 0
    config = read_model_dir(tmp_path / "moe")
    moe = build_model(config)
    assert [config[part]["mlp_type"] for part in ("encoder_conf", "decoder_conf")] == ["moe", "moe"]
    layers = [module for module in moe.modules() if isinstance(module, MoEFFN)]
    assert [(layer.num_experts, layer.top_k) for layer in layers] == [(4, 2)] * 7  # 2 x 2 in the encoder, 3 in decoders
    assert all(layer.gate.weight.abs().max() > 0 for layer in layers)
    audio = (batch["feats"], batch["feat_lengths"])
    with torch.no_grad():
        for name, expected in vars(dense.losses(**batch)).items():
            torch.testing.assert_close(getattr(moe.losses(**batch), name), expected, atol=1e-5, rtol=1e-5)
        (ours, lengths), (expected, _) = moe.encoder(*audio), dense.encoder(*audio)
        for row, target, n in zip(ours, expected, lengths.tolist()):
            torch.testing.assert_close(row[:n], target[:n], atol=1e-5, rtol=1e-5)
    for method in ("ctc_prefix_beam_search", "attention_rescoring"):
        found, expected = (model.decode(*audio, method=method, beam_size=3) for model in (moe, dense))
        assert [each["tokens"] for each in found] == [each["tokens"] for each in expected]


def test_experts_part_ways_in_training_and_the_seed_decides_how(dense, batch, tmp_path):
    first = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(tmp_path / "dense", tmp_path / name, num_experts=4, seed=seed)
        model = build_model(read_model_dir(tmp_path / name))
        first.append(model.encoder.encoders[0].feed_forward)
    assert torch.equal(first[0].gate.weight, first[1].gate.weight)
    assert not torch.equal(first[0].gate.weight, first[2].gate.weight)
    model(**batch)[0].backward()
    assert not torch.equal(first[2].w_1.grad[0], first[2].w_1.grad[1])


def test_what_cannot_be_upcycled_says_why(dense, tmp_path):
    with pytest.raises(ConfigError, match="n_expert_activated=5 must lie between 1 and n_expert=4"):
        upcycle(tmp_path / "dense", tmp_path / "out", num_experts=4, top_k=5)
    upcycle(tmp_path / "dense", tmp_path / "moe")
    with pytest.raises(ConfigError, match=r"moe: encoder_conf.mlp_type is moe already; give a model without experts"):
        upcycle(tmp_path / "moe", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a model directory"):
        upcycle(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
