"""Text units of U2++: WeNet's ``units.txt``, of characters, words or sentence pieces."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from funasr_mooer.errors import CheckpointError, ConfigError, DataError, DependencyError

BLANK, UNK, SPACE, BOTH = "<blank>", "<unk>", "▁", "<sos/eos>"
MARKED = re.compile(r"<.+>|\[.+\]|\{.+\}")
CHINESE = re.compile(r"([\u4e00-\u9fff])")


class MooerUnitsTokenizer:
    """A table of units, one ``unit id`` per line, as WeNet writes and reads it.

    Text is cut into characters (a space is the unit ``▁``, left out where the table has none), at spaces, or,
    with a sentence piece model, into Chinese characters and pieces of upper-case words. Units such as ``<noise>``
    or ``[laugh]`` stay whole.

    Args:
        init: the table, or a folder that holds it as ``units.txt``.
        split_with_space: units are words; by default, whether the table has units of several characters.
        special_tokens: ids of ``<blank>``, ``<unk>``, ``<sos>`` and ``<eos>``; what is not given is looked up in
            the table. ``<sos>`` and ``<eos>`` may be one unit, ``<sos/eos>``; without any it is the last unit.
        bpe_model: sentence piece model; by default ``bpe.model`` of the folder, where there is one.

    Raises:
        CheckpointError: no such table or model.
        ConfigError: a table with a line that is no unit, or ids with gaps.
    """

    def __init__(
        self,
        init: str,
        split_with_space: bool | None = None,
        special_tokens: Mapping | None = None,
        bpe_model: str | None = None,
    ):
        self.file = Path(init) / "units.txt" if Path(init).is_dir() else Path(init)
        if not self.file.is_file():
            raise CheckpointError(
                f"tokenizer_conf.init: {self.file} does not exist; give units.txt with ++tokenizer_conf.init=FILE, "
                "or make one with funasr-mooer units"
            )
        self.table = read_units(self.file)
        self.units = {i: unit for unit, i in reversed(self.table.items())}
        special = {**_specials(self.table), **{k: int(v) for k, v in (special_tokens or {}).items()}}
        for name, i in special.items():
            if i not in self.units:
                raise ConfigError(
                    f"tokenizer_conf.special_tokens.{name}={i}: {self.file} has ids up to {len(self) - 1}"
                )
        self.pad_id, self.sos_id, self.eos_id = special[BLANK], special["<sos>"], special["<eos>"]
        self.unk_id: int | None = special.get(UNK)
        beside = self.file.with_name("bpe.model")
        if bpe_model is None and Path(init).is_dir() and beside.is_file():
            bpe_model = str(beside)
        self.bpe_model = None if bpe_model is None else Path(bpe_model)
        if self.bpe_model is not None and not self.bpe_model.is_file():
            raise CheckpointError(f"tokenizer_conf.bpe_model: {bpe_model} does not exist")
        self._silent = {self.pad_id, self.sos_id, self.eos_id}  # never text
        words = [unit for unit, i in self.table.items() if i not in self._silent]
        marked = [unit for unit in words if MARKED.fullmatch(unit)]
        if split_with_space is None:
            split_with_space = self.bpe_model is None and any(len(unit) > 1 for unit in {*words} - {*marked})
        self.split_with_space = split_with_space
        self._marked = re.compile("(" + "|".join(map(re.escape, marked)) + ")") if marked else None

    def __len__(self) -> int:
        return len(self.units)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_pieces"}  # made again in each process

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what decides how text becomes ids."""
        digest = hashlib.sha256(self.file.read_bytes())
        digest.update(f"{self.split_with_space} {self.pad_id} {self.sos_id} {self.eos_id} {self.unk_id}".encode())
        if self.bpe_model is not None:
            digest.update(self.bpe_model.read_bytes())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``.

        Raises:
            DataError: a unit that is not in the table, which has no ``<unk>`` either.
        """
        ids = []
        for unit in self.split(text):
            i = self.table.get(unit, self.unk_id)
            if i is None:
                raise DataError(f"'{unit}' is not in {self.file.name}, which has no {UNK}")
            if i not in self._silent:  # "<blank>" in a text is not a blank
                ids.append(i)
        return ids

    def split(self, text: str) -> list[str]:
        """Units of ``text``, in the table or not."""
        parts = [text.strip()] if self._marked is None else self._marked.split(text.strip())
        units = []
        for number, part in enumerate(parts):
            units += [part] if number % 2 else self._split_plain(part)
        return units

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; blanks, start and end leave no trace."""
        units = [self.units[i] for i in ids if i not in self._silent]
        if self.bpe_model is None and self.split_with_space:
            return " ".join(units)
        return "".join(units).replace(SPACE, " ").strip()

    def get_vocab(self) -> dict[str, int]:
        """Unit to id; FunASR counts it."""
        return dict(self.table)

    def _split_plain(self, text: str) -> list[str]:
        if self.bpe_model is not None:
            return split_mixed(text, self._pieces)
        if self.split_with_space:
            return text.split()
        return [SPACE if char == " " else char for char in text if char != " " or SPACE in self.table]

    @functools.cached_property
    def _pieces(self):
        return _sentencepiece().SentencePieceProcessor(model_file=str(self.bpe_model))


