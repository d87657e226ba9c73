"""What the files of a pack look like: tar shards of audio and text, an index of 26 bytes per utterance, ready-made tokens.

    shard_000000.tar ...   per utterance utt.txt (and utt.en for the field text.en, ...), then utt.wav or utt.flac
    index.bin              RECORD per utterance, 26 bytes
    tokens.bin             uint32: per utterance, for each field it has: [count, ids...], no special tokens
    meta.json              fields, languages, shards, sizes, tokenizer fingerprint, what was skipped

MooER and WeNet can read the shards too. ``shards.py`` reads a pack, ``pack_writer.py`` makes one from a Kaldi directory, and
``tar_index.py`` from tars that are already there.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Protocol

import numpy as np

from funasr_mooer.errors import DataError

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


class Tokenizer(Protocol):
    """What packing needs of a tokenizer; corpus text goes through ``encode_plain`` where there is one."""

    fingerprint: str

    def encode(self, text: str) -> list[int]: ...


def suffix_of(field: str) -> str:
    """``text`` -> ``txt``, ``text.en`` -> ``en``: WeNet and MooER take what follows the last dot as the kind."""
    return "txt" if field == "text" else field.removeprefix("text.")


def field_of(suffix: str) -> str | None:
    """The text field that a member of a tar holds, by what follows the last dot of its name; None for others."""
    if suffix == "txt":
        return "text"
    return f"text.{suffix}" if suffix.isalpha() and suffix not in (*AUDIO_SUFFIXES, "json") else None


def clean_text(data: bytes, restore_spaces: bool) -> str:
    """A transcript as it stands in a tar; MooER writes spaces as ▁, ``restore_spaces`` turns them back."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError("has text that is not UTF-8") from None
    return text.replace("▁", " ").strip() if restore_spaces else text


def check_size(path: Path, size: int) -> None:
    """DataError unless the file is there with all its bytes."""
    try:
        found = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: missing from the pack; copy it again or run pack again") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes where {size} were written: truncated? Copy it again or run pack again")
