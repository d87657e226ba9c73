"""A U2ppMoE as ONNX graphs, in a model directory that decodes and streams through onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer.border.build import build_model
from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.errors import ConfigError, DependencyError
from funasr_mooer.model_dir import write_model_dir
from funasr_mooer.u2pp_moe.model import U2ppMoEModel
from funasr_mooer.u2pp_moe.onnx_graphs import CTCGraph, DecoderGraph, EncoderChunkGraph, EncoderGraph
from funasr_mooer.u2pp_moe.onnx_runtime import CHUNK_FILE, RIGHT_FILE, streams

OPSET = 18
# Of an encoder, what its graphs do not say.
SETTINGS = ("output_size", "frame_ms", "factor", "right_context", "causal", "use_dynamic_chunk", "static_chunk_size")
# The sizes that are free, of every input and output.
FREE = {
    **{name: {0: "batch"} for name in ("lengths", "encoder_lengths", "offsets", "cached")},
    **{name: {0: "batch", 1: "time"} for name in ("encoder_out", "log_probs")},
    **{name: {0: "batch", 1: "candidates", 2: "tokens"} for name in ("tokens", "logits")},
    **{name: {1: "batch"} for name in ("cnn_cache", "new_cnn_cache")},
    "feats": {0: "batch", 1: "frames"},
    "att_cache": {1: "batch", 3: "cache"},
    "new_att_cache": {1: "batch", 3: "seen"},
}


def export(model: U2ppMoEModel, out: str | Path) -> list[Path]:
    """Write ``encoder_full.onnx``, ``encoder_chunk.onnx`` (if the model streams), ``ctc.onnx``, ``decoder.onnx`` and
    ``decoder_right.onnx`` (if there is one), and the model directory around them.

    The directory is used as any other: by ``AutoModel``, ``decode`` and ``stream``. Weights lie
    in the graphs; those of a graph beyond 2 GiB beside it.

    Args:
        model: on the CPU.
        out: the folder to write.

    Returns:
        the graphs.

    Raises:
        ConfigError: a model that is one of graphs already.
        DependencyError: onnx is not installed.
    """
    if not isinstance(model, U2ppMoEModel) or not hasattr(model.encoder, "encoders"):
        raise ConfigError("only a U2ppMoE with its own encoder and decoder can be exported")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    graphs = encoder_graphs(model.encoder, model.features.output_size(), out)
    graphs += [_ctc_graph(model, out), *_decoder_graphs(model, out)]
    config = copy.deepcopy(model.config)
    config |= {"encoder": "MoEOnnxEncoder", "encoder_conf": encoder_conf(model.encoder, graphs[0])}
    config |= {"decoder": "MoEOnnxDecoder", "decoder_conf": {"file": str(out / "decoder.onnx")}}
    config["model_conf"] = {**(config.get("model_conf") or {}), "reverse_weight": model.model_conf.reverse_weight}
    config["ctc_conf"] = {key: value for key, value in config["ctc_conf"].items() if key not in ("init", "fingerprint")}
    running = build_model(config)
    running.ctc.load_state_dict(model.ctc.state_dict())
    write_model_dir(running, out, ["ctc"])
    return graphs


def encoder_conf(encoder: MoEConformerEncoder, file: Path) -> dict[str, Any]:
    """What :class:`OnnxEncoder` is to be built with, for ``encoder_full.onnx`` at ``file``."""
    return {"file": str(file), **{name: getattr(encoder, name) for name in SETTINGS}}


def encoder_graphs(encoder: MoEConformerEncoder, input_size: int, out: Path) -> list[Path]:
    """``encoder_full.onnx`` and, if it streams, ``encoder_chunk.onnx`` of an encoder of features of ``input_size``."""
    size = encoder.right_context + 1 + 5 * encoder.factor
    audio = {"feats": torch.zeros(2, size, input_size), "lengths": torch.tensor([size, size - encoder.factor])}
    chunks = {"chunk_size": torch.tensor(4), "num_left_chunks": torch.tensor(2)}
    outputs = ["encoder_out", "encoder_lengths"]
    found = [write_graph(EncoderGraph(encoder), {**audio, **chunks}, outputs, out / "encoder_full.onnx")]
    if not streams(encoder):
        return found
    att_cache, cnn_cache = encoder.caches()
    L, H, _, size = att_cache.shape
    state = {
        "offsets": torch.tensor([3, 2]),
        "cached": torch.tensor([3, 2]),
        "att_cache": att_cache.new_zeros(L, 2, H, 3, size),
        "cnn_cache": torch.stack([cnn_cache, cnn_cache], dim=1),
    }
    outputs += ["new_att_cache", "new_cnn_cache"]
    return [*found, write_graph(EncoderChunkGraph(encoder), {**audio, **state}, outputs, out / CHUNK_FILE)]


def _ctc_graph(model: U2ppMoEModel, out: Path) -> Path:
    inputs = {"encoder_out": torch.zeros(2, 5, model.encoder.output_size)}
    return write_graph(CTCGraph(model.ctc), inputs, ["log_probs"], out / "ctc.onnx")


def _decoder_graphs(model: U2ppMoEModel, out: Path) -> list[Path]:
    inputs = {
        "encoder_out": torch.zeros(2, 5, model.encoder.output_size),
        "encoder_lengths": torch.tensor([5, 4]),
        "tokens": torch.full((2, 3, 4), model.sos),
    }
    directions = {"decoder.onnx": model.decoder.left_to_right, RIGHT_FILE: model.decoder.right_to_left}
    return [
        write_graph(DecoderGraph(decoder), inputs, ["logits"], out / name)
        for name, decoder in directions.items()
        if decoder is not None
    ]


def write_graph(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path) -> Path:
    """Write one graph, traced with these inputs."""
    if importlib.util.find_spec("onnx") is None:
        raise DependencyError("export needs onnx: pip install 'funasr-mooer[onnx]'")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation, and of Python decisions that no size changes
        # torch's older exporter: the newer one (dynamo=True, torch 2.13) stops, after a minute, at attention over a
        # free number of frames ("Cannot view a tensor with shape ..."); this one takes a second.
        torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: FREE[name] for name in (*inputs, *outputs) if name in FREE},
            opset_version=OPSET,
            dynamo=False,
        )
    return file
