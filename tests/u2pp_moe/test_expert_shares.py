"""A U2++ MoE tells, while it trains, which experts its frames went to."""

import pytest

from funasr_mooer.modules.moe_ffn import MoEFFN


def alone(counts):
    """A total over one process."""
    return counts


@pytest.mark.parametrize("recompute", [False, True])
def test_each_layer_counts_the_frames_or_tokens_that_are_no_padding_once(model, batch, recompute):
    model.encoder.gradient_checkpointing = recompute
    for decoder in (model.decoder.left_to_right, model.decoder.right_to_left):
        decoder.gradient_checkpointing = recompute
    model.train()
    model(**batch)[0].backward()
    frames = int(model.encoder.output_lengths(batch["feat_lengths"]).sum())
    tokens = int(batch["transcript_lengths"].sum()) + 3  # and the start of each
    found = model.routing.take(alone)
    assert found.keys() == {name for name, layer in model.named_modules() if isinstance(layer, MoEFFN)}
    for name, counts in found.items():
        assert int(counts.sum()) == 2 * (frames if name.startswith("encoder") else tokens), name


def test_decoding_and_validation_count_nothing(model, batch):
    model.eval()
    model(**batch)
    model.decode(batch["feats"], batch["feat_lengths"])
    assert model.take_figures(alone) == ({}, {})


def test_figures_are_told_by_language(model, batch):
    model.name_languages(["", "en", "zh"])
    languages = batch["transcript_lengths"].new_tensor([1, 2, 1])
    model.train()
    model(**batch, languages=languages)
    line, details = model.take_figures(alone)
    assert set(line) == {"expert_entropy", "expert_max"}
    for part in ("encoder.encoders.0.feed_forward_macaron", "decoder.right_decoder.decoders.0.feed_forward/zh"):
        assert sum(details[f"experts/{part}/share_{e}"] for e in range(4)) == pytest.approx(1)
    assert 0 < line["expert_entropy"] <= 1
    assert line["expert_max"] == max(v for k, v in details.items() if k.count("/") == 2 and k.endswith("/max"))
    assert model.take_figures(alone) == ({}, {})
