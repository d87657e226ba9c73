"""Named, versioned text normalisers: a published number says which one it used (``basic@1``).

A change that can change a score raises the normaliser's version; old numbers then say so themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError

# Character classes for regular expressions. U+3007 is the Chinese zero, not punctuation.
IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3040-\u30ff\u31f0-\u31ff"

SAID_ALOUD = frozenset("%‰&@+=°$€£¥")  # symbols that are words to a speaker: dropping them would hide errors

_NEXT_TO_CJK = re.compile(f"(?<=[{IDEOGRAPHS}{KANA}]) | (?=[{IDEOGRAPHS}{KANA}])")
_TAG = re.compile(r"<[^<>\s]*>")
_APOSTROPHES = str.maketrans("‘’ʼ＇", "''''")


@dataclass(frozen=True)
class Normaliser:
    """A function from text to text with a name and a version."""

    name: str
    version: int
    function: Callable[[str], str]

    @property
    def label(self) -> str:
        """What result.json records: ``name@version``."""
        return f"{self.name}@{self.version}"

    def __call__(self, text: str) -> str:
        """``text`` as this normaliser writes it."""
        return self.function(text)


def get_normaliser(name: str) -> Normaliser:
    """Find a normaliser by ``name`` or, to insist on one version, ``name@version``.

    Raises:
        ConfigError: the name is unknown, or this release has another version of it.
    """
    plain, _, version = name.partition("@")
    if plain not in NORMALISERS:
        raise ConfigError(f"normaliser '{name}' is not known{suggest(plain, NORMALISERS)}")
    found = NORMALISERS[plain]
    if version and version != str(found.version):
        raise ConfigError(f"normaliser '{name}': this release has {found.label}; scores of the two do not compare")
    return found


def none(text: str) -> str:
    """The text as it is; only spaces at the ends go."""
    return text.strip()


def basic(text: str) -> str:
    """NFKC, lower case, no punctuation, single spaces: what AISHELL and LibriSpeech results usually assume."""
    return _words(text).lower()


def mooer(text: str) -> str:
    """Upper-case Latin as in MooER's transcripts: spaces between words and numbers, none next to a CJK character.

    ``<tags>`` go, as in the original scorer. The original's text normalisation also deletes the spaces around
    digits and at punctuation (``ROOM101IS OPEN``); that is a defect which this one does not share.
    """
    return _NEXT_TO_CJK.sub("", _words(_TAG.sub(" ", text)).upper())


NORMALISERS = {function.__name__: Normaliser(function.__name__, 1, function) for function in (none, basic, mooer)}


def _words(text: str) -> str:
    """NFKC without punctuation, words one space apart; keeps ``it's``, ``3.14`` and ``50%``."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
    return " ".join("".join(_kept(text, i) for i in range(len(text))).split())


def _kept(text: str, i: int) -> str:
    """Character ``i`` of ``text``: itself, a space where punctuation parts two words, or nothing."""
    char = text[i]
    category = unicodedata.category(char)
    if category == "Cf":  # zero-width marks and the like: invisible, they part nothing
        return ""
    if category[0] not in "PSC" or char in SAID_ALOUD:
        return char
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    within_word = char == "'" and before.isalpha() and after.isalpha()
    within_number = char == "." and before.isdecimal() and after.isdecimal()
    return char if within_word or within_number else " "
