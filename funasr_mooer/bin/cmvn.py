"""Packs -> am.mvn: the statistics that give stacked features mean 0 and variance 1.

python -m funasr_mooer.bin.cmvn --pack data/train_pack --out data/am.mvn
python -m funasr_mooer.bin.cmvn --pack data/train_pack --config conf/u2pp_moe_tiny.yaml --out data/am.mvn
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from funasr_mooer.bin.cli import run
from funasr_mooer.config import read_yaml
from funasr_mooer.data.audio import SAMPLE_RATE
from funasr_mooer.data.shards import Pack


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="funasr-mooer cmvn", description=__doc__.splitlines()[0])
    parser.add_argument("--pack", nargs="+", required=True, help="folders written by funasr_mooer.bin.pack")
    parser.add_argument("--out", required=True, help="file to write, in FunASR's am.mvn format")
    parser.add_argument("--config", help="YAML whose frontend_conf to use; default: 80 mel bins, LFR 7/6")
    parser.add_argument(
        "--max-utts", type=int, default=20000, help="utterances drawn at random, 0 for all (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    args = parser.parse_args(argv)
    import torch

    from funasr_mooer.data.cmvn import compute_cmvn, write_cmvn
    from funasr_mooer.data.features import Features

    torch.set_num_threads(1)
    conf = dict(read_yaml(args.config).get("frontend_conf") or {}) if args.config else {}
    packs = [Pack(path) for path in args.pack]
    chosen = [(pack, i) for pack in packs for i in _sample(len(pack), len(packs), args.max_utts, args.seed)]
    features = Features({**conf, "cmvn_file": None})
    cmvn = compute_cmvn(features(pack.samples(i)) for pack, i in chosen)
    write_cmvn(cmvn, args.out)
    hours = sum(int(pack.records["samples"][i]) for pack, i in chosen) / SAMPLE_RATE / 3600
    print(f"cmvn         {len(chosen)} utts, {hours:.2f} h -> {args.out}")
    return 0


def _sample(count: int, packs: int, limit: int, seed: int) -> np.ndarray:
    """Indices of at most ``limit / packs`` of ``count`` utterances, ascending: reading stays sequential."""
    if limit == 0 or count <= limit // packs:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit // packs, replace=False))


if __name__ == "__main__":
    sys.exit(main())
