"""Exported models: the same tokens from onnxruntime as from torch, whole and in streams."""

import importlib.util

import numpy as np
import pytest
import torch

from funasr_mooer.auto import AutoModel
from funasr_mooer.border.build import build_model, load_model
from funasr_mooer.errors import CheckpointError, ConfigError, DependencyError
from funasr_mooer.modules.feed_forward import activation
from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.modules.positions import sinusoids as table
from funasr_mooer.u2pp_moe.onnx_export import export, write_graph
from funasr_mooer.u2pp_moe.onnx_graphs import EncoderChunkGraph, EncoderGraph, SparseExperts, sinusoids
from funasr_mooer.u2pp_moe.onnx_runtime import OnnxGraph
from funasr_mooer.u2pp_moe.search import METHODS, DecodeConf
from funasr_mooer.u2pp_moe.streaming import Streamer


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize(("experts", "top_k", "bias"), [(4, 2, True), (3, 1, False), (8, 8, True)])
def test_an_operator_per_expert_is_the_layer_itself(experts, top_k, bias):
    torch.manual_seed(0)
    layer = MoEFFN(6, 10, activation("swish"), experts, top_k, bias=bias).eval()
    for shape in ((1, 1), (2, 7)):
        x = torch.randn(*shape, 6)
        torch.testing.assert_close(SparseExperts(layer)(x), layer(x), atol=1e-6, rtol=1e-5)


def test_computed_positions_are_those_of_the_table():
    torch.testing.assert_close(sinusoids(torch.arange(3, 9)[None], 8), table(9, 8)[:, 3:])


@torch.no_grad()
def test_what_is_exported_is_the_encoder(model):
    feats, lengths = torch.randn(2, 60, 16), torch.tensor([60, 41])
    graph, chunks = EncoderGraph(model.encoder), EncoderChunkGraph(model.encoder)
    for size, left in ((-1, -1), (4, -1), (3, 1)):
        expected, n = model.encoder(feats, lengths, size, left)
        found, m = graph(feats, lengths, torch.tensor(size), torch.tensor(left))
        assert n.tolist() == m.tolist()
        for row, count in enumerate(n.tolist()):
            torch.testing.assert_close(found[row, :count], expected[row, :count], atol=1e-5, rtol=1e-5)
    att_cache, cnn_cache = model.encoder.caches()
    att_cache = torch.randn(*att_cache.shape[:1], 2, att_cache.shape[1], 5, att_cache.shape[3])
    state = (torch.tensor([9, 4]), torch.tensor([5, 4]), att_cache, torch.stack([cnn_cache, cnn_cache], 1))
    for ours, theirs in zip(chunks(feats, lengths, *state), model.encoder.forward_streams(feats, lengths, *state)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def exported(units, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    pytest.importorskip("onnx", reason="needs the extra [onnx]")
    torch.manual_seed(0)
    experts = {"mlp_type": "moe", "n_expert": 3, "n_expert_activated": 2}
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 1}
    encoder = {"output_size": 16, "causal": True, "use_dynamic_chunk": True, "cnn_module_kernel": 5}
    config = {
        "model": "U2ppMoE",
        "frontend_conf": {"window": "povey", "lfr_m": 1, "lfr_n": 1, "n_mels": 16},
        "tokenizer": "MooerUnitsTokenizer",
        "tokenizer_conf": {"init": units},
        "encoder": "MoEConformerEncoder",
        "encoder_conf": {**sizes, **experts, **encoder, "input_layer": "conv2d"},
        "decoder": "MoEBiTransformerDecoder",
        "decoder_conf": {**sizes, **experts, "r_num_blocks": 1},
    }
    model, folder = build_model(config), tmp_path_factory.mktemp("onnx")
    names = [file.name for file in export(model, folder / "first")]
    assert names == ["encoder_full.onnx", "encoder_chunk.onnx", "ctc.onnx", "decoder.onnx", "decoder_right.onnx"]
    (folder / "first").rename(folder / "moved")
    return model, load_model(folder / "moved"), folder / "moved"


@pytest.mark.parametrize("method", METHODS)
def test_onnxruntime_says_what_torch_says(exported, method):
    model, ported, _ = exported
    waves, heard = [noise(16000), noise(9000, 1)], []
    feats, lengths = model.features.batch(waves)
    for chunks in ((-1, -1), (4, 2), (16, -1)):
        conf = DecodeConf(method, *chunks, beam_size=3, blank_penalty=2.0)
        for ours, theirs in zip(ported.decode_with(conf, feats, lengths), model.decode_with(conf, feats, lengths)):
            assert (ours["nbest"], ours["timestamp"]) == (theirs["nbest"], theirs["timestamp"])
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
            heard += theirs["tokens"]
    assert heard or method == "attention"


def test_streams_through_onnxruntime_are_those_of_torch(exported):
    model, ported, _ = exported
    conf = DecodeConf("attention_rescoring", 4, 2, beam_size=3, blank_penalty=2.0)
    waves, results = [noise(16000), noise(9000, 1)], []
    for each in (model, ported):
        streamer = Streamer(each, conf)
        streams = [streamer.open() for _ in waves]
        for start in range(0, 16000, 3000):
            found = [i for i, wave in enumerate(waves) if start < len(wave)]
            ends = [start + 3000 >= len(waves[i]) for i in found]
            streamer.feed([streams[i] for i in found], [waves[i][start : start + 3000] for i in found], ends)
        results.append([torch.cat(stream.segment.encoder_out) for stream in streams])
        results.append([stream.segment.search.hypothesis().nbest for stream in streams])
    for ours, theirs in zip(results[2], results[0]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert results[3] == results[1]


def test_the_ctc_graph_is_the_ctc_head(exported):
    model, _, folder = exported
    frames = torch.randn(2, 9, 16)
    (log_probs,) = OnnxGraph(folder / "ctc.onnx")(frames)
    torch.testing.assert_close(log_probs, model.ctc_log_probs(frames), atol=1e-5, rtol=1e-5)


def test_an_exported_directory_is_a_model_directory(exported):
    model, ported, folder = exported
    wave = noise(16000)
    (theirs,), _ = model.inference([wave])
    (ours,) = AutoModel(model=folder).generate(input=[wave])
    assert (ours["text"], ours["timestamp"]) == (theirs["text"], theirs["timestamp"])
    with pytest.raises(ConfigError, match="only a U2ppMoE with its own encoder and decoder"):
        export(ported, folder / "again")


def test_a_graph_that_is_not_there_is_an_error(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    with pytest.raises(CheckpointError, match="write it with funasr-mooer export"):
        OnnxGraph(tmp_path / "encoder_full.onnx")


def test_an_export_without_onnx_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'funasr-mooer\[onnx\]'"):
        write_graph(torch.nn.Identity(), {"feats": torch.zeros(1)}, ["encoder_out"], tmp_path / "encoder.onnx")
