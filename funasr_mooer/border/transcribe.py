"""Decoding a whole corpus: sorted by length, in padded batches of bounded size, results by utterance."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from funasr_mooer.border.parts import Parts
from funasr_mooer.data import duration
from funasr_mooer.data.audio import SAMPLE_RATE, read_audio
from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir
from funasr_mooer.data.shards import Pack
from funasr_mooer.errors import DataError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One utterance to decode.

    Attributes:
        utt_id: its name.
        seconds: its length, for sorting; need not be exact. Infinite where only reading it would tell.
        read: gives the samples (N,) at 16 kHz, int16 or float32.
    """

    utt_id: str
    seconds: float
    read: Callable[[], np.ndarray]


def clips(path: str | Path, allow_pipes: bool = False) -> list[Clip]:
    """The utterances of a Kaldi directory or of a pack.

    Raises:
        DataError: the folder is neither, or its files do not fit together.
    """
    path = Path(path)
    if (path / "meta.json").is_file():
        pack = Pack(path)
        seconds = (pack.records["samples"] / SAMPLE_RATE).tolist()
        return [Clip(pack.utt_id(i), s, _PackedAudio(pack, i)) for i, s in enumerate(seconds)]
    found = read_kaldi_dir(path, need_text=False)
    for problem in found.problems:
        log.warning("%s", problem)
    made = [Clip(u.utt_id, _seconds(u), _FileAudio(u, allow_pipes)) for u in found]
    unknown = [clip.utt_id for clip in made if math.isinf(clip.seconds)]
    if unknown:
        log.warning(
            "%s: %d utterances (%s, ...) do not say how long they are, and count as the longest that a model hears; "
            "utt2dur makes their batches larger, and counts them in the RTF",
            *(path, len(unknown), unknown[0]),
        )
    return made


def batches(found: Sequence[Clip], batch_s: float, max_utts: int, longest_s: float = math.inf) -> list[list[Clip]]:
    """Clips of similar length together, the longest first; a batch holds at most ``batch_s`` seconds, padded.

    A clip whose length is not known counts ``longest_s``, the most that it can last.
    """

    def lasts(clip: Clip) -> float:
        return longest_s if math.isinf(clip.seconds) else clip.seconds

    made: list[list[Clip]] = []
    for clip in sorted(found, key=lasts, reverse=True):
        full = not made or len(made[-1]) >= max_utts or lasts(made[-1][0]) * (len(made[-1]) + 1) > batch_s
        if full:
            made.append([])
        made[-1].append(clip)
    return made


def transcribe(
    model: Parts,
    found: Sequence[Clip],
    batch_s: float = 120.0,
    max_utts: int = 32,
    on_problem: Callable[[str, DataError], None] | None = None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Decode clips; yields what ``model.inference`` gives for each, as batches finish.

    The next batch is read while one is decoded. Audio that cannot be read or is too long is reported to
    ``on_problem`` and has no result; without ``on_problem`` it is an error.

    Args:
        model: a model with FunASR's ``inference``.
        found: what to decode.
        batch_s: padded seconds of audio per batch.
        max_utts: utterances per batch.
        on_problem: called with the utterance's name and what is wrong with it.
        settings: for ``inference``: ``task`` and decoding settings.
    """

    def decode(keys: list[str], waves: list[np.ndarray]) -> list[dict[str, Any]]:
        return model.inference(waves, key=keys, **settings)[0]

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        planned = batches(found, batch_s, max_utts, model.model_conf.max_audio_s)
        reading = [reader.submit(_read_batch, planned[0])] if planned else []
        for number in range(len(planned)):
            read = reading.pop().result()
            if number + 1 < len(planned):
                reading.append(reader.submit(_read_batch, planned[number + 1]))
            good = [(utt_id, wave) for utt_id, wave in read if not isinstance(wave, DataError)]
            problems = [(utt_id, error) for utt_id, error in read if isinstance(error, DataError)]
            try:
                results = decode([u for u, _ in good], [w for _, w in good]) if good else []
            except DataError:  # one of them, such as audio that is too long: find out which
                results = []
                for utt_id, wave in good:
                    try:
                        results += decode([utt_id], [wave])
                    except DataError as error:
                        problems.append((utt_id, error))
            for utt_id, error in problems:
                if on_problem is None:
                    raise error
                on_problem(utt_id, error)
            yield from results


def _read_batch(batch: Sequence[Clip]) -> list[tuple[str, np.ndarray | DataError]]:
    read: list[tuple[str, np.ndarray | DataError]] = []
    for clip in batch:
        try:
            read.append((clip.utt_id, clip.read()))
        except DataError as error:
            read.append((clip.utt_id, error))
    return read


@dataclasses.dataclass(frozen=True)
class _PackedAudio:
    pack: Pack
    index: int

    def __call__(self) -> np.ndarray:
        return self.pack.waveform(self.index)


@dataclasses.dataclass(frozen=True)
class _FileAudio:
    utterance: Utterance
    allow_pipes: bool

    def __call__(self) -> np.ndarray:
        u = self.utterance
        wave = read_audio(u.source, allow_pipes=self.allow_pipes)
        if u.start_s is None:
            return wave
        return wave[round(u.start_s * SAMPLE_RATE) : None if u.end_s is None else round(u.end_s * SAMPLE_RATE)]


def _seconds(utterance: Utterance) -> float:
    """Length of an utterance as far as it is known without decoding it; infinite where it is not."""
    if utterance.duration_s is not None:
        return utterance.duration_s
    if utterance.start_s is not None and utterance.end_s is not None:
        return utterance.end_s - utterance.start_s
    found = duration.seconds(utterance.source)  # None: a command, or a broken file, of which reading it will say more
    return math.inf if found is None else found


def answers_only(result: dict[str, Any]) -> dict[str, str]:
    """The text fields of one result: ``text``, ``text.en``, ..."""
    return {key: value for key, value in result.items() if key == "text" or key.startswith("text.")}
