"""How long a listener waits: what a stream was handed when, what was known when."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class StreamLatency:
    """Times of one stream, in seconds from its first sample on, as they would be at the pace of a microphone.

    Attributes:
        audio_s: audio so far.
        first_text_s: when the first text was known.
        after_word_s: per segment with text, from the end of its last word until its final text was known; what is
            waited for to be sure of the silence is part of it.
        after_audio_s: from the last sample until the last result was known.
    """

    audio_s: float = 0.0
    first_text_s: float | None = None
    after_word_s: list[float] = dataclasses.field(default_factory=list)
    after_audio_s: float | None = None


class LatencyMeter:
    """Latency of streams that are fed together.

    Audio that is fed faster than it was spoken has the latency that it would have had at its own pace: a piece
    arrives when its last sample was spoken, and is worked on as soon as the piece before it is done.

    Args:
        count: number of streams.
    """

    def __init__(self, count: int):
        self.streams = [StreamLatency() for _ in range(count)]
        self.now = 0.0  # when the last piece was done
        self.compute_s: list[float] = []  # per call that heard something, all streams together
        self.total_s = 0.0

    def fed(self, chosen: list[int], seconds: list[float], compute_s: float, results: list[dict[str, Any]]) -> None:
        """Take down one call of ``Streamer.feed``.

        Args:
            chosen: numbers of the streams in the call.
            seconds: audio that each was handed.
            compute_s: time that the call took.
            results: what it returned.
        """
        for i, more in zip(chosen, seconds):
            self.streams[i].audio_s += more
        arrived = max(self.streams[i].audio_s for i in chosen)
        self.now = max(self.now, arrived) + compute_s
        self.total_s += compute_s
        self.compute_s.append(compute_s)
        for i, result in zip(chosen, results):
            stream = self.streams[i]
            if stream.first_text_s is None and (result["text"] or result["segments"]):
                stream.first_text_s = self.now
            for segment in result["segments"]:
                if segment["timestamp"]:
                    stream.after_word_s.append(self.now - segment["timestamp"][-1][1] / 1000)
            if result["is_final"]:
                stream.after_audio_s = self.now - stream.audio_s

    def figures(self) -> dict[str, float]:
        """Means over streams, s; compute per call, ms; RTF is compute time over audio of all streams."""
        audio_s = sum(stream.audio_s for stream in self.streams)
        found = {
            "streams": len(self.streams),
            "audio_s": audio_s,
            "rtf": self.total_s / max(audio_s, 1e-9),
            "compute_mean_ms": 1000 * self.total_s / max(len(self.compute_s), 1),
            "compute_max_ms": 1000 * max(self.compute_s, default=0.0),
        }
        waits = {
            "first_text_s": [s.first_text_s for s in self.streams if s.first_text_s is not None],
            "final_after_last_word_s": [wait for stream in self.streams for wait in stream.after_word_s],
            "final_after_audio_s": [s.after_audio_s for s in self.streams if s.after_audio_s is not None],
        }
        return found | {name: sum(values) / len(values) for name, values in waits.items() if values}
