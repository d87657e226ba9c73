#!/usr/bin/env python3
"""What ONNX costs a mixture of experts: layer and encoder in onnxruntime beside torch, in one run.

    python benchmarks/onnx_moe.py [--json FILE] [--small]

The layer (D 256, H 1024, 8 experts, 2 of them per frame, random routing) with N frames, as exported (an operator per
expert, which gets the frames that chose it), with all experts on all frames and weights of zero, and the dense layer of
the same sizes. The encoder (conv2d, 3 blocks of that size) whole over 12 s and as a stream, a chunk of 16 frames after
64 cached ones, with experts and dense. Ratios are medians of CPU times on one thread; repetitions
alternate.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from common.timing import alternate, write_json
from torch import Tensor, nn

from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.modules.feed_forward import FeedForward, activation
from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.u2pp_moe.onnx_export import encoder_conf, encoder_graphs, write_graph
from funasr_mooer.u2pp_moe.onnx_graphs import SparseExperts
from funasr_mooer.u2pp_moe.onnx_runtime import OnnxEncoder, OnnxGraph

D, H, EXPERTS, FRAMES = 256, 1024, 8, (4, 16, 64, 300)
DENSE = "position_wise_feed_forward"


class AllExperts(nn.Module):
    """Every expert on every frame, as one wide layer; those that were not chosen have weight 0."""

    def __init__(self, experts: MoEFFN):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        experts, frames = self.experts, x.flatten(0, 1)
        chosen, weights = experts.route(frames)
        shares = weights.new_zeros(frames.shape[0], EXPERTS).scatter(1, chosen, weights)
        hidden = experts.activation(F.linear(frames, experts.w_1.flatten(0, 1), experts.b_1.flatten()))
        hidden = hidden.unflatten(1, (EXPERTS, H)) * shares.unsqueeze(2)
        y = F.linear(hidden.flatten(1), experts.w_2.transpose(0, 1).flatten(1)) + shares @ experts.b_2
        return y.view_as(x)


def layers(folder: Path) -> dict[str, float]:
    """CPU time of the layer's forms over torch's, and of experts over dense in each."""
    experts = MoEFFN(D, H, activation("swish"), EXPERTS, 2).eval()
    dense = FeedForward(D, H, activation("swish")).eval()
    graphs = {"onnx": SparseExperts(experts), "onnx_all_experts": AllExperts(experts), "onnx_dense": dense}
    example, outputs = {"feats": torch.randn(2, 5, D)}, ["encoder_out"]
    run = {n: OnnxGraph(write_graph(g, example, outputs, folder / f"{n}.onnx")) for n, g in graphs.items()}
    figures = {}
    for n in FRAMES:
        x = torch.randn(1, n, D)
        candidates = {"torch": experts, "torch_dense": dense, **run}
        times = alternate({k: lambda f=f, x=x: f(x) for k, f in candidates.items()}, 7, seconds=2, warm_up=3)
        for name in ("onnx", "onnx_all_experts"):
            figures[f"layer_{n}_{name}_vs_torch"] = times[name].cpu_ratio(times["torch"])
        for where in ("torch", "onnx"):
            figures[f"layer_{n}_moe_vs_dense_{where}"] = times[where].cpu_ratio(times[f"{where}_dense"])
        figures[f"layer_{n}_torch_ms"] = 1000 * times["torch"].cpu_s
    return figures


def encoders(folder: Path, blocks: int) -> dict[str, float]:
    """CPU time of the encoder in onnxruntime over torch, and of experts over dense in each."""
    sizes = {"output_size": D, "linear_units": H, "num_blocks": blocks, "causal": True, "use_dynamic_chunk": True}
    kinds = {"moe": {"n_expert": EXPERTS}, "dense": {"mlp_type": DENSE}}
    whole, chunk = {}, {}
    feats, lengths = torch.randn(1, 1200, 80), torch.tensor([1200])
    piece, n = torch.randn(1, 67, 80), torch.tensor([67])
    for kind, conf in kinds.items():
        encoder = MoEConformerEncoder(80, **sizes, **conf).eval()
        (folder / kind).mkdir()
        files = encoder_graphs(encoder, 80, folder / kind)
        att_cache, cnn_cache = encoder.caches()
        att_cache = att_cache.new_zeros(blocks, 1, att_cache.shape[1], 64, att_cache.shape[3])
        state = (torch.tensor([64]), torch.tensor([64]), att_cache, cnn_cache.unsqueeze(1))
        for where, each in (("torch", encoder), ("onnx", OnnxEncoder(80, **encoder_conf(encoder, files[0])))):
            whole[f"{kind}_{where}"] = lambda each=each: each(feats, lengths, -1)
            chunk[f"{kind}_{where}"] = lambda each=each, state=state: each.forward_streams(piece, n, *state)
    figures = {}
    for name, candidates in (("encoder_12s", whole), ("encoder_chunk16", chunk)):
        times = alternate(candidates, repetitions=5, seconds=5, warm_up=2)
        for kind in kinds:
            figures[f"{name}_{kind}_onnx_vs_torch"] = times[f"{kind}_onnx"].cpu_ratio(times[f"{kind}_torch"])
        for where in ("torch", "onnx"):
            figures[f"{name}_moe_vs_dense_{where}"] = times[f"moe_{where}"].cpu_ratio(times[f"dense_{where}"])
    return figures


def measure(blocks: int) -> Mapping[str, float]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return layers(Path(folder)) | encoders(Path(folder), blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--small", action="store_true", help="one block, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # onnxruntime takes as many as torch
    torch.manual_seed(0)
    figures = measure(1 if args.small else 3)
    for name, value in figures.items():
        print(f"{name:40} {value:.3f}")
    if args.json:
        write_json(args.json, {name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
