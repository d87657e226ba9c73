#!/usr/bin/env python3
"""Fbank, LFR and CMVN from waveforms: ours beside FunASR's WavFrontend, in one run.

    python benchmarks/features.py [--json FILE]

Both get the same noise, 2-15 s long, on one thread; repetitions alternate; the figures are medians of process CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common.timing import alternate, write_json
from funasr.frontends.wav_frontend import WavFrontend

from funasr_mooer.data.features import Features

REPETITIONS = 5
UTTERANCES = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(1.9, 0.5, UTTERANCES), 2, 15)
    waves = [torch.from_numpy(rng.normal(0, 0.1, int(16000 * s)).astype(np.float32)) for s in seconds]
    hours = float(seconds.sum()) / 3600

    ours, theirs = Features({"lfr_m": 7, "lfr_n": 6}), WavFrontend(lfr_m=7, lfr_n=6, dither=0.0)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: [ours(wave) for wave in waves],
        "funasr": lambda: [theirs(wave[None], torch.tensor([len(wave)])) for wave in waves],
    }
    times = alternate(runs, REPETITIONS)
    figures = {f"features_{name}_audio_h_per_core_h": round(hours * 3600 / t.cpu_s, 1) for name, t in times.items()}
    figures["features_vs_funasr"] = round(times["funasr"].cpu_ratio(times["ours"]), 2)
    for name, value in figures.items():
        print(f"{name:40} {value}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
