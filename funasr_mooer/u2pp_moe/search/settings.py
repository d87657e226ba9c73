"""How an utterance is decoded: settings with WeNet's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from funasr_mooer.config import overlay, suggest
from funasr_mooer.errors import ConfigError

METHODS = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")
KNOW_HOTWORDS = ("ctc_prefix_beam_search", "attention_rescoring")


@dataclasses.dataclass
class DecodeConf:
    """How an utterance is decoded; names and meanings are WeNet's.

    Attributes:
        method: ``ctc_greedy_search``, ``ctc_prefix_beam_search``, ``attention`` or ``attention_rescoring``.
        decoding_chunk_size: encoder frames per chunk, as streaming would see them; -1 is the whole utterance.
        num_decoding_left_chunks: chunks of history that a frame sees; negative is all.
        beam_size: candidates kept.
        ctc_weight: of the CTC score in rescoring.
        reverse_weight: of the right-to-left decoder in rescoring, 0 to 1; None is the weight it was trained with.
        blank_penalty: taken off the blank's score before the softmax; above 0 fewer words are left out.
        length_penalty: attention scores are divided by length to this power.
        hotwords: phrases that a CTC prefix search (so also rescoring) is told to expect; see
            :func:`~funasr_mooer.u2pp_moe.context.read_hotwords`.
    """

    method: str = "attention_rescoring"
    decoding_chunk_size: int = -1
    num_decoding_left_chunks: int = -1
    beam_size: int = 10
    ctc_weight: float = 0.5
    reverse_weight: float | None = None
    blank_penalty: float = 0.0
    length_penalty: float = 0.0
    hotwords: Any = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is no decoding method{suggest(self.method, METHODS)}")
        if self.hotwords and self.method not in KNOW_HOTWORDS:
            raise ConfigError(f"hotwords: method={self.method} knows none; use {' or '.join(KNOW_HOTWORDS)}")
        if self.beam_size < 1:
            raise ConfigError(f"beam_size={self.beam_size} must be at least 1")
        if self.decoding_chunk_size == 0:
            raise ConfigError("decoding_chunk_size=0: a chunk holds at least 1 frame; -1 means the whole utterance")
        if self.reverse_weight is not None and not 0 <= self.reverse_weight <= 1:
            raise ConfigError(f"reverse_weight={self.reverse_weight} must lie between 0 and 1")


DECODE_KEYS = tuple(field.name for field in dataclasses.fields(DecodeConf))


def decode_conf(values: Mapping[str, Any] | None, call: Mapping[str, Any] | None = None) -> DecodeConf:
    """Decoding settings of a config, and those of a call, which go first; what else the call holds is passed over."""
    return overlay(DecodeConf, values, call, "decode_conf")
