"""U2++ MoE against numbers that WeNet's own classes produced: layers, masks, losses, training, searches, streaming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from funasr_mooer.border.build import load_model
from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.modules.ctc import CTCHead, greedy
from funasr_mooer.modules.feed_forward import activation
from funasr_mooer.modules.masks import chunk_mask, draw_chunk
from funasr_mooer.modules.moe_ffn import MoEFFN, wenet_state_dict
from funasr_mooer.modules.splice import IGNORE_INDEX
from funasr_mooer.u2pp_moe import search, wenet
from funasr_mooer.u2pp_moe.loss import teaching
from funasr_mooer.u2pp_moe.model import U2ppMoEModel
from funasr_mooer.u2pp_moe.streaming import Streamer
from funasr_mooer.weights import read_tensors


@pytest.fixture(scope="module")
def u2pp(golden: Path) -> Path:
    """The folder of numbers."""
    return golden / "u2pp_moe"


class Model:
    """One model directory: its config, weights, and what WeNet computed with it."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
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


@pytest.fixture(scope="module")
def systems(models, tmp_path_factory) -> dict[str, U2ppMoEModel]:
    """Every model directory converted and loaded, padding its batches as WeNet does."""
    made = {}
    for model in models:
        folder = tmp_path_factory.mktemp("systems") / model.name
        wenet.to_model_dir(model.folder, folder)
        made[model.name] = load_model(folder, "cpu", ["++encoder_conf.pad_with_bias=true"])
    return made


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


def test_prefix_beam_search_equals_wenet(u2pp):
    arrays, cases = np.load(u2pp / "misc.npz"), json.loads((u2pp / "misc.json").read_text())["ctc"]
    for case in cases:
        log_probs = torch.from_numpy(arrays[f"ctc_logp_{case['index']}"])
        lengths = torch.from_numpy(arrays[f"ctc_len_{case['index']}"])
        found = search.ctc_prefix_beam_search(log_probs, lengths, case["beam"], case["blank"])
        for ours, theirs in zip(found, case["prefix"], strict=True):
            same_hypothesis(dataclasses.asdict(ours), theirs, f"ctc {case['index']}")


# --- decoders and losses ---------------------------------------------------------------------------------------------


def test_decoders_read_and_say_what_wenets_do(models, systems):
    for model in models:
        system, now = systems[model.name], model.eval
        for decoder, theirs, backwards in (
            (system.decoder.left_to_right, ("ys", "left"), False),
            (system.decoder.right_to_left, ("r_ys", "right"), True),
        ):
            if f"dec.{theirs[1]}_logits" not in now:
                assert decoder is None
                continue
            taught = teaching(now["target"], now["target_lengths"], system.sos, system.eos, backwards)
            said = taught.targets != IGNORE_INDEX
            assert torch.equal(taught.inputs, now[f"dec.{theirs[0]}_in"]), model.name
            assert torch.equal(taught.targets[said], now[f"dec.{theirs[0]}_out"][said]), model.name
            with torch.no_grad():
                logits = decoder(now["enc.full.out"], now["enc.full.lens"], taught.inputs, taught.lengths)
            close(logits[said], now[f"dec.{theirs[1]}_logits"][said], 1e-4, f"{model.name} {theirs[1]}")


def test_losses_equal_wenet(models, systems):
    names = {"total": "total", "ctc": "ctc", "attention": "att", "left": "att_left", "right": "att_right"}
    for model in models:
        system, now, expected = systems[model.name], model.eval, model.notes["losses"]
        batch = (now["feats"], now["feats_lengths"], now["target"], now["target_lengths"])
        with torch.no_grad():
            found = system.losses(*batch)
            per_token, stats, tokens = system(*batch)
        for ours, theirs in {**names, "accuracy": "acc"}.items():
            if theirs in expected:
                assert float(getattr(found, ours)) == pytest.approx(expected[theirs], rel=1e-5), (model.name, ours)
        assert int(tokens) == int(now["target_lengths"].sum())
        assert float(per_token * tokens) == pytest.approx(expected["total"] * len(now["target"]), rel=1e-5)
        assert float(stats["acc"]) == pytest.approx(expected["acc"])


