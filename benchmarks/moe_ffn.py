#!/usr/bin/env python3
"""The layer of experts beside a straightforward loop over experts and beside the dense layer of one expert's size.

    python benchmarks/moe_ffn.py [--quick] [--json FILE]

One process, random weights and frames; repetitions alternate. A figure is the median ratio of CPU time on one thread
(``infer_f32_16_vs_loop``: inference, float32, 16 frames; under 1: ours is faster) or, with ``_wall2``, of wall time on
two threads. bfloat16 is timed where the processor has it; elsewhere it is emulated, some 50 times slower.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.timing import Times, alternate, machine, write_json
from torch import Tensor, nn

from funasr_mooer.device import supports_bf16
from funasr_mooer.modules.feed_forward import FeedForward
from funasr_mooer.modules.moe_ffn import MoEFFN

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # different ones in turn: experts get other numbers of rows each time, as in use
HEAD = f"{'':14} {'ours':>9} {'loop':>9} {'dense':>9}   vs loop  vs dense   vs loop  vs dense"


class LoopOverExperts(nn.Module):
    """The definition, literally: each expert takes the frames that chose it and adds its weighted answer."""

    def __init__(self, size: int, hidden: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(size, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(size, hidden, nn.SiLU()) for _ in range(num_experts))

    def forward(self, frames: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        scores, chosen = self.gate(frames).topk(self.top_k, dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(frames.dtype)
        output = torch.zeros_like(frames)
        for number, expert in enumerate(self.experts):
            frame, place = torch.where(chosen == number)
            output.index_add_(0, frame, weights[frame, place, None] * expert(frames[frame]))
        return output


def main() -> None:
    args = parse()
    print(machine())
    torch.manual_seed(0)
    loop = LoopOverExperts(args.size, args.hidden, args.experts, args.top_k)
    ours = MoEFFN(args.size, args.hidden, nn.SiLU(), args.experts, args.top_k)
    ours.load_state_dict(loop.state_dict())
    layers = {"ours": ours, "loop": loop, "dense": FeedForward(args.size, args.hidden, nn.SiLU())}
    skipped = [name for name in DTYPES if name not in args.dtypes]
    print(f"D {args.size}, H {args.hidden}, E {args.experts}, K {args.top_k}; ms of CPU time on 1 thread, then ratios:")
    print(f"{'':46} CPU, 1 thread       wall, 2 threads\n{HEAD}")
    figures: dict[str, float] = {}
    for dtype, mode, frames in itertools.product(args.dtypes, ("infer", "train"), args.frames):
        runs = candidates(layers, mode, frames, DTYPES[dtype])
        warm_up = INPUTS if mode == "infer" else 1  # oneDNN makes a kernel for every new number of rows, once
        torch.set_num_threads(1)
        one = alternate(runs, args.repetitions, args.seconds, warm_up)
        torch.set_num_threads(2)
        two = alternate(runs, args.repetitions, args.seconds, warm_up)
        figures |= report(f"{mode}_{dtype}_{frames}", one, two)
    if skipped:
        print(
            f"not timed: {', '.join(skipped)} (bfloat16 would be emulated here; --dtypes f32 bf16 runs it all the same)"
        )
    if args.json:
        write_json(args.json, figures)


def candidates(
    layers: dict[str, nn.Module], mode: str, frames: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What to time of every layer, after a check that ours answers as the loop does."""
    learns = mode == "train"
    for layer in layers.values():
        layer.to(dtype).train(learns)
    size = layers["ours"].gate.in_features
    inputs = [torch.randn(frames, size, dtype=dtype, requires_grad=learns) for _ in range(INPUTS)]
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(layers["ours"](inputs[0]), layers["loop"](inputs[0]), atol=tolerance, rtol=tolerance)
    return {name: (training if learns else inference)(layer, inputs) for name, layer in layers.items()}


def inference(layer: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A function that infers from the next input at each call."""
    turns = itertools.cycle(inputs)

    @torch.no_grad()
    def run() -> None:
        layer(next(turns))

    return run


def training(layer: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A function that runs the next input forward and backward at each call; gradients start from none."""
    turns, gradient = itertools.cycle(inputs), torch.randn_like(inputs[0])

    def run() -> None:
        x = next(turns)
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(gradient)

    return run


def report(case: str, one: dict[str, Times], two: dict[str, Times]) -> dict[str, float]:
    """Print a row; the flat figures of a case, from times on one thread and on two."""
    figures = {}
    for other in ("loop", "dense"):
        figures[f"{case}_vs_{other}"] = round(one["ours"].cpu_ratio(one[other]), 3)
    for other in ("loop", "dense"):
        figures[f"{case}_vs_{other}_wall2"] = round(two["ours"].wall_ratio(two[other]), 3)
    times = " ".join(f"{1e3 * one[name].cpu_s:9.2f}" for name in ("ours", "loop", "dense"))
    print(f"{case:14} {times} " + " ".join(f"{ratio:9.2f}" for ratio in figures.values()), flush=True)
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=640, help="model size D")
    parser.add_argument("--hidden", type=int, default=2560, help="inner size H of one expert and of the dense layer")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 300, 1500, 2400], help="N, one case each")
    native = supports_bf16(torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES] if native else ["f32"])
    parser.add_argument("--repetitions", type=int, default=5, help="rounds per case at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="go on with a case for so long")
    parser.add_argument("--quick", action="store_true", help="a small layer and few repetitions: does it run?")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if args.quick:
        args.size, args.hidden, args.frames, args.repetitions, args.seconds = 64, 256, [16, 300], 2, 0.0
    return args


if __name__ == "__main__":
    main()
