"""Packs: tar shards of audio and text that MooER and WeNet can read, with a memory-mapped index and ready-made tokens.

    shard_000000.tar ...   per utterance utt.txt (and utt.en for the field text.en, ...), then utt.wav or utt.flac
    index.bin              RECORD per utterance, 26 bytes
    tokens.bin             uint32: per utterance, for each field it has: [count, ids...], no special tokens
    meta.json              fields, languages, shards, sizes, tokenizer fingerprint, what was skipped

Nothing is ever extracted to disk, and names inside a tar are never used as paths.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import io
import json
import logging
import mmap
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE, read_audio, to_float, wav_pcm16, write_wav
from funasr_mooer.data.kaldi_dir import KaldiDir, Utterance, check_problems, replace_dir
from funasr_mooer.errors import ConfigError, DataError

VERSION = 1
BLOCK = tarfile.BLOCKSIZE  # 512 bytes
RECORD = np.dtype(
    [
        ("shard", "<u2"),
        ("offset", "<u4"),  # of the audio file, in tar blocks
        ("nbytes", "<u4"),  # of the audio file
        ("samples", "<u4"),  # at 16 kHz
        ("token_start", "<u8"),  # in tokens.bin, in ids
        ("token_count", "<u2"),  # ids there, counts included
        ("fields", "u1"),  # bit k: has meta.fields[k]
        ("lang", "u1"),  # index into meta.langs
    ]
)
AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "opus", "m4a")
OPEN_SHARDS = 256  # mapped at once by one process
SKIPPED_SHOWN = 100  # names kept in meta.json
logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What packing needs of a tokenizer; corpus text goes through ``encode_plain`` where there is one."""

    fingerprint: str

    def encode(self, text: str) -> list[int]: ...