def test_gradients_and_five_steps_of_training_equal_wenet(models, systems):
    for model in models:
        numbers = load_file(model.folder / "train.safetensors")
        notes = json.loads((model.folder / "train.json").read_text())
        start = {k.removeprefix("init."): v for k, v in numbers.items() if k.startswith("init.")}
        system = systems[model.name]
        trained = {k: v.clone() for k, v in system.state_dict().items()}
        dynamic, system.encoder.use_dynamic_chunk = system.encoder.use_dynamic_chunk, False
        system.load_state_dict(wenet.stack_experts(system, wenet.without_tables(start)))
        system.train()
        batch = [numbers[f"train.{name}"] for name in ("feats", "feats_lengths", "target", "target_lengths")]
        expected = notes["losses"][: notes["usable_steps"]]
        for step, losses in enumerate(expected):
            system.zero_grad()
            found = system.losses(*batch)
            for ours, theirs in (("total", "loss"), ("ctc", "loss_ctc"), ("attention", "loss_att")):
                value = float(getattr(found, ours).detach())
                assert value == pytest.approx(losses[theirs], rel=1e-4), (model.name, step, ours)
            assert float(found.accuracy) == pytest.approx(losses["th_accuracy"], abs=1e-6), (model.name, step)
            found.total.backward()
            if step == 0:
                same_gradients(system, numbers, model.name)
            with torch.no_grad():
                for parameter in system.parameters():
                    parameter -= notes["sgd_lr"] * parameter.grad
        system.encoder.use_dynamic_chunk = dynamic
        system.load_state_dict(trained)
        system.eval()


def same_gradients(system: U2ppMoEModel, numbers: dict[str, torch.Tensor], name: str) -> None:
    """Every gradient, under WeNet's keys; an expert that saw nothing has a gradient of zeros."""
    theirs = {k.removeprefix("train.grad."): v for k, v in numbers.items() if k.startswith("train.grad.")}
    ours = {key: parameter.grad for key, parameter in system.named_parameters()}
    theirs = wenet.stack_experts(system, theirs)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        # the bias before a batch norm changes nothing: its gradient is rounding, on both sides
        if float(gradient.norm()) > 1e-5 or float(ours[key].norm()) > 1e-5:
            assert relative(ours[key], gradient) < 1e-4, f"{name} {key}"
        if gradient.ndim == 3 and key.rsplit(".", 1)[1] in ("w_1", "w_2"):
            idle = ~gradient.flatten(1).any(dim=1)
            assert not ours[key][idle].any(), f"{name} {key}"


# --- decoding --------------------------------------------------------------------------------------------------------


def settings_of(notes: dict) -> dict:
    names = ("beam_size", "ctc_weight", "reverse_weight", "blank_penalty")
    return {name: notes[name] for name in names if name in notes}


def test_all_searches_in_all_modes_equal_wenet(models, systems):
    for model in models:
        system, now, encoded, done = systems[model.name], model.eval, {}, {}
        assert model.notes["decode"]
        for decode in model.notes["decode"]:
            chunks = (decode["chunk"], decode["left"])
            with torch.no_grad():
                if chunks not in encoded:
                    encoded[chunks] = system.encoder(now["feats"], now["feats_lengths"], *chunks)
            for method, expected in decode["results"].items():
                given = settings_of(decode)
                if method != "attention_rescoring":  # the others take no weights: what is the same is done once
                    given = {key: value for key, value in given.items() if not key.endswith("_weight")}
                place = (chunks, method, *given.values())
                if place not in done:
                    conf = search.DecodeConf(method=method, **given)
                    done[place] = system.recognise(*encoded[chunks], conf)
                found = done[place]
                for ours, theirs in zip(found, expected, strict=True):
                    same_hypothesis(ours, theirs, f"{model.name} {decode['mode']} {method}")


def test_decode_is_the_encoder_and_a_search(models, systems):
    for model in models:
        system, now, decode = systems[model.name], model.eval, model.notes["decode"][-1]
        chunks = {"decoding_chunk_size": decode["chunk"], "num_decoding_left_chunks": decode["left"]}
        for method, expected in decode["results"].items():
            batch = (now["feats"], now["feats_lengths"])
            found = system.decode(*batch, method=method, **chunks, **settings_of(decode))
            for ours, theirs in zip(found, expected, strict=True):
                same_hypothesis(ours, theirs, f"{model.name} {decode['mode']} {method}")


