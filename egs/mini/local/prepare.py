"""Make the mini corpus: espeak-ng speaks bilingual sentences, and Kaldi data directories describe the recordings.

    python ../local/prepare.py --out data                      # 6000 training utterances, about a minute on 2 cores
    python ../local/prepare.py --out data --train-utts 400     # a taste

Writes OUT/{train,dev,test}/{wav.scp,text,text.en,utt2spk,utt2lang,utt2dur}, the recordings under OUT/wav/ and, for
decoding one language at a time, OUT/{dev,test}_{zh,en} over the same recordings. ``text.en`` has the translations of the Mandarin utterances.
The test set has its own voices and sentences, the dev set its own sentences in training voices. Both are the same
whatever ``--seed`` says: that seeds the training set alone.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentences
import speech

from funasr_mooer.data.audio import SAMPLE_RATE, write_wav
from funasr_mooer.data.kaldi_dir import Utterance, replace_dir, write_kaldi_dir
from funasr_mooer.errors import MooerError

# Which voices are held out decides the test error more than most settings do, so both lists were fixed before any
# training. All of them are voice variants of espeak-ng 1.52.
TEST_VOICES = "m8 f3 klatt5 belinda Nguyen m4 grandma klatt3 travis".split()
TRAIN_VOICES = (
    "m1 m2 m3 m5 m6 m7 f1 f2 f4 f5 klatt klatt2 klatt4 klatt6 Andy Annie anika Denis Gene Jacky Lee linda Mario max "
    "Michael michel norbert rob steph victor Diogo aunty iven john"
).split()
ACCENTS = {"zh": ["cmn"], "en": ["en-us", "en", "en-gb-scotland"]}
LEVEL_RMS = 0.05  # -26 dB full scale
SILENCE, MARGIN_S = 1e-3, 0.1  # trim what is quieter, but leave 100 ms on both sides
CHUNK_UTTS = 200  # spoken by one process; espeak-ng's output depends a little on what it said before


@dataclass(frozen=True)
class Line:
    """One sentence and how to say it."""

    utt_id: str
    pair: sentences.Pair
    lang: str
    accent: str
    voice: str
    speed_wpm: int
    pitch: int

    @property
    def texts(self) -> dict[str, str]:
        """What is said and, if that is Mandarin, its translation, as in the files of a Kaldi directory."""
        return {"text": self.pair.zh, "text.en": self.pair.en} if self.lang == "zh" else {"text": self.pair.en}


def main() -> None:
    """Entry point."""
    args = parse_args()
    started = time.time()
    try:
        for split, script in plan(args.train_utts, args.seed).items():
            durations_s = speak_all(script, args.out / "wav" / split, args.nj)
            write_tables(args.out, split, script, durations_s)
            print(summary(split, script, durations_s), flush=True)
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"ready        {args.out}, {time.time() - started:.0f} s")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data directories")
    parser.add_argument("--train-utts", type=int, default=6000, help="half Mandarin, half English (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training set (%(default)s)")
    parser.add_argument("--nj", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    if args.train_utts < 2 or args.nj < 1:
        parser.error("--train-utts must be at least 2 and --nj at least 1")
    return args


def plan(train_utts: int, seed: int) -> dict[str, list[Line]]:
    """Who says what in each split; half of every split is Mandarin, half English."""
    test, dev = sentences.heldout_pairs()
    fixed, free = random.Random(sentences.HELDOUT_SEED), random.Random(seed)
    train = [(lang, pair) for lang in ("zh", "en") for pair in sentences.draw_training(train_utts // 2, free)]
    return {
        "test": assign([(lang, pair) for lang in ("zh", "en") for pair in test], TEST_VOICES, fixed),
        "dev": assign([(lang, pair) for lang in ("zh", "en") for pair in dev], TRAIN_VOICES, fixed),
        "train": assign(train, TRAIN_VOICES, free),
    }


def assign(spoken: Sequence[tuple[str, sentences.Pair]], voices: Sequence[str], rng: random.Random) -> list[Line]:
    """Give each (language, sentence) a voice, an accent, a speed and a pitch; the voices speak equally often."""
    script = []
    for i, (lang, pair) in enumerate(spoken):
        if i % len(voices) == 0:
            order = rng.sample(voices, len(voices))
        voice = order[i % len(voices)]
        accent, speed_wpm, pitch = rng.choice(ACCENTS[lang]), rng.randint(135, 195), rng.randint(25, 75)
        script.append(Line(f"{voice}-{lang}-{i:05d}", pair, lang, accent, voice, speed_wpm, pitch))
    return sorted(script, key=lambda line: line.utt_id)


def speak_all(script: list[Line], wav_dir: Path, nj: int) -> dict[str, float]:
    """Write WAV_DIR/<utt_id>.wav for all lines, ``nj`` processes at a time; durations in seconds by utt_id."""
    partial = wav_dir.with_name(f"{wav_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    chunks = [script[i : i + CHUNK_UTTS] for i in range(0, len(script), CHUNK_UTTS)]
    durations_s: dict[str, float] = {}
    threads = ThreadPoolExecutor(nj)
    try:
        for done in threads.map(in_fresh_process, chunks, [partial] * len(chunks)):
            durations_s |= done
            if len(durations_s) % 1000 == 0 or len(durations_s) == len(script):
                print(f"speaking     {wav_dir.name} {len(durations_s)}/{len(script)}", file=sys.stderr, flush=True)
    finally:
        threads.shutdown(cancel_futures=True)
    replace_dir(partial, wav_dir)
    return durations_s


def in_fresh_process(chunk: list[Line], wav_dir: Path) -> dict[str, float]:
    """:func:`speak` in a process of its own: the recordings do not depend on how chunks were spread over cores."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(speak, chunk, wav_dir).result()


