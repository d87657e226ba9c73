"""Streaming: audio in pieces of any size, text as it comes, many streams in one batch.

All that is known of a stream lies in its :class:`Stream`; the model keeps nothing. What is heard equals the full
pass under the same chunk mask, whatever the pieces and whichever streams share a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.ctc import CTCHead
from funasr_mooer.u2pp_moe.context import ContextGraph, context_graph
from funasr_mooer.u2pp_moe.endpoint import EndpointConf, trailing_silence
from funasr_mooer.u2pp_moe.feature_stream import FeatureStream, Piece
from funasr_mooer.u2pp_moe.search import DecodeConf, GreedyPath, Hypothesis, PrefixBeam

# Shapes: B streams, T feature frames, F feature size, T' encoder frames, D encoder size, L layers, H heads.
STREAM = "stream"  # where FunASR's cache holds a Stream
CHUNK_SIZE = 16  # encoder frames, where none is given: 640 ms behind conv2d


class Model(Protocol):
    """What streaming needs of a U2ppMoE."""

    features: Features
    encoder: nn.Module
    ctc: CTCHead
    tokenizer: Any

    def ctc_log_probs(self, encoder_out: Tensor, blank_penalty: float) -> Tensor: ...

    def recognise(
        self, encoder_out: Tensor, encoder_lengths: Tensor, conf: DecodeConf, found: Sequence[Hypothesis] | None
    ) -> list[dict[str, Any]]: ...

    def parameters(self) -> Any: ...


@dataclasses.dataclass
class Segment:
    """The utterance of a stream that is under way; without endpoints, the whole stream.

    Attributes:
        start: encoder frames of the stream before it.
        search: the CTC search so far.
        att_cache: keys and values of past frames, (L, H, S, 2D / H).
        cnn_cache: past inputs of the convolutions, (L, D, kernel - 1).
        encoder_out: encoder frames so far, in pieces, for the second pass.
        frames: how many these are.
        silent_frames: those since CTC last heard something.
    """

    start: int
    search: GreedyPath | PrefixBeam
    att_cache: Tensor
    cnn_cache: Tensor
    encoder_out: list[Tensor] = dataclasses.field(default_factory=list)
    frames: int = 0
    silent_frames: int = 0


@dataclasses.dataclass
class Stream:
    """One stream between two pieces.

    Attributes:
        settings: what it was opened with, and is to go on with.
        frontend: audio that has not become features yet.
        feats: features that no chunk has taken yet, (T, F).
        segment: the utterance under way.
        ended: results of segments that ended since the last report.
        closed: whether the last piece was taken.
    """

    settings: tuple[DecodeConf, EndpointConf | None]
    frontend: FeatureStream
    feats: Tensor
    segment: Segment
    ended: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    closed: bool = False


class Streamer:
    """Feeds streams through a model.

    Partial results come from the CTC search; the end of a segment is decoded by ``conf.method`` as a whole
    utterance would be. After an endpoint a stream goes on with a fresh segment, as if it began there; its times
    still count from the start of the stream.

    Args:
        model: a U2ppMoE whose encoder is causal and was trained with chunks.
        conf: chunks and search; without ``decoding_chunk_size``, chunks of 16 frames.
        endpoint: when a segment ends; None makes the whole stream one segment.

    Raises:
        ConfigError: the model cannot stream.
    """

    def __init__(self, model: Model, conf: DecodeConf | None = None, endpoint: EndpointConf | None = None):
        conf = conf or DecodeConf()
        encoder = model.encoder
        if not (encoder.use_dynamic_chunk or encoder.static_chunk_size):
            raise ConfigError("this model was made for whole utterances; train it with encoder_conf.use_dynamic_chunk")
        if not encoder.causal:
            raise ConfigError("this model's convolutions look ahead; streaming needs encoder_conf.causal: true")
        if conf.decoding_chunk_size < 0:
            conf = dataclasses.replace(conf, decoding_chunk_size=encoder.static_chunk_size or CHUNK_SIZE)
        self.model, self.conf, self.endpoint, self.encoder = model, conf, endpoint, encoder
        self.silent = (endpoint or EndpointConf()).blank_threshold
        self.stride = encoder.factor * conf.decoding_chunk_size  # features from one chunk to the next
        self.window = self.stride - encoder.factor + encoder.right_context + 1  # features of one chunk

    def open(self) -> Stream:
        """A stream before its first piece."""
        features = self.model.features
        feats = next(self.model.parameters()).new_zeros(0, features.output_size())
        return Stream((self.conf, self.endpoint), FeatureStream(features), feats, self._segment(0))

    def resume(self, cache: MutableMapping[str, Any]) -> Stream:
        """The stream in FunASR's ``cache``, opened where the cache is empty.

        Raises:
            DataError: it is no dict, or what it holds is no stream.
        """
        is_dict = isinstance(cache, MutableMapping)
        if is_dict and STREAM not in cache:
            cache[STREAM] = self.open()
        found = cache[STREAM] if is_dict else cache
        if not is_dict or not isinstance(found, Stream):
            rule = "pass an empty dict {} with the first piece of a stream and the same one with those that follow"
            raise DataError(f"cache: {rule}; found one of type {type(found).__name__}")
        return found

    def _segment(self, start: int) -> Segment:
        conf, blank = self.conf, self.model.ctc.blank_id
        greedy = conf.method == "ctc_greedy_search"
        search = GreedyPath(1, blank) if greedy else PrefixBeam(conf.beam_size, blank, self._context)
        return Segment(start, search, *self.encoder.caches())

    @functools.cached_property
    def _context(self) -> ContextGraph | None:
        """The hotwords, built once for all streams."""
        return context_graph(self.conf.hotwords, self.model.tokenizer)

    @torch.no_grad()
    def feed(
        self, streams: Sequence[Stream], pieces: Sequence[Piece], final: bool | Sequence[bool] = False
    ) -> list[dict[str, Any]]:
        """Take the next piece of each stream.

        Args:
            streams: each at most once.
            pieces: per stream, samples (N,), float in [-1, 1) or int16, or their bytes; or features (T, F);
                None or an empty one for nothing new.
            final: whether a stream ends with its piece; for all streams, or for each.

        Returns:
            per stream ``text`` of the segment under way, ``tokens``, ``timestamp`` (ms from the stream's start),
            ``confidence``, ``is_final`` and ``quiet_ms``, the silence since something was heard. ``segments`` lists
            the segments that ended in this call, the last one of a closed stream among them: what ``model.decode``
            returns, ``start_ms``, ``end_ms`` and ``endpoint``, the rule that ended it. The last result of a stream
            holds its last segment too.

        Raises:
            DataError: a stream that has ended, a stream twice, or a piece that is no audio.
            ConfigError: a stream that was opened with other settings.
            A call that is refused has changed no stream: it may be made again without the bad piece.
        """
        ends = [final] * len(streams) if isinstance(final, bool) else list(final)
        self._check(streams, pieces, ends)
        for stream, piece, end in zip(streams, pieces, ends):
            new = stream.frontend.push(piece, end).to(stream.feats)
            stream.feats, stream.closed = torch.cat((stream.feats, new)), end
        while ready := [stream for stream in streams if self._next(stream)]:
            self._encode(ready)
            for stream in ready:
                self._end_segment(stream)
        return [self._result(stream) for stream in streams]

    def _check(self, streams: Sequence[Stream], pieces: Sequence[Piece], ends: Sequence[bool]) -> None:
        if not len(streams) == len(pieces) == len(ends):
            raise DataError(
                f"{len(streams)} streams need one piece and one end each, not {len(pieces)} and {len(ends)}"
            )
        if len({id(stream) for stream in streams}) != len(streams):
            raise DataError("a stream may appear only once in a call")
        for stream in streams:
            if stream.closed:
                raise DataError("the stream has ended; start another one (with AutoModel: cache={})")
            if stream.settings != (self.conf, self.endpoint):
                raise ConfigError("decoding settings changed within a stream; pass the same ones with each piece")
        for stream, piece in zip(streams, pieces):
            stream.frontend.check(piece)

    def _next(self, stream: Stream) -> int:
        """Features of the stream's next chunk; 0 while there is none."""
        count = len(stream.feats)
        if count >= self.window:
            return self.window
        rest = int(self.encoder.output_lengths(torch.tensor([count])))
        return count if stream.closed and rest else 0

    def _encode(self, streams: Sequence[Stream]) -> None:
        """One chunk of each stream, in one batch."""
        counts = [self._next(stream) for stream in streams]
        segments = [stream.segment for stream in streams]
        device = streams[0].feats.device
        feats = nn.utils.rnn.pad_sequence([s.feats[:n] for s, n in zip(streams, counts)], batch_first=True)
        cached = [segment.att_cache.shape[2] for segment in segments]
        att_cache = torch.stack(
            [nn.functional.pad(s.att_cache, (0, 0, max(cached) - n, 0)) for s, n in zip(segments, cached)], dim=1
        )
        outputs, lengths, att_cache, cnn_cache = self.encoder.forward_streams(
            feats,
            torch.tensor(counts, device=device),
            torch.tensor([segment.frames for segment in segments], device=device),
            torch.tensor(cached, device=device),
            att_cache,
            torch.stack([segment.cnn_cache for segment in segments], dim=1),
        )
        log_probs = self.model.ctc_log_probs(outputs, self.conf.blank_penalty).cpu()
        size, left = self.conf.decoding_chunk_size, self.conf.num_decoding_left_chunks
        for b, (stream, segment, n) in enumerate(zip(streams, segments, lengths.tolist())):
            stream.feats = stream.feats[self.stride :]
            keep = cached[b] + size if left < 0 else min(cached[b] + size, size * left)
            segment.att_cache = att_cache[:, b, :, att_cache.shape[3] - keep :].clone()
            segment.cnn_cache = cnn_cache[:, b]
            segment.frames += n
            segment.encoder_out.append(outputs[b, :n])
            segment.search.advance(log_probs[b, :n])
            segment.silent_frames = trailing_silence(
                log_probs[b, :n], self.model.ctc.blank_id, self.silent, segment.silent_frames
            )

    def _end_segment(self, stream: Stream) -> None:
        """Where an endpoint is reached, report the segment and begin another."""
        if self.endpoint is None or (stream.closed and not self._next(stream)):
            return
        segment, frame_ms = stream.segment, self.encoder.frame_ms
        found, silence, length = segment.search.hypothesis(), segment.silent_frames, segment.frames
        rule = self.endpoint.rule(bool(found.tokens), silence * frame_ms, length * frame_ms)
        if rule is None:
            return
        if found.tokens:
            stream.ended.append(self._heard(segment, found, rule))
        stream.segment = self._segment(segment.start + segment.frames)

    def _result(self, stream: Stream) -> dict[str, Any]:
        segment, frame_ms = stream.segment, self.encoder.frame_ms
        found = segment.search.hypothesis()
        # What a CTC search heard nothing in is silence between endpoints: no decoder is asked to imagine words there.
        if stream.closed and segment.frames and (found.tokens or self.endpoint is None):
            result = self._heard(segment, found, "end of stream")
            stream.ended.append(result)
        else:
            timestamp = [[round(t * frame_ms), round((t + 1) * frame_ms)] for t in found.times]
            result = {"text": self.model.tokenizer.decode(found.tokens), **vars(found), "timestamp": timestamp}
            result = _later(result, segment.start, frame_ms)
        ended, stream.ended = stream.ended, []
        result = {
            **result,
            "is_final": stream.closed,
            "quiet_ms": round(segment.silent_frames * frame_ms),
            "segments": ended,
        }
        if stream.closed and not segment.start + segment.frames:
            result["warning"] = f"shorter than one encoder frame of {frame_ms:g} ms"
        return result

    def _heard(self, segment: Segment, found: Hypothesis, endpoint: str) -> dict[str, Any]:
        """The result of a segment that has ended: the second pass over all its frames."""
        encoder_out = torch.cat(segment.encoder_out)[None]
        lengths = torch.tensor([segment.frames], device=encoder_out.device)
        (result,) = self.model.recognise(encoder_out, lengths, self.conf, [found])
        frame_ms = self.encoder.frame_ms
        span = {"start_ms": 0, "end_ms": round(segment.frames * frame_ms)}
        return {**_later({**result, **span}, segment.start, frame_ms), "endpoint": endpoint}


def _later(result: dict[str, Any], frames: int, frame_ms: float) -> dict[str, Any]:
    """A segment's result with its times counted from the start of the stream, so many encoder frames before."""
    by_ms, moved = round(frames * frame_ms), dict(result)
    for key in ("start_ms", "end_ms"):
        if key in moved:
            moved[key] += by_ms
    if moved.get("timestamp") is not None:
        moved["timestamp"] = [[start + by_ms, end + by_ms] for start, end in moved["timestamp"]]
    if moved.get("times") is not None:
        moved["times"] = [time + frames for time in moved["times"]]
    if moved.get("nbest_times") is not None:
        moved["nbest_times"] = [[time + frames for time in times] for times in moved["nbest_times"]]
    return moved
