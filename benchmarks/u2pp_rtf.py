#!/usr/bin/env python3
"""The encoder of U2++ with experts beside its dense twin: 12 s at once, and streams of 16-frame chunks.

    python benchmarks/u2pp_rtf.py [--blocks 2] [--json FILE]

One process, random weights, noise for features; repetitions alternate. A figure is the median ratio of CPU time on one
thread (``encoder_stream4_vs_dense``: four streams in one batch; 1 would be as fast as dense) or, with ``_wall2``, of
wall time on two threads. ``_rtf`` is CPU seconds per second of audio. Frames of random weights choose experts almost
evenly; a trained router may send neighbours the same way, which reads fewer weights.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from common.timing import Times, alternate, machine, write_json
from torch import nn

from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder

FEATURE_SIZE = 80
FRAME_S = 0.01  # of one feature; four make an encoder frame
CHUNK, LEFT_CHUNKS = 16, 4  # encoder frames; chunks of history
RIGHT_CONTEXT = 3  # features that the convolutions see beyond a chunk
KERNEL = 15
INPUTS = 3  # different ones in turn


def main() -> None:
    args = parse()
    print(machine())
    torch.manual_seed(0)
    twins = {"moe": build(args, "moe"), "dense": build(args, "position_wise_feed_forward")}
    for name, encoder in twins.items():
        print(f"{name:6} {sum(p.numel() for p in encoder.parameters()) / 1e6:.0f} M parameters")
    cases: dict[str, tuple[float, Callable[[nn.Module], Callable[[], object]]]] = {
        "full": (args.seconds, lambda encoder: whole(encoder, args.seconds))
    }
    for streams in args.streams:
        audio_s = streams * CHUNK * 4 * FRAME_S
        cases[f"stream{streams}"] = (audio_s, lambda encoder, streams=streams: chunks(encoder, streams, args.heads))
    print(f"\n{'':10} {'moe RTF':>9} {'dense RTF':>9}   moe / dense: CPU, 1 thread   wall, 2 threads")
    figures: dict[str, float] = {}
    for case, (audio_s, prepare) in cases.items():
        runs = {name: prepare(encoder) for name, encoder in twins.items()}
        torch.set_num_threads(1)
        one = alternate(runs, args.repetitions, args.case_seconds)
        torch.set_num_threads(2)
        two = alternate(runs, args.repetitions, args.case_seconds)
        figures |= report(case, audio_s, one, two)
    if args.json:
        write_json(args.json, figures)


def build(args: argparse.Namespace, mlp_type: str) -> MoEConformerEncoder:
    """One of the twins, ready to infer."""
    return MoEConformerEncoder(
        input_size=FEATURE_SIZE,
        output_size=args.size,
        attention_heads=args.heads,
        linear_units=args.hidden,
        num_blocks=args.blocks,
        cnn_module_kernel=KERNEL,
        causal=True,
        use_dynamic_chunk=True,
        mlp_type=mlp_type,
        n_expert=args.experts,
        n_expert_activated=args.top_k,
    ).eval()


def whole(encoder: MoEConformerEncoder, seconds: float) -> Callable[[], None]:
    """A function that encodes the next utterance in full context at each call."""
    frames = round(seconds / FRAME_S)
    turns = itertools.cycle([torch.randn(1, frames, FEATURE_SIZE) for _ in range(INPUTS)])

    @torch.no_grad()
    def run() -> None:
        encoder(next(turns), torch.tensor([frames]))

    return run


def chunks(encoder: MoEConformerEncoder, streams: int, heads: int) -> Callable[[], None]:
    """A function that encodes one chunk of every stream at each call, with a full cache of history behind it."""
    frames = 4 * CHUNK + RIGHT_CONTEXT
    turns = itertools.cycle([torch.randn(streams, frames, FEATURE_SIZE) for _ in range(INPUTS)])
    layers, size, history = len(encoder.encoders), encoder.output_size, CHUNK * LEFT_CHUNKS
    state = {
        "lengths": torch.full((streams,), frames),
        "offsets": torch.full((streams,), 2 * history),
        "cached": torch.full((streams,), history),
        "att_cache": torch.randn(layers, streams, heads, history, 2 * size // heads),
        "cnn_cache": torch.randn(layers, streams, size, KERNEL - 1),
    }

    @torch.no_grad()
    def run() -> None:
        encoder.forward_streams(next(turns), **state)

    return run


def report(case: str, audio_s: float, one: dict[str, Times], two: dict[str, Times]) -> dict[str, float]:
    """Print a row; the flat figures of a case, from times on one thread and on two."""
    rtf = {name: times.cpu_s / audio_s for name, times in one.items()}
    cpu, wall = one["moe"].cpu_ratio(one["dense"]), two["moe"].wall_ratio(two["dense"])
    print(f"{case:10} {rtf['moe']:9.4f} {rtf['dense']:9.4f} {cpu:28.2f} {wall:17.2f}", flush=True)
    return {
        f"encoder_{case}_vs_dense": round(cpu, 3),
        f"encoder_{case}_vs_dense_wall2": round(wall, 3),
        f"encoder_{case}_moe_rtf": round(rtf["moe"], 4),
        f"encoder_{case}_dense_rtf": round(rtf["dense"], 4),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16, help="conformer blocks; 16 with experts hold 3.5 GB twice")
    parser.add_argument("--size", type=int, default=640, help="model size D")
    parser.add_argument("--hidden", type=int, default=2560, help="inner size H of one expert and of the dense layers")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the utterance in full context")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16], help="parallel streams, one case each")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds per case at least")
    parser.add_argument("--case-seconds", type=float, default=3.0, help="go on with a case for so long")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