def speak(chunk: list[Line], wav_dir: Path) -> dict[str, float]:
    """Synthesise, trim, level and write each line; durations in seconds by utt_id."""
    engine = speech.espeak()
    durations_s = {}
    for line in chunk:
        spoken = engine.synthesise(line.texts["text"], line.accent, line.voice, line.speed_wpm, line.pitch)
        if np.abs(spoken).max(initial=0) <= SILENCE:
            raise speech.SpeechError(f"espeak-ng's voice {line.voice} is silent on {line.texts['text']!r}")
        waveform = level(trim(spoken))
        write_wav(wav_dir / f"{line.utt_id}.wav", waveform)
        durations_s[line.utt_id] = len(waveform) / SAMPLE_RATE
    return durations_s


def trim(waveform: np.ndarray) -> np.ndarray:
    """Cut silence at both ends down to the margin."""
    (loud,) = np.nonzero(np.abs(waveform) > SILENCE)
    margin = int(MARGIN_S * SAMPLE_RATE)
    return np.pad(waveform[loud[0] : loud[-1] + 1], margin)


def level(waveform: np.ndarray) -> np.ndarray:
    """Scale to the common RMS level."""
    return waveform * (LEVEL_RMS / np.sqrt(np.mean(waveform**2)))


def write_tables(out: Path, split: str, script: list[Line], durations_s: dict[str, float]) -> None:
    """The Kaldi directory of a split and, but for training, one for each of its languages."""
    utterances = [
        Utterance(
            utt_id=line.utt_id,
            source=f"wav/{split}/{line.utt_id}.wav",
            texts=line.texts,
            duration_s=durations_s[line.utt_id],
            speaker=line.voice,
            lang=line.lang,
        )
        for line in script
    ]
    write_kaldi_dir(out / split, utterances)
    if split != "train":
        for lang in ACCENTS:
            write_kaldi_dir(out / f"{split}_{lang}", [u for u in utterances if u.lang == lang])


def summary(split: str, script: list[Line], durations_s: dict[str, float]) -> str:
    """How much there is, of what."""
    kinds = Counter(line.pair.kind for line in script)
    shares = ", ".join(f"{kind} {100 * n / len(script):.0f} %" for kind, n in kinds.most_common())
    voices = {line.voice for line in script}
    hours = sum(durations_s.values()) / 3600
    return f"{split:<12} {len(script)} utts, {hours:.2f} h, {len(voices)} voices | {shares}"


if __name__ == "__main__":
    main()
