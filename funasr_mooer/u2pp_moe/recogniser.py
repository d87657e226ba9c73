"""How U2++ MoE decodes: a batch by one of four searches, or the next piece of a stream; results as FunASR wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funasr_mooer.border.parts import Parts
from funasr_mooer.config import section, suggest
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.ctc import CTCHead, align
from funasr_mooer.u2pp_moe import search
from funasr_mooer.u2pp_moe.context import context_graph
from funasr_mooer.u2pp_moe.endpoint import EndpointConf
from funasr_mooer.u2pp_moe.search import DecodeConf, Hypothesis, decode_conf
from funasr_mooer.u2pp_moe.streaming import Streamer
from funasr_mooer.u2pp_moe.tokenizer import MooerUnitsTokenizer

# Shapes: B utterances, T feature frames, F feature size, T' encoder frames, D encoder size, V vocabulary.
BRIEF = ("text", "timestamp", "confidence", "is_final", "warning", "start_ms", "end_ms", "endpoint")


class Recogniser(Parts):
    """The half of :class:`~funasr_mooer.u2pp_moe.model.U2ppMoEModel` that decodes; the other half builds and trains it.

    Attributes:
        features: audio to features.
        encoder: features to encoder frames.
        ctc: CTC head over these.
        decoder: attention decoders over these.
        tokenizer: tokens to text.
        sos: start symbol of the decoders.
        eos: their end symbol.
        model_conf: its ``reverse_weight`` is that of the right-to-left decoder, where the settings do not say.
    """

    decode_keys = search.DECODE_KEYS
    features: Features
    encoder: nn.Module
    ctc: CTCHead
    decoder: nn.Module
    tokenizer: MooerUnitsTokenizer
    sos: int
    eos: int
    model_conf: Any

    def audio_lengths(self, num_samples: int | np.ndarray) -> np.ndarray:
        """Encoder frames for utterances of so many 16 kHz samples."""
        frames = torch.as_tensor(np.atleast_1d(self.features.num_frames(num_samples)))
        return self.encoder.output_lengths(frames).numpy()

    @torch.no_grad()
    def decode(self, feats: Tensor, feat_lengths: Tensor, **settings: Any) -> list[dict[str, Any]]:
        """Decode a batch, (B, T, F) and (B,); the result of an utterance does not depend on the others.

        Args:
            feats: (B, T, F) features.
            feat_lengths: (B,) frames.
            settings: fields of :class:`~funasr_mooer.u2pp_moe.search.DecodeConf`: ``method``,
                ``decoding_chunk_size``, ``num_decoding_left_chunks``, ``beam_size``, ``ctc_weight``,
                ``reverse_weight``, ``blank_penalty``, ``length_penalty``, ``hotwords``; else ``decode_conf`` of the config.

        Returns:
            per utterance ``text``, ``timestamp`` ([start, end] of each token in ms) and the fields of
            :class:`~funasr_mooer.u2pp_moe.search.Hypothesis`: ``tokens``, ``score``, ``times``, ``nbest``,
            ``nbest_scores``, ``nbest_times``, ``tokens_confidence``, ``confidence``, ``bonuses``.

        Raises:
            ConfigError: an unknown setting or one that cannot work.
        """
        for key in settings:
            if key not in search.DECODE_KEYS:
                raise ConfigError(f"decode({key}=...): unknown setting{suggest(key, search.DECODE_KEYS)}")
        return self.decode_with(decode_conf(self.config.get("decode_conf"), settings), feats, feat_lengths)

    @torch.no_grad()
    def decode_with(self, conf: DecodeConf, feats: Tensor, feat_lengths: Tensor) -> list[dict[str, Any]]:
        """:meth:`decode` with typed settings."""
        chunks = (conf.decoding_chunk_size, conf.num_decoding_left_chunks)
        encoder_out, lengths = self.encoder(feats, feat_lengths, *chunks)
        return self.recognise(encoder_out, lengths, conf)

    @torch.no_grad()
    def recognise(
        self,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        conf: DecodeConf,
        found: Sequence[Hypothesis] | None = None,
    ) -> list[dict[str, Any]]:
        """Results for encoder frames (B, T', D), (B,).

        Args:
            encoder_out: (B, T', D).
            encoder_lengths: (B,).
            conf: the search.
            found: what a CTC search over these frames found, if that was done already.
        """
        blank, audio = self.ctc.blank_id, (encoder_out, encoder_lengths)
        log_probs, lengths = self.ctc_log_probs(encoder_out, conf.blank_penalty).cpu(), encoder_lengths.cpu()
        if conf.method == "attention":
            symbols = (self.sos, self.eos)
            found = search.attention_search(self.decoder, *audio, *symbols, conf.beam_size, conf.length_penalty)
        elif found is None and conf.method == "ctc_greedy_search":
            found = search.ctc_greedy_search(log_probs, lengths, blank)
        elif found is None:
            context = context_graph(conf.hotwords, self.tokenizer)
            found = search.ctc_prefix_beam_search(log_probs, lengths, conf.beam_size, blank, context)
        if conf.method == "attention_rescoring":
            reverse = self.model_conf.reverse_weight if conf.reverse_weight is None else conf.reverse_weight
            symbols = (self.sos, self.eos)
            found = search.attention_rescoring(self.decoder, *audio, found, *symbols, conf.ctc_weight, reverse)
        return [self._result(row[:n], each) for row, n, each in zip(log_probs, lengths.tolist(), found)]

    def ctc_log_probs(self, encoder_out: Tensor, blank_penalty: float = 0.0) -> Tensor:
        """(B, T', D) -> (B, T', V) float32, the blank made less likely by ``blank_penalty``."""
        if not blank_penalty:
            return self.ctc.log_probs(encoder_out)
        logits = self.ctc.ctc_lo(encoder_out).float()
        logits[..., self.ctc.blank_id] -= blank_penalty
        return logits.log_softmax(dim=-1)

    def _result(self, log_probs: Tensor, found: Hypothesis) -> dict[str, Any]:
        """One utterance's fields; times come from the most probable CTC path that spells the tokens."""
        result = {"text": self.tokenizer.decode(found.tokens), **vars(found)}
        try:
            spans = align(log_probs, found.tokens, self.ctc.blank_id)
        except DataError:  # an attention decoder may say more tokens than there are frames: it knows no times
            return {**result, "timestamp": None}
        if found.times is None:
            result["times"] = [start for start, _ in spans]
        frame_ms = self.encoder.frame_ms
        return {**result, "timestamp": [[round(start * frame_ms), round(end * frame_ms)] for start, end in spans]}

    def hear(
        self,
        data_in: Sequence[Any],
        key: Sequence[str] | None,
        cache: dict[str, Any],
        is_final: bool,
        conf: DecodeConf,
        config: Mapping[str, Any],
        return_token_ids: bool,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """One piece of one stream; arguments and answer as of ``U2ppMoEModel.inference``."""
        if len(data_in) != 1:
            raise DataError(f"a cache belongs to one stream, not {len(data_in)}; Streamer.feed takes several at once")
        rate = int(config.get("fs") or self.features.conf.fs)
        if rate != self.features.conf.fs:
            raise DataError(f"fs={rate}: a stream must have {self.features.conf.fs} Hz")
        rules = config.get("endpoint_conf", self.config.get("endpoint_conf"))
        streamer = Streamer(self, conf, None if rules is None else section(EndpointConf, rules, "endpoint_conf"))
        stream = streamer.resume(cache)
        piece = data_in[0].detach().cpu().numpy() if isinstance(data_in[0], Tensor) else data_in[0]
        (result,) = streamer.feed([stream], [piece], is_final)
        segments = [shown(segment, return_token_ids) for segment in result.pop("segments")]
        result = {"key": str(key[0]) if key else "utt0", **shown(result, return_token_ids)}
        if rules is not None:
            result["segments"] = segments
        return [result], {"batch_data_time": max(0 if piece is None else len(piece) / rate, 1e-3)}


def shown(result: dict[str, Any], everything: bool) -> dict[str, Any]:
    """What ``inference`` returns of a result."""
    if everything:
        return {**result, "token_ids": result["tokens"]}
    return {key: result[key] for key in BRIEF if key in result}