def read_units(path: str | Path) -> dict[str, int]:
    """Unit to id, in the order of the file.

    Raises:
        ConfigError: not UTF-8, a line that is not ``unit id``, or ids that leave gaps.
    """
    table: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdigit():
            raise ConfigError(f"{path}:{number}: expected 'unit id', found {line!r}")
        table[words[0]] = int(words[1])
    if not table or set(table.values()) != set(range(max(table.values()) + 1)):
        raise ConfigError(f"{path}: ids must be 0, 1, 2, ... without gaps")
    return table


def split_mixed(text: str, pieces: Any) -> list[str]:
    """Chinese characters, and sentence pieces of the upper-case words between them."""
    parts = [part for part in CHINESE.split(text.upper()) if part.strip()]
    return [u for part in parts for u in ([part] if CHINESE.fullmatch(part) else pieces.encode_as_pieces(part))]


def train_pieces(texts: Iterable[str], size: int, path: str | Path) -> Any:
    """Write a sentence piece model of (at most) ``size`` pieces for what is not Chinese in ``texts``; the loaded model.

    Raises:
        DataError: there are no such words, or ``size`` is below the number of letters.
    """
    parts = [part.strip() for text in texts for part in CHINESE.split(text.upper())]
    words = [part for part in parts if part and not CHINESE.fullmatch(part)]
    sentencepiece, written = _sentencepiece(), io.BytesIO()
    limits = {
        "vocab_size": size,
        "hard_vocab_limit": False,
        "input_sentence_size": 1_000_000,
        "bos_id": -1,
        "eos_id": -1,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=written, model_type="unigram", minloglevel=2, **limits
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1] if words else "no words in these texts"
        raise DataError(f"{size} sentence pieces of {len(words)} texts: {reason}") from None
    Path(path).write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def make_units(
    texts: Iterable[str], split_with_space: bool = False, min_count: int = 1, pieces: Any = None
) -> list[str]:
    """The units of a corpus, specials first: ``<blank>``, ``<unk>``, ``<sos/eos>``, then by code point.

    Args:
        texts: transcripts.
        split_with_space: cut them at spaces; else into characters, or with
        pieces: a sentence piece model, into Chinese characters and pieces.
        min_count: rarer units are left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        if pieces is not None:
            counts.update(split_mixed(text, pieces))
        else:
            counts.update(text.split() if split_with_space else text.strip().replace(" ", SPACE))
    return [BLANK, UNK, BOTH, *sorted(unit for unit, count in counts.items() if count >= min_count)]


def write_units(units: Sequence[str], path: str | Path) -> None:
    """Write a table with these units in this order."""
    Path(path).write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)), encoding="utf-8")


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise DependencyError("sentence pieces need sentencepiece: pip install sentencepiece") from error
    return sentencepiece


def _specials(table: Mapping[str, int]) -> dict[str, int]:
    """What the table itself says about special units."""
    end = table.get(BOTH, max(table.values()))
    found = {BLANK: table.get(BLANK, 0), "<sos>": table.get("<sos>", end)}
    found["<eos>"] = table.get("<eos>", found["<sos>"])
    return found | ({UNK: table[UNK]} if UNK in table else {})
