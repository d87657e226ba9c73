"""The conformer encoder: padding, streaming, memory saving and impossible settings."""

import pytest
import torch

from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.errors import ConfigError


def encoder(**changes) -> MoEConformerEncoder:
    torch.manual_seed(0)
    conf = {
        "input_size": 20,
        "output_size": 16,
        "attention_heads": 2,
        "linear_units": 24,
        "num_blocks": 2,
        "dropout_rate": 0.0,
        "positional_dropout_rate": 0.0,
        "cnn_module_kernel": 5,
        "n_expert": 4,
    }
    model = MoEConformerEncoder(**{**conf, **changes})
    for p in model.parameters():  # biases start at zero: a leak through them would not show
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


LAYOUTS = [
    {"input_layer": "linear"},
    {"input_layer": "linear2"},
    {"input_layer": "conv2d"},
    {"causal": True, "use_dynamic_chunk": True},
    {"mlp_type": "position_wise_feed_forward", "cnn_module_norm": "batch_norm", "input_layer": "linear"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_batch_equals_one_by_one_and_padding_never_leaks(layout):
    model = encoder(**layout)
    feats, lengths = torch.randn(3, 60, 20), torch.tensor([60, 41, 23])
    noisy = feats.clone()
    for row, n in zip(noisy, lengths):
        row[n:] = 1e4
    out, out_lengths = model(noisy, lengths)
    assert torch.equal(out_lengths, model.output_lengths(lengths))
    for b, n in enumerate(lengths):
        alone, _ = model(feats[b : b + 1, :n], lengths[b : b + 1])
        torch.testing.assert_close(out[b, : out_lengths[b]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("chunk", "left"), [(1, -1), (4, -1), (4, 2), (3, 0)])
@pytest.mark.parametrize("input_layer", ["conv2d", "linear", "linear2"])
def test_chunk_by_chunk_equals_the_masked_pass(chunk, left, input_layer):
    model = encoder(causal=True, use_dynamic_chunk=True, input_layer=input_layer)
    feats = torch.randn(1, 71, 20)
    whole, _ = model(feats, torch.tensor([71]), chunk, left)
    factor, context = model.embed.factor, model.embed.right_context
    att_cache = cnn_cache = None
    outputs, offset = [], 0
    for start in range(0, 71 - context, chunk * factor):
        piece = feats[:, start : start + (chunk - 1) * factor + context + 1]
        keep = chunk * left if left >= 0 else -1
        out, att_cache, cnn_cache = model.forward_chunk(piece, offset, keep, att_cache, cnn_cache)
        outputs.append(out)
        offset += out.shape[1]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_on_a_device_the_host_asks_for_no_value(training):
    model = encoder(mlp_type="position_wise_feed_forward", use_dynamic_chunk=True, causal=True).to("meta")
    feats, lengths = torch.zeros(2, 60, 20, device="meta"), torch.tensor([60, 60], device="meta")
    out, lengths = model.train(training)(feats, lengths)  # the meta device has shapes and no values
    assert out.shape == (2, 14, 16)


@pytest.mark.parametrize("mlp_type", ["moe", "position_wise_feed_forward"])
def test_gradient_checkpointing_gives_the_same_gradients(mlp_type):
    grads = []
    for checkpointing in (False, True):
        model = encoder(mlp_type=mlp_type, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(1)
        out, lengths = model(torch.randn(2, 50, 20), torch.tensor([50, 31]))
        out[0].pow(2).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_every_parameter_gets_a_gradient():
    model = encoder().train()
    out, _ = model(torch.randn(2, 50, 20), torch.tensor([50, 31]))
    out.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_an_utterance_longer_than_the_position_table_is_encoded():
    out, lengths = encoder(input_layer="linear", num_blocks=1)(torch.randn(1, 700, 20), torch.tensor([700]))
    assert out.shape == (1, 700, 16)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("input_layer", "frames"), [("conv2d", 4), ("linear2", 1)])
def test_audio_too_short_for_one_frame_has_length_zero(input_layer, frames):
    out, lengths = encoder(input_layer=input_layer)(torch.randn(2, frames, 20), torch.tensor([frames, 1]))
    assert lengths.tolist() == [0, 0]
    assert torch.isfinite(out).all()


def test_frames_know_their_duration():
    assert encoder(input_layer="conv2d").frame_ms == 40
    assert encoder(input_layer="linear").frame_ms == 60
    assert encoder(input_layer="linear2").frame_ms == 120


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_expert_activated": 9}, "n_expert_activated=9 must lie between 1 and n_expert=4"),
        ({"attention_heads": 3}, "attention_heads=3 does not divide output_size=16"),
        ({"cnn_module_kernel": 4}, "the kernel is an odd number"),
        ({"cnn_module_norm": "group_norm"}, "use layer_norm or batch_norm"),
        ({"input_layer": "conv2d6"}, "input_layer='conv2d6' is not supported; use linear or linear2 or conv2d"),
        ({"mlp_type": "gated"}, "mlp_type='gated' is not supported"),
        ({"activation_type": "swich"}, "did you mean 'swish'"),
        ({"static_chunk_size": -1}, "static_chunk_size=-1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_errors(wrong, message):
    with pytest.raises(ConfigError, match=message):
        encoder(**wrong)


def test_impossible_chunks_are_errors():
    feats, lengths = torch.randn(1, 50, 20), torch.tensor([50])
    with pytest.raises(ConfigError, match="chunk_size=0"):
        encoder(causal=True, use_dynamic_chunk=True)(feats, lengths, 0)
    with pytest.raises(ConfigError, match="train it with use_dynamic_chunk: true"):
        encoder()(feats, lengths, 4)
