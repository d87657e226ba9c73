"""What both ways of making a pack share: work in processes, one piece of the index per shard, a folder that appears whole."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE
from funasr_mooer.data.kaldi_dir import check_problems, replace_dir
from funasr_mooer.data.pack_format import BLOCK, RECORD, VERSION, Tokenizer
from funasr_mooer.errors import DataError

SKIPPED_SHOWN = 100  # names kept in meta.json
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one worker made: a shard's part of the index, token_start counted from 0."""

    records: np.ndarray
    tokens: np.ndarray
    nbytes: int
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings that all shards of one pack share."""

    tokenizer: Tokenizer
    fields: list[str]
    langs: list[str]
    form: str = "wav"
    allow_pipes: bool = False

    def __post_init__(self) -> None:
        if len(self.fields) > 8 or len(self.langs) > 256:
            raise DataError(
                f"{len(self.fields)} text fields, {len(self.langs)} languages; a pack holds up to 8 and 256"
            )


class partial_pack:
    """A folder ``out.partial`` that becomes ``out`` when the block ends well, and is deleted when it does not."""

    def __init__(self, out: str | os.PathLike):
        self.out = Path(out)
        self.folder = self.out.with_name(self.out.name + ".partial")
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / "meta.json").is_file():
            raise DataError(f"{self.out}: holds files and is not a pack; give a new folder")

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            replace_dir(self.folder, self.out)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def make_pieces(work, tasks, job, nj, problems, max_bad, what, progress, total) -> list[Piece]:
    """Every task done by ``nj`` processes, in the order of the tasks; one failure ends them all."""
    pieces, done = [], 0
    for piece in _run(work, tasks, job, nj):
        pieces.append(piece)
        problems += piece.problems
        done += len(piece.records) + len(piece.problems)
        check_problems(problems, total, max_bad, what)
        progress(done, total)
    if not any(len(piece.records) for piece in pieces):
        raise DataError(f"{what}: no usable utterance")
    if problems:
        logger.warning("%s: %d utterances skipped, first: %s", what, len(problems), problems[0])
        pieces[-1] = dataclasses.replace(pieces[-1], problems=problems)
    return pieces


def _run(work, tasks, job: Job, nj: int) -> Iterator[Piece]:
    if nj <= 1 or len(tasks) <= 1:
        yield from (work(task, job=job) for task in tasks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = concurrent.futures.ProcessPoolExecutor(min(nj, len(tasks)), context, _start_worker, (work, job))
    try:
        yield from pool.map(_work, tasks)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a pack process died (out of memory?); run again with a smaller --nj") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}  # of this worker process; the tokenizer is too large to send with each task


def _start_worker(work, job: Job) -> None:
    _worker.update(work=work, job=job)


def _work(task) -> Piece:
    return _worker["work"](task, job=_worker["job"])


def assemble(folder: Path, shards: list[str], pieces: list[Piece], job: Job, restore_spaces: bool) -> dict[str, Any]:
    """Join the pieces into index.bin and tokens.bin, and describe them in meta.json."""
    start = count = samples = 0
    with open(folder / "index.bin", "wb") as index, open(folder / "tokens.bin", "wb") as tokens:
        for number, piece in enumerate(pieces):
            piece.records["shard"] = number
            piece.records["token_start"] += start
            index.write(piece.records.tobytes())
            tokens.write(piece.tokens.tobytes())
            start += len(piece.tokens)
            count += len(piece.records)
            samples += int(piece.records["samples"].sum(dtype=np.int64))
    skipped = pieces[-1].problems
    meta = {
        "version": VERSION,
        "fields": job.fields,
        "langs": job.langs,
        "utterances": count,
        "tokens": start,
        "hours": round(samples / SAMPLE_RATE / 3600, 6),
        "tokenizer": job.tokenizer.fingerprint,
        "restore_spaces": restore_spaces,
        "skipped": len(skipped),
        "skipped_first": skipped[:SKIPPED_SHOWN],
        "shards": shards,
        "shard_bytes": [piece.nbytes for piece in pieces],
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    return meta


class Rows:
    """The index and the tokens of one shard while they grow."""

    def __init__(self, job: Job):
        self.job = job
        self.records: list[tuple] = []
        self.tokens: list[np.ndarray] = []
        self.problems: list[str] = []
        self.position = 0
        self.encode_text = getattr(job.tokenizer, "encode_plain", job.tokenizer.encode)

    def encode(self, texts) -> tuple[int, np.ndarray]:
        """Field bits and ``[count, ids...]`` of each field in order."""
        bits, ids = 0, []
        for bit, field in enumerate(self.job.fields):
            if texts.get(field):
                found = self.encode_text(texts[field])
                bits |= 1 << bit
                ids += [len(found), *found]
        if len(ids) >= 1 << 16:
            raise DataError(f"has {len(ids)} tokens of text; the most is 65535")
        return bits, np.array(ids, "<u4")

    def add(self, offset: int, nbytes: int, samples: int, fields: tuple[int, np.ndarray], lang: str) -> None:
        """One utterance: where its audio lies (bytes), its length at 16 kHz, and what ``encode`` made of its texts."""
        bits, ids = fields
        langs = self.job.langs
        self.records.append((0, offset // BLOCK, nbytes, samples, self.position, len(ids), bits, langs.index(lang)))
        self.tokens.append(ids)
        self.position += len(ids)

    def piece(self, nbytes: int) -> Piece:
        """What was gathered, for a shard of ``nbytes``."""
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, "<u4")
        return Piece(np.array(self.records, RECORD), tokens, nbytes, self.problems)
