"""Connected digits from the Free Spoken Digit Dataset: recordings of single digits joined into strings of 2 to 7.

    python ../local/prepare.py --corpus free-spoken-digit-dataset --out data     # a clone of the publisher's repository
    python ../local/prepare.py --corpus fsdd --out data                          # Kaldi dirs train, dev, test, test_seen

Writes OUT/{train,dev,test,test_seen}/{wav.scp,text,utt2spk,utt2lang,utt2dur}, the audio under OUT/wav/. Dev and test
have one speaker each whom training never hears; test_seen has unseen recordings of the training speakers. Half of the training strings
mix speakers, which costs nothing and helps unseen ones. ``--seed`` changes the training strings alone.
"""

import argparse
import os
import random
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE, read_audio, resample, write_wav
from funasr_mooer.data.kaldi_dir import Utterance, replace_dir, write_kaldi_dir
from funasr_mooer.errors import DataError, MooerError

DIGITS = "zero one two three four five six seven eight nine".split()
SPEAKERS = {  # of the original corpus, which names a recording {digit}_{speaker}_{take}.wav
    "train": ("george", "jackson", "nicolas"),
    "dev": ("lucas",),
    "test": ("theo",),
    "test_seen": ("george", "jackson", "nicolas"),
}
SEEN_TEST_TAKES = 5  # takes 0-4 of the training speakers are the corpus' own test set
STRINGS = {"dev": 100, "test": 150, "test_seen": 60}
FIXED_SEED = 2404  # of the dev and test strings
LEVEL_RMS = 0.05  # -26 dB full scale; the speakers differ by 20 dB
LEAD_S, TAIL_S, GAP_MS = 0.15, 0.1, (50, 200)
SPEEDS_PERCENT = (85, 90, 95, 100, 105, 110, 115)  # of training strings
VOICE_SPEEDS_PERCENT = (75, 80, 85, 90, 95, 100, 105, 110, 115, 120, 125, 130)  # of recordings, with --vary-voices


@dataclass(frozen=True)
class Recording:
    """One spoken digit."""

    speaker: str
    word: str
    file: str


@dataclass(frozen=True)
class String:
    """Recordings to join: ``gaps_ms[i]`` of silence follow ``parts[i]``, at ``speeds_percent[i]`` if that is given."""

    utt_id: str
    parts: tuple[Recording, ...]
    gaps_ms: tuple[int, ...]
    speeds_percent: tuple[int, ...] = ()

    @property
    def speaker(self) -> str:
        """Who speaks, or "mixed"."""
        speakers = {part.speaker for part in self.parts}
        return speakers.pop() if len(speakers) == 1 else "mixed"

    @property
    def text(self) -> str:
        """The words."""
        return " ".join(part.word for part in self.parts)


