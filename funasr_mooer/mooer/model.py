"""MooER (arXiv 2408.05101): a speech encoder, an adapter and an LLM that answers about what it hears.

This file is the border to FunASR: it takes FunASR's whole config as keyword arguments, and everything behind it
takes typed sections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funasr_mooer.border import build, inputs
from funasr_mooer.border.parts import Parts, init_part
from funasr_mooer.config import construct, section, suggest
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.ctc import CTCHead, greedy
from funasr_mooer.modules.splice import splice_audio
from funasr_mooer.mooer import rescore
from funasr_mooer.mooer.generate import DECODE_KEYS, Answer, DecodeConf, TextCallback, decode_conf, search
from funasr_mooer.mooer.prompt import Prompt

OBJECTIVES = ("llm", "adapter_ctc")


@dataclasses.dataclass
class ModelConf:
    """``model_conf``.

    Attributes:
        max_audio_s: longest audio that is decoded in one piece, seconds.
        silence_dbfs: audio whose loudest 100 ms stay below this level is answered with an empty text.
        warmup_scale: sharpness of the distribution in the ``adapter_ctc`` objective.
    """

    max_audio_s: float = 30.0
    silence_dbfs: float = -75.0
    warmup_scale: float = 10.0


class MooerModel(Parts):
    """Encoder -> adapter -> ``[audio][prompt][answer]`` -> LLM.

    Args:
        config: FunASR's config, sections and built tokenizer and frontend together; see :mod:`funasr_mooer.border.build`.

    Attributes:
        objective: what :meth:`forward` computes: ``llm``, the LLM's loss on the answers; or ``adapter_ctc``,
            CTC between the adapter's output and the LLM's embedding table, which teaches the adapter where
            words are before the LLM is ever run.
    """

    part_names = ("encoder", "ctc", "adapter", "lora", "llm")
    own_sections = ("adapter", "adapter_conf", "llm", "llm_conf", "ctc_conf", "prompt_conf", "decode_conf")
    decode_keys = DECODE_KEYS

    def __init__(self, **config: Any):
        super().__init__()
        self.config = build.sections(config, self)
        self.model_conf = section(ModelConf, self.config.get("model_conf"), "model_conf")
        decode_conf(self.config.get("decode_conf"))  # what cannot work is told now, not after training
        self.tokenizer = build.tokenizer(config)
        self.prompt = Prompt(self.tokenizer, self.config.get("prompt_conf"))
        self.features = Features(self.config.get("frontend_conf"))
        self.objective = "llm"

        self.encoder = build.encoder(self.config, self.features.output_size())
        self.llm = build.llm(self.config)
        adapter_conf, init = build.split_init(self.config.get("adapter_conf"))
        self.adapter = construct(
            build.registered("adaptor_classes", self.config, "adapter"),
            adapter_conf,
            "adapter_conf",
            encoder_dim=self.encoder.output_size,
            llm_dim=self.llm.hidden_size,
            frame_ms=self.encoder.frame_ms,
        )
        init_part(self.adapter, *init, "adapter_conf", "adapter")
        self.ctc: CTCHead | None = None
        if self.config.get("ctc_conf") is not None:
            self.ctc = build.ctc_head(self.config, self.encoder.output_size, self.tokenizer)

        frozen = build.encoder_is_frozen(self.config)
        trained = ["adapter", *(["lora"] if self.llm.lora else []), *([] if frozen else ["encoder"])]
        self.train_parts(trained)

    # -- training ---------------------------------------------------------------------------------------------

    def forward(
        self,
        feats: Tensor,
        feat_lengths: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        transcript_ids: Tensor | None = None,
        transcript_lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """FunASR's training contract: mean loss, statistics, and what the loss was averaged over.

        Args:
            feats: (B, T, F) features.
            feat_lengths: (B,) frames.
            input_ids: (B, L) ``[AUDIO_ID][prompt][answer]``, padded on the right; or all of them in one row, (1, L).
            attention_mask: (B, L), false at padding.
            labels: (B, L), ``IGNORE_INDEX`` outside the answer.
            segments: (1, L) number of the utterance, from 1, where they stand in one row.
            transcript_ids: (B, N) what was said, for the ``adapter_ctc`` objective.
            transcript_lengths: (B,).

        Returns:
            loss (0-dim, float32), ``{"loss", "acc"}`` detached, number of labelled tokens (0-dim).
        """
        audio_embeds, audio_lengths = self.hear(feats, feat_lengths)
        if self.objective == "adapter_ctc":
            if transcript_ids is None or transcript_lengths is None:
                raise DataError("objective adapter_ctc needs transcripts; the pack has no field 'text'")
            return self._adapter_ctc(audio_embeds, audio_lengths, transcript_ids, transcript_lengths)
        embeds = self.llm.embed(input_ids)
        spliced = splice_audio(
            input_ids, attention_mask, embeds, audio_embeds, audio_lengths, labels, segments=segments
        )
        loss, accuracy, count = self.llm(spliced.inputs_embeds, spliced.labels, spliced.segments)
        return loss, {"loss": loss.detach(), "acc": accuracy}, count

    def hear(self, feats: Tensor, feat_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> audio embeddings (B, U, D_llm) and their lengths (B,)."""
        return self.adapter(*self.encode(feats, feat_lengths))

    def encode(self, feats: Tensor, feat_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> encoder frames (B, T', D) and their lengths (B,); no graph where the encoder is frozen."""
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.encoder(feats, feat_lengths)

    def set_objective(self, name: str) -> None:
        """Choose what :meth:`forward` computes.

        Raises:
            ConfigError: not one of ``llm``, ``adapter_ctc``.
        """
        if name not in OBJECTIVES:
            raise ConfigError(f"objective '{name}' is unknown to MooER{suggest(name, OBJECTIVES)}")
        self.objective = name

    def compile_layers(self) -> None:
        """Compile the layers of the LLM; see :meth:`LoRAQwenDecoder.compile_layers`."""
        self.llm.compile_layers()

    def _adapter_ctc(
        self, audio_embeds: Tensor, audio_lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """CTC of the adapter's output against the frozen embedding table; blank is the pad token.

        A position scores a token by the product with its embedding, in units of the mean squared norm, so the
        adapter learns to say each word in the LLM's own vectors. The LLM itself is not run.
        """
        table = self.llm.embedding.weight.detach().float()  # (V, D_llm)
        scale = self.model_conf.warmup_scale / table.pow(2).sum(1).mean()
        log_probs = (audio_embeds.float() @ table.T * scale).log_softmax(-1)  # (B, U, V)
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            targets.clamp(min=0),
            audio_lengths,
            target_lengths,
            blank=self.tokenizer.pad_id,
            reduction="sum",
            zero_infinity=True,
        )
        count = target_lengths.sum()
        loss = loss / count.clamp(min=1)
        return loss, {"loss": loss.detach()}, count

    # -- decoding ---------------------------------------------------------------------------------------------

    def audio_lengths(self, num_samples: int | np.ndarray) -> np.ndarray:
        """Audio embeddings for utterances of so many 16 kHz samples."""
        frames = torch.as_tensor(np.atleast_1d(self.features.num_frames(num_samples)))
        return self.adapter.output_lengths(self.encoder.output_lengths(frames)).numpy()

    @torch.no_grad()
    def answer(
        self,
        feats: Tensor,
        feat_lengths: Tensor,
        task: str,
        conf: DecodeConf,
        on_text: TextCallback | None = None,
    ) -> list[Answer]:
        """Decode a batch: (B, T, F), (B,) -> one answer per row, in order.

        Raises:
            ConfigError: ``ctc_weight`` is given to a model without a CTC head.
        """
        encoder_out, encoder_lengths = self.encode(feats, feat_lengths)
        heard = self.adapter(encoder_out, encoder_lengths)  # (B, U, D_llm), (B,)
        ids = torch.tensor([self.prompt.ids(task)], device=feats.device).expand(len(feats), -1)
        spliced = splice_audio(ids, torch.ones_like(ids), self.llm.embed(ids), *heard, padding_side="left")
        joint = conf.ctc_weight > 0 and self.prompt.tasks[task].answer == ["text"]
        if joint and self.ctc is None:
            raise ConfigError("decode_conf.ctc_weight: the model has no CTC head (ctc_conf); set it to 0")
        nbest = conf.num_beams if joint else 1
        answers = search(self.llm, self.tokenizer, spliced.inputs_embeds, spliced.attention_mask, conf, on_text, nbest)
        if not joint:
            return answers
        beams = [answers[start : start + nbest] for start in range(0, len(answers), nbest)]
        return self._rescored(task, beams, encoder_out, encoder_lengths, heard, conf.ctc_weight)

    def _rescored(
        self,
        task: str,
        beams: list[list[Answer]],
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        heard: tuple[Tensor, Tensor],
        ctc_weight: float,
    ) -> list[Answer]:
        """The best of each row's beams and CTC transcript by both models: see :mod:`funasr_mooer.mooer.rescore`."""
        eos, blank = self.tokenizer.eos_id, self.ctc.blank_id
        log_probs = self.ctc.log_probs(encoder_out)
        drafts = [path.tokens for path in greedy(log_probs, encoder_lengths, blank)]
        rows = rescore.candidates(beams, drafts, eos)
        row_of = torch.tensor([b for b, row in enumerate(rows) for _ in row], device=encoder_out.device)
        answers = [answer.token_ids for row in rows for answer in row]
        audio_embeds, audio_lengths = (tensor[row_of] for tensor in heard)
        llm_scores = rescore.llm_log_likelihoods(self.llm, audio_embeds, audio_lengths, self.prompt.ids(task), answers)
        spelt = [[token for token in answer if token != eos] for answer in answers]
        ctc_scores = rescore.ctc_log_likelihoods(log_probs[row_of], encoder_lengths[row_of], spelt, blank)
        return rescore.best(rows, llm_scores, ctc_scores, ctc_weight)

    def decode(
        self, feats: Tensor, feat_lengths: Tensor, task: str, conf: DecodeConf | None = None
    ) -> list[dict[str, Any]]:
        """Decode a batch into result fields (``text``, further answer lines, ``token_ids``, ``score``)."""
        answers = self.answer(feats, feat_lengths, task, conf or decode_conf(self.config.get("decode_conf")))
        return [self._result(task, answer) for answer in answers]

    @torch.no_grad()
    def inference(
        self,
        data_in: Sequence[Any],
        data_lengths: Tensor | None = None,
        key: Sequence[str] | None = None,
        task: str | None = None,
        on_text: TextCallback | None = None,
        return_token_ids: bool = False,
        **config: Any,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """FunASR's decoding contract; what ``AutoModel.generate`` calls with one batch.

        Args:
            data_in: audio as paths, arrays (N,), tensors or bytes; features (T, F) with ``data_type="fbank"``.
            data_lengths: frames of each feature matrix, with ``data_type="fbank"``.
            key: utterance ids.
            task: what is asked; may be left out for a model of one task.
            on_text: receives the texts so far after each token; needs ``num_beams=1``.
            return_token_ids: add ``token_ids``, the end of sequence included.
            config: FunASR's config and the call's settings; those of :class:`DecodeConf` are used.

        Returns:
            one ``{"key", "text", ...}`` per input, in order, and timing for FunASR's progress line.

        Raises:
            ConfigError: no such task, or decoding settings that cannot work.
            DataError: audio that cannot be read, or longer than ``model_conf.max_audio_s``.
        """
        task = self.check_task(task)
        conf = decode_conf(self.config.get("decode_conf"), config)
        self.llm.merge()

        def decode(feats: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
            return [self._result(task, row) for row in self.answer(feats, lengths, task, conf, on_text)]

        unit = f"one embedding of {self.adapter.granularity_ms:g} ms"
        given = (data_in, data_lengths, key, config)
        return inputs.infer(self, *given, decode, self.audio_lengths_of, unit, return_token_ids)

    def audio_lengths_of(self, feat_lengths: Tensor) -> Tensor:
        """Audio embeddings for features of so many frames."""
        return self.adapter.output_lengths(self.encoder.output_lengths(feat_lengths))

    def check_task(self, task: str | None) -> str:
        """``task``, or the model's only one.

        Raises:
            ConfigError: not one of the model's tasks, or none given where there are several.
        """
        if task is None and len(self.prompt.tasks) == 1:
            return next(iter(self.prompt.tasks))
        if task is None:
            raise ConfigError(f"say what to do with the audio: task=one of {', '.join(self.prompt.tasks)}")
        self.prompt.ids(task)
        return task

    def _result(self, task: str, answer: Answer) -> dict[str, Any]:
        result: dict[str, Any] = self.prompt.parse(task, self.tokenizer.decode(answer.token_ids))
        result["token_ids"] = answer.token_ids
        if answer.score is not None:
            result["score"] = answer.score
        return result
