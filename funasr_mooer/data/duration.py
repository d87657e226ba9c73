"""How long audio lasts, from its header: no samples are read or decoded."""

from __future__ import annotations

import io
import os
import struct
from typing import BinaryIO

from funasr_mooer.data.audio import SAMPLE_RATE, split_range

UNKNOWN = 2**48  # samples; libsndfile says 2**63 - 1 where a header does not tell


def seconds(source: str | os.PathLike) -> float | None:
    """Length of what :func:`~funasr_mooer.data.audio.read_audio` would read, in seconds.

    Args:
        source: a file, ``x.tar:OFFSET:NBYTES``, or ``x.ark:OFFSET``, whose entry is a wav, a flac, or floats at 16000 Hz.

    Returns:
        None where only reading it would tell: a command, or a header that is damaged, absent or of another kind.
    """
    name = os.fspath(source)
    if name.rstrip().endswith("|"):
        return None
    path, offset, nbytes = split_range(name)
    try:
        if offset is None:
            return _of_file(path)
        with open(path, "rb") as file:
            if nbytes is None:
                return _of_ark(file, offset)
            return _of_file(_Range(file, offset, nbytes))
    except (OSError, struct.error):
        return None


def _of_file(file: str | BinaryIO) -> float | None:
    import soundfile

    try:
        found = soundfile.info(file)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw, whose rate is written nowhere
        return None
    return found.frames / found.samplerate if found.frames < UNKNOWN else None


def _of_ark(file: BinaryIO, offset: int) -> float | None:
    """Length of the entry that starts at an offset."""
    file.seek(offset)
    head = file.read(16)
    if head[:4] == b"RIFF":
        return _of_file(_Range(file, offset, 8 + int.from_bytes(head[4:8], "little")))
    if head[:4] == b"fLaC":
        return _of_file(_Range(file, offset))
    if head[:5] == b"AUDIO":  # kaldiio: the number of bytes of a length, the length, an audio file
        start = 6 + int.from_bytes(head[5:6], "little")
        return _of_file(_Range(file, offset + start, int.from_bytes(head[6:start], "little")))
    if head[:2] == b"\0B" and head[3:5] == b"V ":  # Kaldi's vector of floats
        return struct.unpack_from("<xi", head, 5)[0] / SAMPLE_RATE
    if head[:2] == b"\0B" and head[3:5] == b"M ":  # Kaldi's matrix of floats, (C, N)
        return max(struct.unpack_from("<xixi", head, 5)) / SAMPLE_RATE
    return None


class _Range(io.RawIOBase):
    """A byte range of a file, as a file; cut at the end of the file."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int | None = None):
        rest = max(os.fstat(file.fileno()).st_size - start, 0)
        self.file, self.start, self.nbytes = file, start, rest if nbytes is None else min(nbytes, rest)
        self.position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.nbytes}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(self.nbytes - self.position, 0)])
        self.position += count
        return count
