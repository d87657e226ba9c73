"""Kaldi directory -> pack: tar shards with an index and ready-made tokens, what training reads.

python -m funasr_mooer.bin.pack --data data/train --out data/train_pack --tokenizer Qwen2-7B-Instruct --nj 8
python -m funasr_mooer.bin.pack --tar shards/*.tar --out data/train_pack --tokenizer Qwen2-7B-Instruct
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from funasr_mooer.bin.cli import positive, run
from funasr_mooer.data.kaldi_dir import read_kaldi_dir
from funasr_mooer.data.pack_writer import write_pack
from funasr_mooer.data.tar_index import index_tars
from funasr_mooer.mooer.tokenizer import MooerTokenizer
from funasr_mooer.u2pp_moe.tokenizer import MooerUnitsTokenizer


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = _parser().parse_args(argv)
    tokenizer = open_tokenizer(args.tokenizer)
    common = {"nj": args.nj, "max_bad": args.max_bad, "progress": _progress}
    if args.tar:
        meta = index_tars(args.tar, args.out, tokenizer, **common)
    else:
        data = read_kaldi_dir(args.data, args.max_bad)
        shape = {"form": args.format, "shard_utts": args.shard_utts, "allow_pipes": args.allow_pipes}
        meta = write_pack(data, args.out, tokenizer, **shape, **common)
    print(
        f"pack         {meta['utterances']} utts, {meta['hours']:.2f} h, {', '.join(meta['fields'])}"
        f" | skipped {meta['skipped']} | {args.out}"
    )
    for problem in meta["skipped_first"][:5]:
        print(f"skipped      {problem}")
    return 0


def open_tokenizer(path: str) -> MooerTokenizer | MooerUnitsTokenizer:
    """What a path holds: the units of a U2++ model (``units.txt``), or the tokenizer of an LLM."""
    units = Path(path).is_file() or (Path(path) / "units.txt").is_file()
    return MooerUnitsTokenizer(path) if units else MooerTokenizer(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="funasr-mooer pack", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", help="Kaldi directory: wav.scp, text, and text.<lang>, segments, utt2lang where present"
    )
    source.add_argument("--tar", nargs="+", help="instead: shards written by MooER or WeNet, indexed where they are")
    parser.add_argument("--out", required=True, help="folder to write; appears when it is whole")
    parser.add_argument("--tokenizer", required=True, help="folder of the LLM or of its tokenizer; for U2++ units.txt")
    parser.add_argument("--nj", type=positive, default=min(8, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument(
        "--format", choices=["wav", "flac"], default="wav", help="wav loads faster, flac is half the size"
    )
    parser.add_argument("--shard-utts", type=positive, default=2000, help="utterances per shard (%(default)s)")
    parser.add_argument(
        "--max-bad", type=float, default=0.01, help="stop above this fraction of bad ones (%(default)s)"
    )
    parser.add_argument("--allow-pipes", action="store_true", help="run commands found in wav.scp")
    return parser


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total or not sys.stderr.isatty() else "\r"
    print(f"pack         {done}/{total} utts", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
