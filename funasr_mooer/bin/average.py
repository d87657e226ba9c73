"""Average the trained weights of several checkpoints of an experiment into a model directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from funasr_mooer.bin.cli import positive, run
from funasr_mooer.errors import CheckpointError

if TYPE_CHECKING:
    from funasr_mooer.train.checkpoint import Checkpoints

EXAMPLES = """examples:
  funasr-mooer average --exp exp/mooer --num 5 --out exp/mooer/average            # the 5 best
  funasr-mooer average --exp exp/mooer --num 5 --metric cer --out exp/mooer/average
  funasr-mooer average --exp exp/mooer --num 3 --by last --out exp/mooer/average
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from funasr_mooer.config import load_config
    from funasr_mooer.train.average import average
    from funasr_mooer.train.checkpoint import Checkpoints
    from funasr_mooer.train.stages import read_stages

    exp = Path(args.exp)
    metric = args.metric or read_stages(load_config(exp / "config.yaml"))[0].ranking
    checkpoints = Checkpoints(exp, metric=metric)
    found = checkpoints.ranked() if args.by == "best" else checkpoints.all()[::-1]
    if not found:
        raise CheckpointError(f"{exp}/checkpoints: no checkpoint to average, {why_none(checkpoints)}")
    chosen = found[: args.num]
    average(chosen, Path(args.out))
    fewer = f" (there are no {args.num})" if len(chosen) < args.num else ""
    print(f"{args.out}: mean of {', '.join(path.name for path in chosen)}{fewer}")
    return 0


def why_none(checkpoints: Checkpoints) -> str:
    """What is wrong where no checkpoint was found, and what to do."""
    from funasr_mooer.train.checkpoint import TrainState

    if not checkpoints.all():
        return "there is none; train first"
    known = sorted({name for path in checkpoints.all() for name in TrainState.read(path).metrics})
    return (
        f"none was validated with '{checkpoints.metric}'; use --by last, or --metric {' or '.join(known) or '(none)'}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="funasr-mooer average",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exp", required=True, metavar="DIR", help="experiment directory")
    parser.add_argument("--num", type=positive, default=5, metavar="N", help="how many checkpoints")
    parser.add_argument("--by", choices=("best", "last"), default="best", help="which ones")
    parser.add_argument("--metric", help="validation metric that ranks them; as in training if not given")
    parser.add_argument("--out", required=True, metavar="DIR", help="model directory to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