def main() -> None:
    args = parse_args()
    try:
        for split, strings in plan(args.corpus, args.train_utts, args.seed, args.vary_voices).items():
            hours = write_split(args.out, split, strings, args.nj)
            words = sum(len(string.parts) for string in strings)
            print(f"{split:<12} {len(strings)} utts, {words} words, {hours:.2f} h", flush=True)
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a clone of the corpus, or Kaldi directories")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    parser.add_argument("--train-utts", type=int, default=6000, help="training strings (%(default)s)")
    parser.add_argument(
        "--vary-voices", action="store_true", help="every training recording at a speed (and pitch) of its own"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training strings (%(default)s)")
    parser.add_argument("--nj", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    if args.train_utts < 1 or args.nj < 1:
        parser.error("--train-utts and --nj must be at least 1")
    return args


def plan(corpus: Path, train_utts: int, seed: int, vary_voices: bool = False) -> dict[str, list[String]]:
    """The strings of every split: drawn for training, given by strings.tsv (else drawn with a fixed seed) for tests."""
    if (corpus / "recordings").is_dir():
        recordings = {split: original(corpus / "recordings", split) for split in SPEAKERS}
    elif (corpus / "train" / "wav.scp").is_file():
        recordings = {split: kaldi(corpus, split) for split in SPEAKERS}
    else:
        raise DataError(f"--corpus {corpus}: neither recordings/ (a clone of the corpus) nor train/wav.scp is there")
    train, rng = list(recordings["train"].values()), random.Random(seed)
    strings = {"train": draw("train", train, train_utts, rng, mix=0.5, vary_voices=vary_voices)}
    for split, count in STRINGS.items():
        table = corpus / split / "strings.tsv"
        if table.is_file():
            strings[split] = given(table, recordings[split])
        else:
            rng = random.Random(f"{FIXED_SEED} {split}")
            strings[split] = draw(split, list(recordings[split].values()), count, rng)
    return strings


def original(folder: Path, split: str) -> dict[str, Recording]:
    """The split's recordings by name, from the publisher's folder of 8 kHz files."""
    found = {}
    for file in sorted(folder.glob("*.wav")):
        match = re.fullmatch(r"(\d)_([a-z]+)_(\d+)", file.stem)
        if not match:
            raise DataError(f"{file}: not named {{digit}}_{{speaker}}_{{take}}.wav")
        digit, speaker, take = int(match[1]), match[2], int(match[3])
        if speaker not in SPEAKERS[split]:
            continue
        if split not in ("train", "test_seen") or (take < SEEN_TEST_TAKES) == (split == "test_seen"):
            found[file.stem] = Recording(speaker, DIGITS[digit], str(file))
    if not found:
        raise DataError(f"{folder}: no recording of {', '.join(SPEAKERS[split])} for {split}")
    return found


def kaldi(corpus: Path, split: str) -> dict[str, Recording]:
    """The split's recordings by utt_id, from a Kaldi dir whose paths are relative to ``corpus``."""
    tables = {}
    for name in ("wav.scp", "text", "utt2spk"):
        with open(corpus / split / name, encoding="utf-8") as lines:
            tables[name] = dict(line.rstrip("\n").split(maxsplit=1) for line in lines)
    return {
        utt: Recording(tables["utt2spk"][utt], tables["text"][utt], str(corpus / file))
        for utt, file in tables["wav.scp"].items()
    }


def given(table: Path, recordings: dict[str, Recording]) -> list[String]:
    """The strings of a table with the columns utt, spk, gap_ms, parts, text."""
    strings = []
    for row in table.read_text(encoding="utf-8").splitlines()[1:]:
        utt_id, _, gaps, parts, text = row.split("\t")
        joined = tuple(recordings[part] for part in parts.split(","))
        string = String(utt_id, joined, (*map(int, gaps.split(",")), 0))
        if string.text != text:
            raise DataError(f"{table}: {utt_id} says {text!r}, its recordings say {string.text!r}")
        strings.append(string)
    return strings


def draw(
    split: str,
    recordings: Sequence[Recording],
    count: int,
    rng: random.Random,
    mix: float = 0.0,
    vary_voices: bool = False,
) -> list[String]:
    """Random strings of one speaker each, or with probability ``mix`` of many; training strings vary in speed."""
    by_speaker: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    strings = []
    for i in range(count):
        length = rng.randint(2, 7)
        pools = [by_speaker[rng.choice(sorted(by_speaker))]] * length
        if rng.random() < mix:
            pools = [by_speaker[rng.choice(sorted(by_speaker))] for _ in range(length)]
        parts = tuple(rng.choice(pool) for pool in pools)
        gaps_ms = (*(rng.randint(*GAP_MS) for _ in parts[1:]), 0)
        speeds: tuple[int, ...] = ()
        if split == "train":
            speeds = (rng.choice(SPEEDS_PERCENT),) * length
        if vary_voices:
            speeds = tuple(rng.choices(VOICE_SPEEDS_PERCENT, k=length))
        speaker = String("", parts, gaps_ms).speaker
        strings.append(String(f"{speaker}-{split}-{i:05d}", parts, gaps_ms, speeds))
    return strings


def write_split(out: Path, split: str, strings: list[String], nj: int) -> float:
    """Write OUT/wav/SPLIT and the Kaldi directory OUT/SPLIT; the split's hours."""
    wav_dir = out / "wav" / split
    partial = wav_dir.with_name(f"{split}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ProcessPoolExecutor(nj) as workers:
        durations_s = list(workers.map(write, strings, [partial] * len(strings), chunksize=100))
    replace_dir(partial, wav_dir)
    utterances = [
        Utterance(
            utt_id=string.utt_id,
            source=f"wav/{split}/{string.utt_id}.wav",
            texts={"text": string.text},
            duration_s=duration_s,
            speaker=string.speaker,
            lang="en",
        )
        for string, duration_s in zip(strings, durations_s)
    ]
    write_kaldi_dir(out / split, utterances)
    return sum(durations_s) / 3600


def write(string: String, wav_dir: Path) -> float:
    """Write one string's audio; its seconds."""
    waveform = join(string)
    write_wav(wav_dir / f"{string.utt_id}.wav", waveform)
    return len(waveform) / SAMPLE_RATE


def join(string: String) -> np.ndarray:
    """One string as float32 (N,) at 16000 Hz: every recording at the same level, silences between them."""
    pieces = [np.zeros(round(LEAD_S * SAMPLE_RATE), np.float32)]
    speeds = string.speeds_percent or (100,) * len(string.parts)
    for part, gap_ms, speed in zip(string.parts, string.gaps_ms, speeds):
        pieces.append(resample(load(part.file), speed, 100))
        pieces.append(np.zeros(gap_ms * SAMPLE_RATE // 1000, np.float32))
    pieces.append(np.zeros(round(TAIL_S * SAMPLE_RATE), np.float32))
    return np.concatenate(pieces)


@lru_cache(maxsize=4096)
def load(file: str) -> np.ndarray:
    """A recording at the common level; the corpus is small enough to keep."""
    waveform = read_audio(file)
    return waveform * np.float32(LEVEL_RMS / (np.sqrt(np.mean(waveform**2)) + 1e-9))


if __name__ == "__main__":
    main()
