#!/usr/bin/env python3
"""Fbank, LFR and CMVN from waveforms: ours beside FunASR's WavFrontend, in one run.

    python benchmarks/features.py [--json FILE]

Both get the same noise, 2-15 s long, on one thread; repetitions alternate; the figures are medians of process CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
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
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPETITIONS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    cpu = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    figures = {f"features_{name}_audio_h_per_core_h": round(hours * 3600 / value, 1) for name, value in cpu.items()}
    figures["features_vs_funasr"] = round(cpu["funasr"] / cpu["ours"], 2)
    for name, value in figures.items():
        print(f"{name:40} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
