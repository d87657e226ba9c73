"""Kaldi data directories that exist already, every recording brought to the same level.

    python ../local/prepare.py --corpus en_orders --out data

Reads CORPUS/{train,dev,test}/{wav.scp,text[,segments,utt2spk,...]}; writes OUT/{train,dev,test} of the same utterances, with
the audio under OUT/wav/. Levelled because speakers who record themselves differ by 20 dB, which a few hours cannot teach.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE, read_audio, write_wav
from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir, replace_dir, write_kaldi_dir
from funasr_mooer.errors import DataError, MooerError

SPLITS = ("train", "dev", "test")
LEVEL_RMS = 0.05  # -26 dB full scale


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train, dev and test")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    parser.add_argument("--nj", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    try:
        for split in SPLITS:
            utterances, problems = prepare(args.corpus / split, args.out, split, args.nj)
            hours = sum(utterance.duration_s for utterance in utterances) / 3600
            print(f"{split:<12} {len(utterances)} utts, {hours:.2f} h | {problems} with problems left out", flush=True)
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def prepare(folder: Path, out: Path, split: str, nj: int) -> tuple[list[Utterance], int]:
    """Write OUT/wav/SPLIT and OUT/SPLIT; the utterances, and how many could not be used."""
    found = read_kaldi_dir(folder)
    wav_dir = out / "wav" / split
    partial = wav_dir.with_name(f"{split}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ProcessPoolExecutor(nj) as workers:
        seconds = list(workers.map(write, found.utterances, [partial] * len(found), chunksize=20))
    replace_dir(partial, wav_dir)
    utterances = [
        dataclasses.replace(
            utterance, source=f"wav/{split}/{utterance.utt_id}.wav", start_s=None, end_s=None, duration_s=duration_s
        )
        for utterance, duration_s in zip(found, seconds)
        if duration_s
    ]
    write_kaldi_dir(out / split, utterances)
    return utterances, len(found.problems) + seconds.count(0.0)


def write(utterance: Utterance, wav_dir: Path) -> float:
    """Write one utterance's audio; its seconds, 0 if there is no sound in it."""
    try:
        waveform = read_audio(utterance.source)
    except DataError as error:
        print(f"{utterance.utt_id}: {error}", file=sys.stderr)
        return 0.0
    if utterance.start_s is not None:
        end = None if utterance.end_s is None else round(utterance.end_s * SAMPLE_RATE)
        waveform = waveform[round(utterance.start_s * SAMPLE_RATE) : end]
    rms = np.sqrt(np.mean(waveform**2)) if len(waveform) else 0.0
    if rms == 0.0:
        return 0.0
    write_wav(wav_dir / f"{utterance.utt_id}.wav", waveform * np.float32(LEVEL_RMS / rms))
    return len(waveform) / SAMPLE_RATE


if __name__ == "__main__":
    main()