def test_streams_in_pieces_of_any_size_equal_wenets(models, systems):
    streams = [(model, stream) for model in models for stream in model.notes.get("stream", ())]
    assert streams
    for model, stream in streams:
        system, now = systems[model.name], model.eval
        feats = now["feats"][stream["utt"]][: int(now["feats_lengths"][stream["utt"]])]
        name = f"stream.c{stream['chunk']}l{'inf' if stream['left'] < 0 else stream['left']}"
        chunks = {"decoding_chunk_size": stream["chunk"], "num_decoding_left_chunks": stream["left"]}
        weights = rescoring_of(model, stream, system, now[f"{name}.out"])
        for method, (expected,) in stream["decode"].items():
            streamer = Streamer(system, search.DecodeConf(method=method, **chunks, **weights))
            state, partial = streamer.open(), []
            size = 7 if method == "ctc_greedy_search" else 40
            for start in range(0, len(feats), size):
                (result,) = streamer.feed([state], [feats[start : start + size]], final=start + size >= len(feats))
                partial.append(result["tokens"])
            close(torch.cat(state.segment.encoder_out), now[f"{name}.out"][0], 1e-5, f"{model.name} {name}")
            same_hypothesis(result, expected, f"{model.name} {name} {method}")
            if method == "ctc_greedy_search":
                assert [tokens for tokens in partial if tokens and tokens not in stream["partial_greedy"]] == []
                assert partial[-1] == stream["partial_greedy"][-1]


def rescoring_of(model: Model, stream: dict, system: U2ppMoEModel, encoder_out: torch.Tensor) -> dict:
    """The settings of one of the model's decodes that give the stream's score; the folder does not name them."""
    expected = stream["decode"]["attention_rescoring"][0]
    for decode in model.notes["decode"]:
        conf = search.DecodeConf(**settings_of(decode))
        (found,) = system.recognise(encoder_out, torch.tensor([encoder_out.shape[1]]), conf)
        if found["score"] == pytest.approx(expected["score"], abs=1e-4):
            return settings_of(decode)
    raise AssertionError(f"{model.name}: no settings give the score of a stream, {expected['score']}")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_wenet_directories_come_back_bit_for_bit(models, tmp_path):
    for model in models:
        there, back = tmp_path / model.name, tmp_path / f"{model.name}.back"
        wenet.to_model_dir(model.folder, there)
        wenet.to_wenet(there, back)
        ours = read_tensors(back / "final.pt")
        assert ours.keys() == model.weights.keys()
        assert [key for key in ours if not torch.equal(ours[key], model.weights[key])] == []
        assert yaml.safe_load((back / "train.yaml").read_text()) == model.config
        assert (back / "units.txt").read_bytes() == (model.folder / "units.txt").read_bytes()
        for ours, theirs in zip(*(wenet.read_cmvn_stats(folder / "global_cmvn") for folder in (back, model.folder))):
            assert torch.equal(ours, theirs)
        wenet.to_wenet(there, back, tables=False)
        assert read_tensors(back / "final.pt").keys() == {key for key in model.weights if not key.endswith(".pe")}
        wenet.to_model_dir(back, tmp_path / "again")  # a final.pt without tables
        again, first = (load_model(folder).state_dict() for folder in (tmp_path / "again", there))
        assert all(torch.equal(again[key], first[key]) for key in first)


def same_hypothesis(ours: dict, theirs: dict, where: str) -> None:
    """All that WeNet's search gives: tokens and times exactly, scores to 1e-4."""
    for key in ("tokens", "times", "nbest", "nbest_times"):
        if theirs[key] is not None:
            assert ours[key] == theirs[key], (where, key)
    scored = theirs["score"] != 0.0  # searches that give no score say 0
    for key in ("score", "confidence", "tokens_confidence", "nbest_scores"):
        if theirs[key] is not None and (scored and theirs[key] != 0.0):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4), (where, key)


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float, where: str) -> None:
    """Largest difference at most ``atol``."""
    assert ours.shape == theirs.shape, where
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert worst <= atol, f"{where}: {worst}"
