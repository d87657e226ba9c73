"""Write a U2++ MoE model as ONNX graphs, in a model directory that runs them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from funasr_mooer.bin.cli import run

EXAMPLES = """examples:
  funasr-mooer export --model exp/u2pp_moe/best --out exp/u2pp_moe/onnx
  funasr-mooer decode --model exp/u2pp_moe/onnx --data data/test --out exp/u2pp_moe/onnx/decode
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from funasr_mooer.border.build import load_model
    from funasr_mooer.u2pp_moe.onnx_export import export

    started = time.perf_counter()
    files = export(load_model(args.model, "cpu"), args.out)
    for file in files:
        print(f"{file.name:20} {file.stat().st_size / 2**20:8.1f} MiB")
    print(f"wrote {args.out} in {time.perf_counter() - started:.0f} s")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="funasr-mooer export",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="model directory to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
