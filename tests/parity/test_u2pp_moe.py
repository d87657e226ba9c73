"""Our conformer, experts, masks and CTC against numbers that WeNet's own classes produced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.modules.ctc import CTCHead, greedy
from funasr_mooer.modules.feed_forward import activation
from funasr_mooer.modules.masks import chunk_mask, draw_chunk
from funasr_mooer.modules.moe_ffn import MoEFFN, wenet_state_dict


@pytest.fixture(scope="module")
def u2pp(golden: Path) -> Path:
    """The folder of numbers."""
    return golden / "u2pp_moe"


class Model:
    """One model directory: its config, weights, and what WeNet computed with it."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self.config = yaml.safe_load((folder / "train.yaml").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.eval = load_file(folder / "eval.safetensors")
        self.notes = json.loads((folder / "eval.json").read_text())

    def part(self, name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}."): v for key, v in self.weights.items() if key.startswith(f"{name}.")}

    def encoder(self) -> MoEConformerEncoder:
        conf = self.config["encoder_conf"]
        encoder = MoEConformerEncoder(self.config["input_dim"], **conf, global_cmvn=True, pad_with_bias=True)
        encoder.load_state_dict(self.part("encoder"))
        return encoder.eval()

    def ctc(self) -> CTCHead:
        head = CTCHead(self.config["encoder_conf"]["output_size"], self.config["output_dim"], blank_id=0)
        head.load_state_dict(self.part("ctc"))
        return head.eval()

    def modes(self) -> dict[str, tuple[int, int]]:
        """Every decoding mode with numbers: its name, chunk size and left chunks."""
        names = {key.split(".")[1] for key in self.eval if key.startswith("enc.")}
        return {name: _mode(name) for name in sorted(names)}


def _mode(name: str) -> tuple[int, int]:
    """``full`` -> (-1, -1), ``c4l2`` -> (4, 2), ``c4linf`` -> (4, -1)."""
    if name == "full":
        return -1, -1
    chunk, left = name.removeprefix("c").split("l", 1)
    return int(chunk), -1 if left == "inf" else int(left)


@pytest.fixture(scope="module")
def models(u2pp: Path) -> list[Model]:
    """Every model directory."""
    found = [Model(path.parent) for path in sorted(u2pp.glob("*/train.yaml"))]
    assert found
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


# --- experts ---------------------------------------------------------------------------------------------------------


def test_expert_layers_equal_wenet_forward_backward_and_in_routing(u2pp):
    cases = json.loads((u2pp / "moe_ffn.json").read_text())["cases"]
    numbers = load_file(u2pp / "moe_ffn.safetensors")
    assert cases
    for case in cases:
        now = {k.split(".", 1)[1]: v for k, v in numbers.items() if k.split(".", 1)[0] == case["name"]}
        dtype = getattr(torch, case["dtype"])
        layer = MoEFFN(
            case["idim"],
            case["hidden_units"],
            activation(case["activation"]),
            num_experts=case["n_expert"],
            top_k=case["n_expert_activated"],
            bias=case["bias"],
        ).to(dtype)
        layer.load_state_dict({k.removeprefix("state."): v for k, v in now.items() if k.startswith("state.")})
        x = now["x"].clone().requires_grad_()
        y = layer(x)
        (y * now["dy"]).sum().backward()
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y, now["y"], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(x.grad, now["dx"], atol=tolerance, rtol=tolerance)
        chosen, weights = layer.route(x.reshape(-1, x.shape[-1]))
        assert torch.equal(chosen, now["topk_index"].to(chosen)), case["name"]
        torch.testing.assert_close(weights, now["topk_weight"], atol=tolerance, rtol=tolerance)
        with torch.no_grad():  # write gradients where the weights were, to compare them under WeNet's keys
            for p in layer.parameters():
                p.copy_(p.grad)
        ours = wenet_state_dict(layer)
        theirs = {k.removeprefix("grad."): v for k, v in now.items() if k.startswith("grad.")}
        assert ours.keys() == theirs.keys()
        for key, grad in theirs.items():
            # bfloat16 sums in another order: 3 digits
            assert relative(ours[key].float(), grad.float()) < (2e-2 if dtype == torch.bfloat16 else 1e-4), key
            if not grad.any():
                assert not ours[key].any(), f"{case['name']}.{key} must be a zero gradient"


# --- masks -----------------------------------------------------------------------------------------------------------


def test_chunk_masks_equal_wenet(u2pp):
    masks = {k: v for k, v in np.load(u2pp / "misc.npz").items() if k.startswith("chunk_mask_")}
    assert masks
    for name, expected in masks.items():
        size, chunk, left = map(int, name.removeprefix("chunk_mask_").split("_"))
        assert torch.equal(chunk_mask(size, chunk, left), torch.from_numpy(expected).bool()), name


def test_equal_seeds_draw_wenets_chunks(u2pp):
    draws = json.loads((u2pp / "misc.json").read_text())["chunk_draws"]
    assert draws
    for draw in draws:
        torch.manual_seed(draw["torch_seed"])
        chunk, left = draw_chunk(draw["max_len"], draw["dynamic_left"])
        mask = chunk_mask(draw["max_len"], chunk, left)
        found = (min(chunk, draw["max_len"]), int(mask[-1].sum()), int(mask.sum()))
        assert found == (draw["chunk_size"], draw["last_row_visible"], draw["total"]), draw


