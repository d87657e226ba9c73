"""Making a pack of tar shards that are already there: an index and tokens beside them, no audio copied."""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from funasr_mooer.data.audio import read_audio
from funasr_mooer.data.pack_format import AUDIO_SUFFIXES, BLOCK, Tokenizer, clean_text, field_of
from funasr_mooer.data.pack_parts import Job, Piece, Rows, assemble, make_pieces, partial_pack
from funasr_mooer.errors import DataError


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
    job = Job(tokenizer, fields, [""])
    with partial_pack(out) as partial:
        names = [os.path.relpath(path, Path(out).resolve()) for path in paths]
        tasks = list(zip(map(str, paths), keys))
        pieces = make_pieces(_index_tar, tasks, job, nj, [], max_bad, str(out), progress, sum(map(len, keys)))
        return assemble(partial, names, pieces, job, restore_spaces=True)


def _index_tar(task: tuple[str, dict], job: Job) -> Piece:
    """The part of the index for one existing tar."""
    path, keys = task
    rows = Rows(job)
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for key, (texts, audio) in sorted(keys.items(), key=lambda item: (item[1][1] or (0,))[0]):
        try:
            if audio is None or not texts:
                raise DataError("has no audio" if audio is None else "has no text")
            offset, nbytes = audio
            samples = len(read_audio(whole[offset : offset + nbytes]))
            fields = rows.encode(
                {field: clean_text(whole[at : at + size], True) for field, (at, size) in texts.items()}
            )
        except DataError as error:
            rows.problems.append(f"{path}: {key} {error}")
            continue
        rows.add(offset, nbytes, samples, fields, "")
    return rows.piece(len(whole))


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
                elif field_of(suffix) is not None:
                    entry[0][field_of(suffix)] = (member.offset_data, member.size)
            if tar.offset + BLOCK > size:
                raise DataError(f"{path}: truncated: no end of archive; copy it again")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: not an uncompressed tar that can be read ({error})") from None
    return {key: (texts, audio) for key, (texts, audio) in found.items()}
