"""Kaldi data directories, read with every problem named by file and line, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from funasr_mooer.data.audio import split_range
from funasr_mooer.errors import DataError

SHOWN = 5  # problems quoted in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a Kaldi directory, its files joined.

    Attributes:
        source: what :func:`~funasr_mooer.data.audio.read_audio` reads, paths resolved.
        texts: field -> transcript: ``text`` from the file ``text``, ``text.en`` from ``text.en``.
        start_s: where it starts in ``source``, from ``segments``; None for all of it.
        where: ``file:line``, for messages.
    """

    utt_id: str
    source: str
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start_s: float | None = None
    end_s: float | None = None
    duration_s: float | None = None
    speaker: str = ""
    lang: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class KaldiDir:
    """What :func:`read_kaldi_dir` found: usable utterances, the fields they have, and what was wrong."""

    path: Path
    utterances: list[Utterance]
    fields: list[str]
    problems: list[str]

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)


def read_kaldi_dir(path: str | os.PathLike, max_bad: float = 0.01, need_text: bool = True) -> KaldiDir:
    """Read ``wav.scp`` with ``text``, ``text.<lang>``, ``segments``, ``utt2spk``, ``utt2dur``, ``utt2lang`` where present.

    An utterance without audio, or without a line in ``text``, is left out and its problem named. Order is that of
    ``segments``, else of ``wav.scp``; no file need be sorted. Relative audio paths start at the directory, else at its parent.

    Args:
        path: the directory.
        max_bad: stop when problems exceed this fraction of the utterances.
        need_text: False for decoding: ``text`` may be absent, or lack utterances.

    Raises:
        DataError: no such directory or no ``wav.scp``, no usable utterance, or too many problems; each with file and line.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; expected a Kaldi data directory with wav.scp and text")
    for name in ["wav.scp"] + ["text"] * need_text:
        if not (path / name).is_file():
            raise DataError(f"{path / name}: no such file; a Kaldi data directory has wav.scp and text")
    problems: list[str] = []
    wavs = _table(path / "wav.scp", problems)
    segments = _table(path / "segments", problems) if (path / "segments").is_file() else None
    fields = sorted(p.name for p in path.glob("text*") if p.name == "text" or p.name.startswith("text."))
    fields = [name for name in fields if (path / name).is_file() and not name.endswith(("~", ".bak", ".partial"))]
    texts = {name: _table(path / name, problems, may_be_empty=True) for name in fields}
    extra = {n: _table(path / n, problems) if (path / n).is_file() else {} for n in ("utt2spk", "utt2dur", "utt2lang")}

    utterances = []
    for utt_id, (line, value) in (wavs if segments is None else segments).items():
        where = f"{path / ('wav.scp' if segments is None else 'segments')}:{line}"
        try:
            source, start_s, end_s = (value, None, None) if segments is None else _segment(value, wavs)
            transcripts = _transcripts(utt_id, path, texts, problems if need_text else None)
            utterances.append(
                Utterance(
                    utt_id=utt_id,
                    source=_resolve(source, path),
                    texts=transcripts,
                    start_s=start_s,
                    end_s=end_s,
                    duration_s=_duration(extra["utt2dur"].get(utt_id), path),
                    speaker=extra["utt2spk"].get(utt_id, (0, ""))[1],
                    lang=extra["utt2lang"].get(utt_id, (0, ""))[1],
                    where=where,
                )
            )
        except DataError as error:
            problems.append(f"{where}: utt {utt_id} {error}")
    known = wavs if segments is None else segments
    for name, table in texts.items():
        problems += [
            f"{path / name}:{line}: utt {utt_id} has no line in {'wav.scp' if segments is None else 'segments'}"
            for utt_id, (line, _) in table.items()
            if utt_id not in known
        ]
    check_problems(problems, max([len(known)] + [len(table) for table in texts.values()]), max_bad, str(path))
    if not utterances:
        raise DataError(f"{path}: no usable utterance" + _quote(problems))
    return KaldiDir(path, utterances, fields, problems)


def check_problems(problems: list[str], total: int, max_bad: float, what: str) -> None:
    """Stop when ``problems`` exceed ``max_bad`` (a fraction) of ``total``; the message quotes the first ones."""
    if len(problems) > max_bad * max(total, 1):
        raise DataError(
            f"{what}: {len(problems)} problems in {total} utterances, above the limit of {max_bad:.2%} (max_bad)"
            + _quote(problems)
        )


def write_kaldi_dir(path: str | os.PathLike, utterances: Iterable[Utterance]) -> int:
    """Write utterances as a Kaldi data directory, sorted by id; the old one, if any, is replaced at the end.

    Args:
        path: the directory to write; its parent is made when absent.
        utterances: ``source`` is written as it is; ``segments`` is not written (give whole files).

    Returns:
        The number of utterances.

    Raises:
        DataError: no utterances, two with one id, an id with spaces, a source that is no line, or ``path`` holds
            something else.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / "wav.scp").is_file():
        raise DataError(f"{path}: holds files and no wav.scp; give a new directory")
    for folder in (each for each in (path.iterdir() if path.exists() else ()) if each.is_dir()):
        raise DataError(f"{path}: holds the folder {folder.name}, which would be lost; give a new directory")
    chosen = sorted(utterances, key=lambda u: u.utt_id)
    if not chosen:
        raise DataError(f"{path}: no utterances to write")
    for a, b in zip(chosen, chosen[1:]):
        if a.utt_id == b.utt_id:
            raise DataError(f"{path}: two utterances are called {a.utt_id}")
    tables: dict[str, list[str]] = {"wav.scp": [], "utt2spk": []}
    for u in chosen:
        if not u.utt_id or len(u.utt_id.split()) != 1:
            raise DataError(f"{path}: '{u.utt_id}': an utterance id is one word")
        if u.source.strip().splitlines() != [u.source]:
            raise DataError(f"{path}: {u.utt_id}: {u.source!r} cannot be one line of wav.scp")
        columns = {"wav.scp": u.source, "utt2spk": u.speaker or u.utt_id, "utt2lang": u.lang, **u.texts}
        if u.duration_s is not None:
            columns["utt2dur"] = f"{u.duration_s:.3f}"
        for name, value in columns.items():
            if value:
                value = value if name == "wav.scp" else " ".join(value.split())
                tables.setdefault(name, []).append(f"{u.utt_id} {value}\n")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, lines in tables.items():
        (partial / name).write_text("".join(lines), encoding="utf-8")
    replace_dir(partial, path)
    return len(chosen)


