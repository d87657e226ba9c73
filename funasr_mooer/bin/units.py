"""Texts -> units.txt, the table of characters, words or sentence pieces that a U2++ model is trained to write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from funasr_mooer.bin.cli import run
from funasr_mooer.data.kaldi_dir import read_kaldi_dir
from funasr_mooer.errors import DataError
from funasr_mooer.u2pp_moe.tokenizer import make_units, train_pieces, write_units

EXAMPLES = """examples:
  funasr-mooer units --data data/train --out data/units.txt            # characters
  funasr-mooer units --data data/train --out data/units.txt --words --min-count 2
  funasr-mooer units --data data/train --out data/units/units.txt --pieces 5000   # and data/units/bpe.model
  funasr-mooer pack --data data/train --tokenizer data/units --out data/pack/train
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    texts = [utterance.texts["text"] for data in args.data for utterance in read_kaldi_dir(data)]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pieces = train_pieces(texts, args.pieces, out.with_name("bpe.model")) if args.pieces else None
    units = make_units(texts, args.words, args.min_count, pieces)
    if len(units) == 3:
        raise DataError(f"{', '.join(args.data)}: no unit occurs {args.min_count} times; is 'text' empty?")
    write_units(units, args.out)
    print(f"units        {len(units)} of {len(texts)} texts -> {args.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="funasr-mooer units",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--data", required=True, nargs="+", metavar="DIR", help="Kaldi directories; their text is read")
    top.add_argument("--out", required=True, metavar="FILE", help="table to write, such as data/units.txt")
    cut = top.add_mutually_exclusive_group()
    cut.add_argument("--words", action="store_true", help="cut texts at spaces; default: into characters")
    cut.add_argument(
        "--pieces", type=int, metavar="N", help="Chinese characters, and N sentence pieces of upper-case words"
    )
    top.add_argument("--min-count", type=int, default=1, metavar="N", help="leave out rarer units (%(default)s)")
    return top


if __name__ == "__main__":
    sys.exit(main())