class Pack:
    """A pack, opened in constant time whatever its size; pages are shared between processes.

    Args:
        path: the folder that ``funasr_mooer.bin.pack`` wrote.

    Raises:
        DataError: not a pack, or truncated.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        meta = self.path / "meta.json"
        if not meta.is_file():
            raise DataError(f"{self.path}: not a pack (no meta.json); make one with python -m funasr_mooer.bin.pack")
        self.meta: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8"))
        if self.meta.get("version") != VERSION:
            raise DataError(f"{meta}: version {self.meta.get('version')}, this program reads {VERSION}; run pack again")
        self.fields: list[str] = self.meta["fields"]
        self.langs: list[str] = self.meta["langs"]
        self.records = _map(self.path / "index.bin", RECORD, self.meta["utterances"])
        self._tokens = _map(self.path / "tokens.bin", np.dtype("<u4"), self.meta["tokens"])
        for name, size in zip(self.meta["shards"], self.meta["shard_bytes"]):
            _check_size(self.path / name, size)
        self._shards: collections.OrderedDict[int, mmap.mmap] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self):
        return (type(self), (str(self.path),))  # a worker process maps the files itself

    @property
    def hours(self) -> float:
        """Audio in all, hours."""
        return self.meta["hours"]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Stop when the pack's tokens were made by another tokenizer.

        Raises:
            DataError: with what to do.
        """
        if tokenizer.fingerprint != self.meta["tokenizer"]:
            raise DataError(
                f"{self.path}: was packed with another tokenizer ({self.meta['tokenizer']}, the model has "
                f"{tokenizer.fingerprint}); run pack again with --tokenizer of this model"
            )

    def samples(self, i: int) -> np.ndarray:
        """Audio of utterance ``i`` (N,) at 16 kHz: int16 without a copy for PCM16 wav, else float32 in [-1, 1)."""
        data = self._audio(i)
        name = f"{self.path / self.meta['shards'][self.records[i]['shard']]}: utterance {i}"
        pcm = wav_pcm16(data, name)
        if pcm is not None and pcm[1] == SAMPLE_RATE and pcm[0].ndim == 1:
            return pcm[0]
        try:
            return read_audio(data)
        except DataError as error:
            raise DataError(str(error).replace("audio bytes", name, 1)) from None

    def waveform(self, i: int) -> np.ndarray:
        """Audio of utterance ``i``: (N,) float32 in [-1, 1) at 16 kHz."""
        return to_float(self.samples(i))

    def tokens(self, i: int) -> dict[str, np.ndarray]:
        """Field -> token ids (uint32) of utterance ``i``, without special tokens."""
        record = self.records[i]
        position, found = int(record["token_start"]), {}
        for bit, field in enumerate(self.fields):
            if record["fields"] >> bit & 1:
                count = int(self._tokens[position])
                found[field] = self._tokens[position + 1 : position + 1 + count]
                position += 1 + count
        return found

    def token_counts(self) -> dict[str, np.ndarray]:
        """Field -> number of tokens of every utterance (n,) int32, 0 where it is absent; reads only the counts."""
        position = self.records["token_start"].astype(np.int64)
        counts = {}
        for bit, field in enumerate(self.fields):
            has = (self.records["fields"] >> bit & 1).astype(bool)
            count = np.zeros(len(self), np.int32)
            if len(self.fields) == 1:
                count[has] = self.records["token_count"][has] - 1
            else:
                count[has] = self._tokens[position[has]]
            position += np.where(has, count + 1, 0)
            counts[field] = count
        return counts

    def utt_id(self, i: int) -> str:
        """Name of utterance ``i``, read from the tar."""
        record = self.records[i]
        start = (int(record["offset"]) - 1) * BLOCK
        header = self._shard(int(record["shard"]))[start : start + BLOCK]
        name = header[:100].rstrip(b"\0").decode("utf-8", errors="replace")
        # A name that fills its place, or is not plain ASCII in another writer's tar, stands in an extra header.
        if len(name.encode()) >= 100 or "?" in name or header[345:346] != b"\0":
            name = self._audio_member(i).name
        return name.rpartition(".")[0]

    def text(self, i: int) -> dict[str, str]:
        """Field -> transcript of utterance ``i``, read from the tar."""
        key = self.utt_id(i)
        texts = {}
        for member, data in self._members(i):
            name, _, suffix = member.name.rpartition(".")
            field = _field_of(suffix)
            if name == key and field in self.fields:
                texts[field] = _clean(data, self.meta["restore_spaces"])
        return {field: texts[field] for field in self.fields if field in texts}

    def lang(self, i: int) -> str:
        """Language of utterance ``i`` from ``utt2lang``, or ''."""
        return self.langs[self.records[i]["lang"]]

    def _audio(self, i: int) -> memoryview:
        record = self.records[i]
        start = int(record["offset"]) * BLOCK
        return memoryview(self._shard(int(record["shard"])))[start : start + int(record["nbytes"])]

    def _shard(self, number: int) -> mmap.mmap:
        """The mapped shard; the least recently used one is let go when many are open."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        with open(self.path / self.meta["shards"][number], "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._shards[number] = mapped
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return mapped

    def _members(self, i: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Members between the audio of the utterance before and that of the one after, this one's audio included."""
        records, shard = self.records, int(self.records[i]["shard"])
        start = 0
        if i > 0 and records[i - 1]["shard"] == shard:
            start = (int(records[i - 1]["offset"]) + -(-int(records[i - 1]["nbytes"]) // BLOCK)) * BLOCK
        whole = self._shard(shard)
        stop = len(whole)
        if i + 1 < len(records) and records[i + 1]["shard"] == shard:
            stop = int(records[i + 1]["offset"]) * BLOCK
        with tarfile.open(fileobj=io.BytesIO(whole[start:stop]), mode="r:") as tar:
            while (member := tar.next()) is not None and start + member.offset_data < stop:
                member.offset_data += start
                yield member, whole[member.offset_data : member.offset_data + member.size]
                if tar.offset > stop - start:  # the next utterance's audio lies beyond this piece
                    return

    def _audio_member(self, i: int) -> tarfile.TarInfo:
        wanted = int(self.records[i]["offset"]) * BLOCK
        for member, _ in self._members(i):
            if member.offset_data == wanted:
                return member
        raise DataError(f"{self.path}: utterance {i}: the index does not fit the shard; run pack again")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one worker made: a shard's part of the index, token_start counted from 0."""

    records: np.ndarray
    tokens: np.ndarray
    nbytes: int
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class _Job:
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
        DataError: too many bad utterances, or ``out`` holds something else.
    """
    if form not in ("wav", "flac"):
        raise ConfigError(f"format '{form}' is not known; use wav or flac")
    job = _Job(tokenizer, data.fields, sorted({u.lang for u in data}), form, allow_pipes)
    chunks = [data.utterances[i : i + shard_utts] for i in range(0, len(data), shard_utts)]
    with _partial(out) as partial:
        names = [f"shard_{number:06d}.tar" for number in range(len(chunks))]
        work = functools.partial(_write_shard, folder=partial)
        tasks, problems = list(zip(names, chunks)), list(data.problems)
        pieces = _pieces(work, tasks, job, nj, problems, max_bad, str(data.path), progress, len(data))
        return _assemble(partial, names, pieces, job, restore_spaces=False)


def index_tars(
    tars: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    nj: int = 1,
    max_bad: float = 0.01,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make a pack of tar shards that MooER or WeNet wrote; they stay where they are and are not copied.

    ``key.txt`` gives the field ``text``, with ▁ turned back into spaces; ``key.en`` would give ``text.en``.

    Args:
        tars: uncompressed tar files of ``key.txt`` and ``key.wav`` (flac, mp3, ...) members.
        out: folder for the index and the tokens.
        tokenizer: of the LLM that will be trained.
        nj: processes.
        max_bad: stop when more than this fraction of the utterances cannot be used.
        progress: called with the number of shards done and in all.

    Raises:
        DataError: a tar is damaged or truncated, or too many utterances are.
    """
    paths = [Path(tar).resolve() for tar in tars]
    keys = [_tar_keys(path) for path in paths]
    fields = sorted({field for found in keys for texts, _ in found.values() for field in texts})
    job = _Job(tokenizer, fields, [""])
    with _partial(out) as partial:
        names = [os.path.relpath(path, Path(out).resolve()) for path in paths]
        tasks = list(zip(map(str, paths), keys))
        pieces = _pieces(_index_tar, tasks, job, nj, [], max_bad, str(out), progress, sum(map(len, keys)))
        return _assemble(partial, names, pieces, job, restore_spaces=True)


class _partial:
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


def _pieces(work, tasks, job, nj, problems, max_bad, what, progress, total) -> list[_Piece]:
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


def _run(work, tasks, job: _Job, nj: int) -> Iterator[_Piece]:
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


def _start_worker(work, job: _Job) -> None:
    _worker.update(work=work, job=job)


def _work(task) -> _Piece:
    return _worker["work"](task, job=_worker["job"])


def _assemble(folder: Path, shards: list[str], pieces: list[_Piece], job: _Job, restore_spaces: bool) -> dict[str, Any]:
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


def _write_shard(task: tuple[str, list[Utterance]], job: _Job, folder: Path) -> _Piece:
    """One tar of utterances, and their part of the index."""
    name, utterances = task
    rows = _Rows(job)
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
                    _add(tar, f"{u.utt_id}.{_suffix_of(field)}", u.texts[field].encode())
            audio = io.BytesIO()
            write_wav(audio, samples, form=job.form.upper())
            _add(tar, f"{u.utt_id}.{job.form}", audio.getvalue())
            nbytes = len(audio.getvalue())
            rows.add(file.tell() - -(-nbytes // BLOCK) * BLOCK, nbytes, len(samples), fields, u.lang)
    return rows.piece((folder / name).stat().st_size)


def _index_tar(task: tuple[str, dict], job: _Job) -> _Piece:
    """The part of the index for one existing tar."""
    path, keys = task
    rows = _Rows(job)
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for key, (texts, audio) in sorted(keys.items(), key=lambda item: (item[1][1] or (0,))[0]):
        try:
            if audio is None or not texts:
                raise DataError("has no audio" if audio is None else "has no text")
            offset, nbytes = audio
            samples = len(read_audio(whole[offset : offset + nbytes]))
            fields = rows.encode({field: _clean(whole[at : at + size], True) for field, (at, size) in texts.items()})
        except DataError as error:
            rows.problems.append(f"{path}: {key} {error}")
            continue
        rows.add(offset, nbytes, samples, fields, "")
    return rows.piece(len(whole))


class _Rows:
    """Grows the index and the tokens of one shard."""

    def __init__(self, job: _Job):
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
        bits, ids = fields
        langs = self.job.langs
        self.records.append((0, offset // BLOCK, nbytes, samples, self.position, len(ids), bits, langs.index(lang)))
        self.tokens.append(ids)
        self.position += len(ids)

    def piece(self, nbytes: int) -> _Piece:
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, "<u4")
        return _Piece(np.array(self.records, RECORD), tokens, nbytes, self.problems)


def _tar_keys(path: Path) -> dict[str, tuple[dict[str, tuple[int, int]], tuple[int, int] | None]]:
    """key -> (field -> (offset, bytes), audio (offset, bytes)) of a tar, from its headers alone."""
    found: dict[str, list] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                key, _, suffix = member.name.rpartition(".")
                if member.offset_data + member.size > size:
                    raise DataError(f"{path}: truncated in {member.name}; copy it again")
                entry = found.setdefault(key, [{}, None])
                if suffix.lower() in AUDIO_SUFFIXES:
                    entry[1] = (member.offset_data, member.size)
                elif _field_of(suffix) is not None:
                    entry[0][_field_of(suffix)] = (member.offset_data, member.size)
            if tar.offset + BLOCK > size:
                raise DataError(f"{path}: truncated: no end of archive; copy it again")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: not an uncompressed tar that can be read ({error})") from None
    return {key: (texts, audio) for key, (texts, audio) in found.items()}


def _suffix_of(field: str) -> str:
    """``text`` -> ``txt``, ``text.en`` -> ``en``: WeNet and MooER take what follows the last dot as the kind."""
    return "txt" if field == "text" else field.removeprefix("text.")


def _field_of(suffix: str) -> str | None:
    if suffix == "txt":
        return "text"
    return f"text.{suffix}" if suffix.isalpha() and suffix not in (*AUDIO_SUFFIXES, "json") else None


def _clean(data: bytes, restore_spaces: bool) -> str:
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError("has text that is not UTF-8") from None
    return text.replace("▁", " ").strip() if restore_spaces else text


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


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    _check_size(path, count * dtype.itemsize)
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: missing from the pack; copy it again or run pack again") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes where {size} were written: truncated? Copy it again or run pack again")