def replace_dir(new: Path, old: Path) -> None:
    """Rename the finished directory ``new`` to ``old``, whose former content is deleted."""
    aside = old.with_name(old.name + ".replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def _table(path: Path, problems: list[str], may_be_empty: bool = False) -> dict[str, tuple[int, str]]:
    """``id -> (line number, rest)``; a line that cannot be used becomes a problem."""
    rows: dict[str, tuple[int, str]] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                problems.append(f"{where}: not UTF-8 (byte {error.start + 1}); convert the file with iconv")
                continue
            if not line:
                continue
            if "\0" in line:
                problems.append(f"{where}: holds a NUL character; the file was damaged when it was copied or written")
                continue
            utt_id, value = (line.split(maxsplit=1) + [""])[:2]
            if utt_id in rows:
                problems.append(f"{where}: {utt_id} was already given in line {rows[utt_id][0]}; the first is kept")
            elif not value and not may_be_empty:
                problems.append(f"{where}: {utt_id} has nothing after it")
            else:
                rows[utt_id] = (number, value)
    return rows


def _segment(value: str, wavs: Mapping[str, tuple[int, str]]) -> tuple[str, float, float]:
    """``recording start end`` -> its source, start and end in seconds."""
    try:
        recording, start, end = value.split()
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise DataError(f"expected 'recording start end', found '{value}'") from None
    if recording not in wavs:
        raise DataError(f"is cut from {recording}, which has no line in wav.scp")
    if not 0 <= start_s < end_s < math.inf:
        raise DataError(f"starts at {start} s and ends at {end} s")
    return wavs[recording][1], start_s, end_s


def _transcripts(utt_id: str, path: Path, texts: Mapping, problems: list[str] | None) -> dict[str, str]:
    """Field -> transcript of one utterance; ``text`` must be there, others may be absent.

    Without ``problems`` any may be absent or empty.
    """
    found = {}
    for name, table in texts.items():
        if utt_id not in table:
            if name == "text" and problems is not None:
                raise DataError(f"has no line in {path / name}")
            continue
        line, value = table[utt_id]
        if value:
            found[name] = " ".join(value.split())
        elif problems is None:
            continue
        elif name == "text":
            raise DataError(f"has an empty transcript in {path / name}:{line}")
        else:
            problems.append(f"{path / name}:{line}: utt {utt_id} has an empty transcript")
    return found


def _resolve(source: str, folder: Path) -> str:
    """An audio source whose relative path starts at the folder of wav.scp, else at the folder above it."""
    if source.endswith("|"):
        return source
    path, offset, nbytes = split_range(source)
    if os.path.isabs(path):
        return source
    base = folder if (folder / path).exists() else folder.parent
    return ":".join(str(part) for part in (base / path, offset, nbytes) if part is not None)


def _duration(row: tuple[int, str] | None, path: Path) -> float | None:
    if row is None:
        return None
    try:
        seconds = float(row[1])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"has the duration '{row[1]}' in {path / 'utt2dur'}:{row[0]}; expected seconds")
    return seconds


def _quote(problems: list[str]) -> str:
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "".join(f"\n  {problem}" for problem in problems[:SHOWN]) + more
