"""Streaming: audio in pieces of any size, text as it comes, many streams in one batch.

All that is known of a stream lies in its :class:`Stream`; the model keeps nothing. What is heard equals the full
pass under the same chunk mask, whatever the pieces and whichever streams share a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.ctc import CTCHead
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
class Stream:
    """One stream between two pieces.

    Attributes:
        frontend: audio that has not become features yet.
        search: the CTC search so far.
        feats: features that no chunk has taken yet, (T, F).
        offset: encoder frames so far.
        att_cache: keys and values of past frames, (L, H, S, 2D / H).
        cnn_cache: past inputs of the convolutions, (L, D, kernel - 1).
        encoder_out: encoder frames so far, in pieces, for the second pass.
        quiet_frames: encoder frames since the last token.
        closed: whether the last piece was taken.
    """

    frontend: FeatureStream
    search: GreedyPath | PrefixBeam
    feats: Tensor
    att_cache: Tensor
    cnn_cache: Tensor
    offset: int = 0
    encoder_out: list[Tensor] = dataclasses.field(default_factory=list)
    quiet_frames: int = 0
    closed: bool = False


class Streamer:
    """Feeds streams through a model.

    Partial results come from the CTC search; the end of a stream is decoded by ``conf.method`` as a whole
    utterance would be.

    Args:
        model: a U2ppMoE whose encoder is causal and was trained with chunks.
        conf: chunks and search; without ``decoding_chunk_size``, chunks of 16 frames.

    Raises:
        ConfigError: the model cannot stream.
    """

    def __init__(self, model: Model, conf: DecodeConf | None = None):
        conf = conf or DecodeConf()
        encoder = model.encoder
        if not (encoder.use_dynamic_chunk or encoder.static_chunk_size):
            raise ConfigError("this model was made for whole utterances; train it with encoder_conf.use_dynamic_chunk")
        if encoder.encoders[0].conv_module.side:
            raise ConfigError("this model's convolutions look ahead; streaming needs encoder_conf.causal: true")
        if conf.decoding_chunk_size < 0:
            conf = dataclasses.replace(conf, decoding_chunk_size=encoder.static_chunk_size or CHUNK_SIZE)
        self.model, self.conf, self.encoder = model, conf, encoder
        embed = encoder.embed
        self.stride = embed.factor * conf.decoding_chunk_size  # features from one chunk to the next
        self.window = self.stride - embed.factor + embed.right_context + 1  # features of one chunk

    def open(self) -> Stream:
        """A stream before its first piece."""
        conf, encoder, first = self.conf, self.encoder, self.encoder.encoders[0]
        at = next(self.model.parameters())
        layers, attention = len(encoder.encoders), first.self_attn
        kind = GreedyPath if conf.method == "ctc_greedy_search" else PrefixBeam
        return Stream(
            FeatureStream(self.model.features),
            kind(conf.beam_size, self.model.ctc.blank_id),
            at.new_zeros(0, self.model.features.output_size()),
            at.new_zeros(layers, attention.heads, 0, 2 * attention.head_size),
            at.new_zeros(layers, encoder.output_size, first.conv_module.context),
        )

    @torch.no_grad()
    def feed(
        self,
        streams: Sequence[Stream],
        pieces: Sequence[np.ndarray | Tensor | bytes | None],
        final: bool | Sequence[bool] = False,
    ) -> list[dict[str, Any]]:
        """Take the next piece of each stream.

        Args:
            streams: each at most once.
            pieces: per stream, samples (N,), float in [-1, 1) or int16, or their bytes; or features (T, F);
                None or an empty one for nothing new.
            final: whether a stream ends with its piece; for all streams, or for each.

        Returns:
            per stream ``text`` of all that was heard so far, ``tokens``, ``timestamp``, ``confidence``,
            ``is_final`` and ``quiet_ms``, the time since the last token. The last result of a stream holds what
            ``model.decode`` returns.

        Raises:
            DataError: a stream that has ended, a stream twice, or a piece that is no audio.
        """
        ends = [final] * len(streams) if isinstance(final, bool) else list(final)
        if len({id(stream) for stream in streams}) != len(streams):
            raise DataError("a stream may appear only once in a call")
        for stream in streams:
            if stream.closed:
                raise DataError("the stream has ended; start another one (with AutoModel: cache={})")
        for stream, piece, end in zip(streams, pieces, ends, strict=True):
            new = stream.frontend.push(piece, end).to(stream.feats)
            stream.feats, stream.closed = torch.cat((stream.feats, new)), end
        while ready := [stream for stream in streams if self._next(stream)]:
            self._encode(ready)
        return [self._result(stream) for stream in streams]

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
        device = streams[0].feats.device
        feats = nn.utils.rnn.pad_sequence([s.feats[:n] for s, n in zip(streams, counts)], batch_first=True)
        cached = [stream.att_cache.shape[2] for stream in streams]
        att_cache = torch.stack(
            [nn.functional.pad(s.att_cache, (0, 0, max(cached) - n, 0)) for s, n in zip(streams, cached)], dim=1
        )
        outputs, lengths, att_cache, cnn_cache = self.encoder.forward_streams(
            feats,
            torch.tensor(counts, device=device),
            torch.tensor([stream.offset for stream in streams], device=device),
            torch.tensor(cached, device=device),
            att_cache,
            torch.stack([stream.cnn_cache for stream in streams], dim=1),
        )
        log_probs = self.model.ctc_log_probs(outputs, self.conf.blank_penalty).cpu()
        size, left = self.conf.decoding_chunk_size, self.conf.num_decoding_left_chunks
        for b, (stream, n) in enumerate(zip(streams, lengths.tolist())):
            keep = cached[b] + size if left < 0 else min(cached[b] + size, size * left)
            stream.att_cache = att_cache[:, b, :, att_cache.shape[3] - keep :].clone()
            stream.cnn_cache = cnn_cache[:, b]
            stream.feats = stream.feats[self.stride :]
            stream.offset += n
            stream.encoder_out.append(outputs[b, :n])
            stream.search.advance(log_probs[b, :n])

    def _result(self, stream: Stream) -> dict[str, Any]:
        found, frame_ms = stream.search.hypothesis(), self.encoder.frame_ms
        quiet = stream.offset - (found.times[-1] + 1 if found.times else 0)
        about = {"is_final": stream.closed, "quiet_ms": round(quiet * frame_ms)}
        if stream.closed and stream.offset:
            encoder_out = torch.cat(stream.encoder_out)[None]
            lengths = torch.tensor([stream.offset], device=encoder_out.device)
            return {**self.model.recognise(encoder_out, lengths, self.conf, [found])[0], **about}
        timestamp = [[round(t * frame_ms), round((t + 1) * frame_ms)] for t in found.times]
        result = {"text": self.model.tokenizer.decode(found.tokens), **vars(found), "timestamp": timestamp, **about}
        if stream.closed:
            result["warning"] = f"shorter than one encoder frame of {frame_ms:g} ms"
        return result


class FeatureStream:
    """Features of a signal that comes in pieces: the same frames as of the whole signal, as soon as they are known.

    Args:
        features: the model's frontend.
    """

    def __init__(self, features: Features):
        self.features = features
        self.samples = np.zeros(0, np.float32)  # from the start of the first frame that is not computed yet
        self.fbank = torch.zeros(0, features.conf.n_mels)  # from the first frame of the next stack, edge included
        self.frames = 0  # fbank frames so far
        self.stacks = 0  # output frames so far

    def push(self, piece: np.ndarray | Tensor | bytes | None, final: bool = False) -> Tensor:
        """Samples (N,), their bytes, or features (T, F) -> new features (U, F).

        Raises:
            DataError: something else, or samples that are no numbers.
        """
        piece = _array(piece)
        if piece.ndim == 2:
            if piece.shape[1] != self.features.output_size():
                raise DataError(
                    f"a piece of features has size {piece.shape[1]}, the model takes {self.features.output_size()}"
                )
            return torch.from_numpy(piece)
        conf, left = self.features.conf, self.features.left
        self.samples = np.concatenate((self.samples, piece))
        new = self.features.fbank(self.samples)
        if len(new):
            self.samples = self.samples[len(new) * self.features.hop :]
            edge = new[:1].expand(left if self.frames == 0 else 0, -1)
            self.fbank, self.frames = torch.cat((self.fbank, edge, new)), self.frames + len(new)
        stacks = max((len(self.fbank) - conf.lfr_m) // conf.lfr_n + 1, 0)
        if final and self.frames:
            stacks = -(-self.frames // conf.lfr_n) - self.stacks
            missing = (stacks - 1) * conf.lfr_n + conf.lfr_m - len(self.fbank)
            self.fbank = torch.cat((self.fbank, self.fbank[-1:].expand(max(missing, 0), -1)))
        if stacks <= 0:
            return torch.zeros(0, self.features.output_size())
        feats = self.fbank.unfold(0, conf.lfr_m, conf.lfr_n)[:stacks].transpose(1, 2).flatten(1)  # (U, F)
        self.fbank, self.stacks = self.fbank[stacks * conf.lfr_n :], self.stacks + stacks
        return self.features.normalise(feats)


def _array(piece: np.ndarray | Tensor | bytes | None) -> np.ndarray:
    """(N,) or (T, F) float32 in [-1, 1)."""
    if piece is None:
        return np.zeros(0, np.float32)
    if isinstance(piece, (bytes, bytearray, memoryview)):
        piece = np.frombuffer(piece, "<i2")
    piece = np.asarray(piece.detach().cpu() if isinstance(piece, Tensor) else piece)
    if piece.ndim not in (1, 2) or not np.issubdtype(piece.dtype, np.number):
        raise DataError(f"expected samples (N,) or features (T, F), found an array {piece.dtype} {piece.shape}")
    if piece.dtype == np.int16:
        return piece.astype(np.float32) / 32768
    if not np.issubdtype(piece.dtype, np.floating):
        raise DataError(f"expected int16 or float samples, found {piece.dtype}")
    if not np.isfinite(piece).all():
        raise DataError("a piece of audio holds NaN or infinite samples")
    return piece.astype(np.float32)
