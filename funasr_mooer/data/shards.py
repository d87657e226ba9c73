"""Reading packs: any utterance of tar shards by its number, through memory maps; see pack_format.py for the files.

Nothing is ever extracted to disk, and names inside a tar are never used as paths.
"""

from __future__ import annotations

import collections
import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE, decode, read_audio, to_float
from funasr_mooer.data.pack_format import BLOCK, RECORD, VERSION, Tokenizer, check_size, clean_text, field_of
from funasr_mooer.errors import DataError

OPEN_SHARDS = 256  # mapped at once by one process


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
        try:
            self.meta: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{meta}: is damaged ({error}); run pack again") from None
        if self.meta.get("version") != VERSION:
            raise DataError(f"{meta}: version {self.meta.get('version')}, this program reads {VERSION}; run pack again")
        self.fields: list[str] = self.meta["fields"]
        self.langs: list[str] = self.meta["langs"]
        self.records = _map(self.path / "index.bin", RECORD, self.meta["utterances"])
        self._tokens = _map(self.path / "tokens.bin", np.dtype("<u4"), self.meta["tokens"])
        for name, size in zip(self.meta["shards"], self.meta["shard_bytes"]):
            check_size(self.path / name, size)
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
        """Audio of utterance ``i`` (N,) at 16 kHz: int16 for 16-bit wav (a view of the file) and flac, else float32 in [-1, 1)."""
        data = self._audio(i)
        try:
            samples, rate = decode(data, "audio")
            if rate == SAMPLE_RATE and samples.ndim == 1 and samples.dtype == np.int16 and len(samples):
                return samples
            return read_audio(data)
        except DataError as error:
            shard = self.meta["shards"][self.records[i]["shard"]]
            raise DataError(f"{self.path / shard}: utterance {i}: {error}") from None

    def waveform(self, i: int) -> np.ndarray:
        """Audio of utterance ``i``: (N,) float32 in [-1, 1) at 16 kHz."""
        return to_float(self.samples(i))

    def tokens(self, i: int) -> dict[str, np.ndarray]:
        """Field -> token ids (uint32) of utterance ``i``, without special tokens."""
        _, _, _, _, start, count, bits, _ = self.records[i].item()
        ids, position, found = self._tokens[start : start + count], 0, {}
        for bit, field in enumerate(self.fields):
            if bits >> bit & 1:
                end = position + 1 + int(ids[position])
                found[field] = ids[position + 1 : end]
                position = end
        return found

    def token_counts(self, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Field -> number of tokens of each of these utterances (n,) int32, 0 where it is absent; reads only the counts."""
        records = self.records[rows]
        if len(self.fields) == 1:
            count = records["token_count"].astype(np.int32)
            return {self.fields[0]: np.maximum(count - 1, 0)}
        position, counts = records["token_start"].astype(np.int64), {}
        for bit, field in enumerate(self.fields):
            has = (records["fields"] >> bit & 1).astype(bool)
            count = np.zeros(len(records), np.int32)
            count[has] = self._tokens[position[has]]
            position += np.where(has, count + 1, 0)
            counts[field] = count
        return counts

    def utt_id(self, i: int) -> str:
        """Name of utterance ``i``, read from the tar."""
        shard, offset, *_ = self.records[i].item()
        start = (offset - 1) * BLOCK
        header = self._shard(shard)[start : start + 346]
        name = header[:100].rstrip(b"\0")
        # A name that fills its place, or is not plain ASCII in another writer's tar, stands in an extra header.
        if len(name) >= 100 or b"?" in name or header[345:] != b"\0":
            return self._audio_member(i).name.rpartition(".")[0]
        return name.decode("utf-8", errors="replace").rpartition(".")[0]

    def text(self, i: int) -> dict[str, str]:
        """Field -> transcript of utterance ``i``, read from the tar."""
        key = self.utt_id(i)
        texts = {}
        for member, data in self._members(i):
            name, _, suffix = member.name.rpartition(".")
            field = field_of(suffix)
            if name == key and field in self.fields:
                texts[field] = clean_text(data, self.meta["restore_spaces"])
        return {field: texts[field] for field in self.fields if field in texts}

    def lang(self, i: int) -> str:
        """Language of utterance ``i`` from ``utt2lang``, or ''."""
        return self.langs[self.records[i]["lang"]]

    def _audio(self, i: int) -> memoryview:
        shard, offset, nbytes, *_ = self.records[i].item()
        return memoryview(self._shard(shard))[offset * BLOCK : offset * BLOCK + nbytes]

    def _shard(self, number: int) -> mmap.mmap:
        """The mapped shard; the least recently used one is let go when many are open.

        Raises:
            DataError: it has vanished.
        """
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = self.path / self.meta["shards"][number]
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: was there when the pack was opened and cannot be read now ({error}); put it back and run the "
                "same command again"
            ) from error
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


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    check_size(path, count * dtype.itemsize)
    # A plain array over the map: np.memmap makes each of the many small reads several times slower.
    return np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, dtype)
