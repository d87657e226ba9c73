"""MooerCTC: an encoder and a CTC head over the tokenizer's vocabulary.

It is how an encoder learns to hear before any LLM listens to it, and a small recogniser with word times.
Like ``model.py`` this file is the border to FunASR: it takes FunASR's whole config as keyword arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.border import build, inputs
from funasr_mooer.border.parts import Parts
from funasr_mooer.config import section, suggest
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.ctc import align, greedy


@dataclasses.dataclass
class ModelConf:
    """``model_conf`` of MooerCTC.

    Attributes:
        max_audio_s: longest audio that is decoded in one piece, seconds.
        silence_dbfs: audio whose loudest 100 ms stay below this level is answered with an empty text.
    """

    max_audio_s: float = 60.0
    silence_dbfs: float = -75.0


class CTCModel(Parts):
    """Encoder -> CTC over the tokenizer's vocabulary; blank is the pad token.

    Args:
        config: FunASR's config, sections and built tokenizer and frontend together; see :mod:`funasr_mooer.border.build`.

    Attributes:
        objective: always ``ctc``.
    """

    part_names = ("encoder", "ctc")
    own_sections = ("ctc_conf",)

    def __init__(self, **config: Any):
        super().__init__()
        self.config = build.sections(config, self)
        self.config.setdefault("ctc_conf", {})
        self.model_conf = section(ModelConf, self.config.get("model_conf"), "model_conf")
        self.tokenizer = build.tokenizer(config)
        self.features = Features(self.config.get("frontend_conf"))
        self.encoder = build.encoder(self.config, self.features.output_size())
        self.ctc = build.ctc_head(self.config, self.encoder.output_size, self.tokenizer)
        self.objective = "ctc"
        self.train_parts(["ctc"] if build.encoder_is_frozen(self.config) else ["encoder", "ctc"])

    # -- training ---------------------------------------------------------------------------------------------

    def forward(
        self, feats: Tensor, feat_lengths: Tensor, transcript_ids: Tensor, transcript_lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """FunASR's training contract: mean loss, statistics, and what the loss was averaged over.

        Args:
            feats: (B, T, F) features.
            feat_lengths: (B,) frames.
            transcript_ids: (B, N) tokens of what was said, padded with anything.
            transcript_lengths: (B,).

        Returns:
            loss per token (0-dim, float32), ``{"loss"}`` detached, number of tokens (0-dim).
        """
        encoder_out, encoder_lengths = self.encoder(feats, feat_lengths)
        loss = self.ctc.loss(encoder_out, encoder_lengths, transcript_ids, transcript_lengths)
        return loss, {"loss": loss.detach()}, transcript_lengths.sum()

    def set_objective(self, name: str) -> None:
        """There is one objective, ``ctc``.

        Raises:
            ConfigError: another name.
        """
        if name != "ctc":
            raise ConfigError(f"objective '{name}' is unknown to MooerCTC{suggest(name, ['ctc'])}")

    # -- decoding ---------------------------------------------------------------------------------------------

    def audio_lengths(self, num_samples: int | np.ndarray) -> np.ndarray:
        """Encoder frames for utterances of so many 16 kHz samples."""
        frames = torch.as_tensor(np.atleast_1d(self.features.num_frames(num_samples)))
        return self.encoder.output_lengths(frames).numpy()

    @torch.no_grad()
    def decode(self, feats: Tensor, feat_lengths: Tensor) -> list[dict[str, Any]]:
        """Greedy decoding of a batch, (B, T, F) and (B,).

        Returns:
            ``text``, ``token_ids`` and ``timestamp`` per row; the last holds [start, end] of each token in
            milliseconds, on the most probable path that spells the tokens.
        """
        encoder_out, lengths = self.encoder(feats, feat_lengths)
        log_probs = self.ctc.log_probs(encoder_out).cpu()
        results = []
        for row, n, path in zip(log_probs, lengths.tolist(), greedy(log_probs, lengths.cpu(), self.ctc.blank_id)):
            spans = align(row[:n], path.tokens, self.ctc.blank_id)
            times = [[round(frame * self.encoder.frame_ms) for frame in span] for span in spans]
            text = self.tokenizer.decode(path.tokens)
            results.append({"text": text, "token_ids": path.tokens, "timestamp": times})
        return results

    @torch.no_grad()
    def inference(
        self,
        data_in: Sequence[Any],
        data_lengths: Tensor | None = None,
        key: Sequence[str] | None = None,
        return_token_ids: bool = False,
        **config: Any,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """FunASR's decoding contract; what ``AutoModel.generate`` calls with one batch.

        Args:
            data_in: audio as paths, arrays (N,), tensors or bytes; features (T, F) with ``data_type="fbank"``.
            data_lengths: frames of each feature matrix, with ``data_type="fbank"``.
            key: utterance ids.
            return_token_ids: add ``token_ids``.
            config: FunASR's config and the call's settings.

        Returns:
            one ``{"key", "text", "timestamp"}`` per input, in order, and timing for FunASR's progress line.

        Raises:
            DataError: audio that cannot be read, or longer than ``model_conf.max_audio_s``.
        """
        unit = f"one encoder frame of {self.encoder.frame_ms:g} ms"
        given = (data_in, data_lengths, key, config)
        return inputs.infer(self, *given, self.decode, self.encoder.output_lengths, unit, return_token_ids)