# --- encoder ---------------------------------------------------------------------------------------------------------


def test_encoders_equal_wenet_in_every_mode_and_so_do_ctc_probabilities(models):
    for model in models:
        encoder, ctc, now = model.encoder(), model.ctc(), model.eval
        assert model.modes()
        for mode, (chunk, left) in model.modes().items():
            with torch.no_grad():
                out, lengths = encoder(now["feats"], now["feats_lengths"], chunk, left)
                log_probs = ctc.log_probs(out)
            assert torch.equal(lengths, now[f"enc.{mode}.lens"])
            for b, n in enumerate(lengths):
                where = f"{model.name} {mode} {b}"
                close(out[b, :n], now[f"enc.{mode}.out"][b, :n], 1e-5, where)
                close(log_probs[b, :n], now[f"enc.{mode}.ctc_logprobs"][b, :n], 1e-4, where)


def test_every_layer_equals_wenet(models):
    for model in models:
        encoder, now, seen = model.encoder(), model.eval, {}
        encoder.embed.register_forward_hook(lambda m, a, out, seen=seen: seen.update(embed=out[0]))
        for i, block in enumerate(encoder.encoders):
            block.register_forward_hook(lambda m, a, out, i=i, seen=seen: seen.update({f"layer{i}": out}))
        length = int(now["feats_lengths"][0])
        with torch.no_grad():
            encoder(now["feats"][:1, :length], now["feats_lengths"][:1], -1)
        for key in (key for key in now if key.startswith("trace.")):
            close(seen[key.removeprefix("trace.")], now[key], 1e-5, f"{model.name} {key}")


def test_streaming_outputs_caches_and_partial_results_equal_wenet(models):
    streams = [(model, stream) for model in models for stream in model.notes.get("stream", ())]
    assert streams
    for model, stream in streams:
        encoder, ctc, now = model.encoder(), model.ctc(), model.eval
        name = f"stream.c{stream['chunk']}l{'inf' if stream['left'] < 0 else stream['left']}"
        feats = now["feats"][stream["utt"]]
        att_cache = cnn_cache = None
        outputs = []
        for i, step in enumerate(stream["steps"]):
            chunk = feats[None, step["start"] : step["end"]]
            with torch.no_grad():
                out, att_cache, cnn_cache = encoder.forward_chunk(
                    chunk, step["offset"], step["required_cache_size"], att_cache, cnn_cache
                )
            outputs.append(out)
            assert list(att_cache.shape) == step["att_cache_shape"]
            assert list(cnn_cache.shape) == step["cnn_cache_shape"]
            if f"{name}.step{i}.att_cache" in now:
                close(att_cache, now[f"{name}.step{i}.att_cache"], 1e-5, f"{model.name} {name} {i}")
                close(cnn_cache, now[f"{name}.step{i}.cnn_cache"], 1e-5, f"{model.name} {name} {i}")
            so_far = torch.cat(outputs, dim=1)
            path = greedy(ctc.log_probs(so_far), torch.tensor([so_far.shape[1]]), ctc.blank_id)[0]
            assert path.tokens == stream["partial_greedy"][i]
        close(so_far, now[f"{name}.out"], 1e-5, f"{model.name} {name}")


def test_checkpoints_are_written_back_under_wenets_keys(models):
    for model in models:
        theirs = model.part("encoder")
        theirs.pop("embed.pos_enc.pe")  # a constant table; older checkpoints do not have it
        ours = wenet_state_dict(model.encoder())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- ctc -------------------------------------------------------------------------------------------------------------


def test_greedy_ctc_equals_wenet(u2pp):
    arrays, cases = np.load(u2pp / "misc.npz"), json.loads((u2pp / "misc.json").read_text())["ctc"]
    assert cases
    for case in cases:
        log_probs = torch.from_numpy(arrays[f"ctc_logp_{case['index']}"])
        lengths = torch.from_numpy(arrays[f"ctc_len_{case['index']}"])
        paths = greedy(log_probs, lengths, case["blank"])
        assert [path.tokens for path in paths] == [result["tokens"] for result in case["greedy"]]


def test_greedy_results_of_the_models_equal_wenet(models):
    for model in models:
        for decode in model.notes["decode"]:
            expected = decode["results"].get("ctc_greedy_search")
            if expected is None or decode["blank_penalty"]:
                continue
            log_probs, lengths = (model.eval[f"enc.{decode['mode']}.{what}"] for what in ("ctc_logprobs", "lens"))
            found = [path.tokens for path in greedy(log_probs, lengths, blank_id=0)]
            assert found == [result["tokens"] for result in expected], (model.name, decode["mode"])


def test_ctc_loss_equals_wenet(models):
    for model in models:
        now, head = model.eval, model.ctc()
        with torch.no_grad():
            loss = head.loss(now["enc.full.out"], now["enc.full.lens"], now["target"], now["target_lengths"])
        per_utterance = float(loss * now["target_lengths"].sum() / len(now["target"]))  # WeNet divides by the batch
        assert per_utterance == pytest.approx(model.notes["losses"]["ctc"], rel=1e-4)


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float, where: str) -> None:
    """Largest difference at most ``atol``."""
    assert ours.shape == theirs.shape, where
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert worst <= atol, f"{where}: {worst}"
