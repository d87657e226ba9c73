"""Making a pack from a Kaldi directory: audio of any kind to tar shards of 16 kHz wav or flac."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE, read_audio, write_wav
from funasr_mooer.data.kaldi_dir import KaldiDir, Utterance
from funasr_mooer.data.pack_format import BLOCK, Tokenizer, field_of, suffix_of
from funasr_mooer.data.pack_parts import Job, Piece, Rows, assemble, make_pieces, partial_pack
from funasr_mooer.errors import ConfigError, DataError


def write_pack(
    data: KaldiDir,
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    nj: int = 1,
    form: str = "wav",
    shard_utts: int = 2000,
    max_bad: float = 0.01,
    allow_pipes: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a Kaldi directory as a pack; the result does not depend on ``nj``.

    An utterance whose audio cannot be read is left out, counted and named. The pack appears under ``out`` when it is
    whole; an older pack there is replaced then.

    Args:
        data: from :func:`~funasr_mooer.data.kaldi_dir.read_kaldi_dir`.
        out: folder to write.
        tokenizer: of the LLM that will be trained.
        nj: processes.
        form: ``wav`` (fast to load) or ``flac`` (half the size).
        shard_utts: utterances per shard.
        max_bad: stop when more than this fraction cannot be used.
        allow_pipes: run commands found in ``wav.scp``.
        progress: called with the number of utterances done and in all.

    Returns:
        The content of ``meta.json``.

    Raises:
        DataError: too many bad utterances, a text field whose name a tar cannot keep, or ``out`` holds something else.
    """
    if form not in ("wav", "flac"):
        raise ConfigError(f"format '{form}' is not known; use wav or flac")
    for field in data.fields:
        if field_of(suffix_of(field)) != field:
            raise DataError(
                f"{data.path / field}: after text. a name has letters only, and is no audio format; rename it"
            )
    job = Job(tokenizer, data.fields, sorted({u.lang for u in data}), form, allow_pipes)
    chunks = [data.utterances[i : i + shard_utts] for i in range(0, len(data), shard_utts)]
    with partial_pack(out) as partial:
        names = [f"shard_{number:06d}.tar" for number in range(len(chunks))]
        work = functools.partial(_write_shard, folder=partial)
        tasks, problems = list(zip(names, chunks)), list(data.problems)
        pieces = make_pieces(work, tasks, job, nj, problems, max_bad, str(data.path), progress, len(data))
        return assemble(partial, names, pieces, job, restore_spaces=False)


def _write_shard(task: tuple[str, list[Utterance]], job: Job, folder: Path) -> Piece:
    """One tar of utterances, and their part of the index."""
    name, utterances = task
    rows = Rows(job)
    recording = functools.lru_cache(maxsize=1)(functools.partial(read_audio, allow_pipes=job.allow_pipes))
    with open(folder / name, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for u in utterances:
            try:
                _check_name(u.utt_id)
                samples = _cut(recording(u.source), u)
                fields = rows.encode(u.texts)
            except DataError as error:
                rows.problems.append(f"{u.where}: utt {u.utt_id} {error}")
                continue
            for field in job.fields:
                if field in u.texts:
                    _add(tar, f"{u.utt_id}.{suffix_of(field)}", u.texts[field].encode())
            audio = io.BytesIO()
            write_wav(audio, samples, form=job.form.upper())
            _add(tar, f"{u.utt_id}.{job.form}", audio.getvalue())
            nbytes = len(audio.getvalue())
            rows.add(file.tell() - -(-nbytes // BLOCK) * BLOCK, nbytes, len(samples), fields, u.lang)
    return rows.piece((folder / name).stat().st_size)


def _check_name(utt_id: str) -> None:
    if "/" in utt_id or "\\" in utt_id or utt_id.startswith("."):
        raise DataError("cannot be a file name in a tar: no slashes, and no dot at its start")


def _cut(samples: np.ndarray, u: Utterance) -> np.ndarray:
    if u.start_s is None or u.end_s is None:
        return samples
    piece = samples[round(u.start_s * SAMPLE_RATE) : round(u.end_s * SAMPLE_RATE)]
    if len(piece) == 0:
        raise DataError(f"starts at {u.start_s} s, after the end of {u.source} ({len(samples) / SAMPLE_RATE:.2f} s)")
    return piece


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
