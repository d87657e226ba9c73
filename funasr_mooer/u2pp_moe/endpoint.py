"""Where one utterance of an endless stream ends: rules over silence and length, as in Kaldi's online decoders."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from funasr_mooer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class EndpointConf:
    """``endpoint_conf``: the rules; the first that holds ends the segment. null switches a rule off.

    Silence is what the CTC head calls blank. Rules are looked at after each chunk, so a segment may last up to one
    chunk longer than they say.

    Attributes:
        silence_after_text_ms: silence at the end of a segment in which something was said.
        silence_without_text_ms: silence at the end of a segment in which nothing was said; such a segment is dropped.
        max_segment_ms: a segment's length, whatever was said.
        blank_threshold: a frame is silent if the probability of blank is above this.
    """

    silence_after_text_ms: float | None = 1000.0
    silence_without_text_ms: float | None = 5000.0
    max_segment_ms: float | None = 20000.0
    blank_threshold: float = 0.8

    def __post_init__(self) -> None:
        for name in ("silence_after_text_ms", "silence_without_text_ms", "max_segment_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"endpoint_conf.{name}={value:g} must be above 0 ms; null switches the rule off")
        if not 0 < self.blank_threshold < 1:
            raise ConfigError(f"endpoint_conf.blank_threshold={self.blank_threshold:g} must lie between 0 and 1")

    def rule(self, has_text: bool, silence_ms: float, length_ms: float) -> str | None:
        """The rule that ends a segment now, or None.

        Args:
            has_text: whether tokens were found in it.
            silence_ms: silence at its end.
            length_ms: its length, silence included.
        """
        silence = "silence_after_text_ms" if has_text else "silence_without_text_ms"
        for name, reached in ((silence, silence_ms), ("max_segment_ms", length_ms)):
            limit = getattr(self, name)
            if limit is not None and reached >= limit:
                return name
        return None


def trailing_silence(log_probs: Tensor, blank_id: int, threshold: float, before: int = 0) -> int:
    """Frames since the last one that spoke.

    Args:
        log_probs: of CTC for new frames, (T, V).
        blank_id: the blank.
        threshold: a frame speaks if the probability of blank is not above this.
        before: what this function returned for the frames before.
    """
    speaking = (log_probs[:, blank_id] <= math.log(threshold)).nonzero()
    return len(log_probs) - 1 - int(speaking[-1]) if len(speaking) else before + len(log_probs)
