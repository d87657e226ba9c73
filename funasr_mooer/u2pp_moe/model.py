"""U2++ MoE (arXiv 2404.16407): one conformer that streams and does not, with CTC and attention decoders on top.

Like the other ``model.py`` files this is the border to FunASR: it takes FunASR's whole config as keyword arguments.
How the model decodes is told in ``recogniser.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funasr_mooer.border import build, inputs
from funasr_mooer.border.parts import init_part
from funasr_mooer.config import construct, section, suggest
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.ctc import CTCHead
from funasr_mooer.modules.moe_ffn import pack_experts
from funasr_mooer.modules.routing import RoutingStats
from funasr_mooer.u2pp_moe.context import Hotwords, funasr_hotwords
from funasr_mooer.u2pp_moe.endpoint import EndpointConf
from funasr_mooer.u2pp_moe.loss import Losses, accuracy, smoothed_loss, teaching
from funasr_mooer.u2pp_moe.recogniser import Recogniser, shown
from funasr_mooer.u2pp_moe.search import decode_conf

OBJECTIVES = ("hybrid", "ctc")
TOKENIZER_FILES = {"init": "units.txt", "bpe_model": "bpe.model"}
REVERSE_WEIGHT = 0.3  # WeNet's U2++ recipes


@dataclasses.dataclass
class ModelConf:
    """``model_conf`` of U2ppMoE; the first four are WeNet's.

    Attributes:
        ctc_weight: of the CTC loss; the attention loss has the rest.
        lsm_weight: label smoothing of the attention loss.
        reverse_weight: of the right-to-left decoder within the attention loss; by default 0.3 where there is one.
        length_normalized_loss: the attention loss is a mean over tokens instead of a mean over utterances.
        max_audio_s: longest audio that is decoded in one piece, seconds.
        silence_dbfs: audio whose loudest 100 ms stay below this level is answered with an empty text.
        pack_experts: inference on a CPU keeps a second copy of the experts' weights, which is faster; see :class:`MoEFFN`.
    """

    ctc_weight: float = 0.3
    lsm_weight: float = 0.1
    reverse_weight: float | None = None
    length_normalized_loss: bool = False
    max_audio_s: float = 60.0
    silence_dbfs: float = -75.0
    pack_experts: bool = True

    def __post_init__(self) -> None:
        for name in ("ctc_weight", "lsm_weight", "reverse_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"model_conf.{name}={value} must lie between 0 and 1")


class U2ppMoEModel(Recogniser):
    """Conformer encoder with a CTC head and one or two attention decoders.

    Args:
        config: FunASR's config, sections and built tokenizer and frontend together; see :mod:`funasr_mooer.border.build`.

    Attributes:
        objective: ``hybrid``, CTC and attention together; or ``ctc`` alone.
        sos: start symbol of the decoders.
        eos: their end symbol.
    """

    part_names = ("encoder", "ctc", "decoder")
    own_sections = ("ctc_conf", "decoder", "decoder_conf", "decode_conf", "endpoint_conf")

    def __init__(self, **config: Any):
        super().__init__()
        self.config = build.sections(config, self)
        for name in ("encoder_conf", "ctc_conf", "decoder_conf"):
            self.config.setdefault(name, {})
        self.model_conf = section(ModelConf, self.config.get("model_conf"), "model_conf")
        # What cannot work in decoding is told now, not after training.
        decode_conf(self.config.get("decode_conf"))
        section(EndpointConf, self.config.get("endpoint_conf"), "endpoint_conf")
        self.tokenizer = build.tokenizer(config, "MooerUnitsTokenizer")
        self.sos, self.eos = self.tokenizer.sos_id, self.tokenizer.eos_id
        self.features = Features(self.config.get("frontend_conf"))
        self.encoder = build.encoder(self.config, self.features.output_size())
        size, vocab = self.encoder.output_size, len(self.tokenizer)
        self.ctc = self._part("ctc", CTCHead, encoder_dim=size, vocab_size=vocab, blank_id=self.tokenizer.pad_id)
        decoder = build.registered("decoder_classes", self.config, "decoder")
        self.decoder = self._part("decoder", decoder, vocab_size=vocab, encoder_output_size=size)
        if self.model_conf.reverse_weight is None:
            self.model_conf.reverse_weight = 0.0 if self.decoder.right_to_left is None else REVERSE_WEIGHT
        if self.model_conf.reverse_weight > 0 and self.decoder.right_to_left is None:
            raise ConfigError("model_conf.reverse_weight is above 0, which needs decoder: MoEBiTransformerDecoder")
        self.objective = "hybrid"
        self.routing = RoutingStats(self)
        pack_experts(self, self.model_conf.pack_experts)
        # All parts learn together, also from trained weights, unless encoder_conf.freeze says otherwise.
        frozen = build.encoder_is_frozen({"encoder_conf": {"freeze": False, **self.config["encoder_conf"]}})
        self.train_parts([name for name in self.parts if not (name == "encoder" and frozen)])

    def _part(self, name: str, cls: type, **given: Any) -> torch.nn.Module:
        conf, init = build.split_init(self.config[f"{name}_conf"])
        module = construct(cls, conf, f"{name}_conf", **given)
        found = init_part(module, *init, f"{name}_conf", name)
        if found:
            self.config[f"{name}_conf"]["fingerprint"] = found
        return module

    # -- model directory --------------------------------------------------------------------------------------

    def save_parts(self, directory: str | Path, names: Sequence[str]) -> None:
        """Also the units (and sentence pieces): a model directory is whole."""
        super().save_parts(directory, names)
        for name, path in self._tokenizer_files().items():
            target = Path(directory) / TOKENIZER_FILES[name]
            if path.resolve() != target.resolve():
                shutil.copyfile(path, target)

    def config_for(self, names: Sequence[str]) -> dict[str, Any]:
        config = super().config_for(names)
        for name in self._tokenizer_files():
            config["tokenizer_conf"][name] = TOKENIZER_FILES[name]
        return config

    def _tokenizer_files(self) -> dict[str, Path]:
        files = {"init": self.tokenizer.file, "bpe_model": self.tokenizer.bpe_model}
        return {name: path for name, path in files.items() if path is not None}

    # -- training ---------------------------------------------------------------------------------------------

    def forward(
        self,
        feats: Tensor,
        feat_lengths: Tensor,
        transcript_ids: Tensor,
        transcript_lengths: Tensor,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """FunASR's training contract: mean loss, statistics, and what the loss was averaged over.

        The loss is WeNet's (:meth:`losses`) per token instead of per utterance, so that batches on several
        processes, or one after the other, add up to the same gradient as one large batch.

        Args:
            feats: (B, T, F) features.
            feat_lengths: (B,) frames.
            transcript_ids: (B, N) tokens of what was said, padded with anything.
            transcript_lengths: (B,).
            languages: (B,) for the statistics of experts; see :meth:`name_languages`.

        Returns:
            loss per token (0-dim, float32); ``loss``, ``loss_ctc``, ``loss_att`` and ``acc`` detached; number of
            tokens (0-dim).
        """
        with self.routing.counting(languages) if self.training else contextlib.nullcontext():
            found = self.losses(feats, feat_lengths, transcript_ids, transcript_lengths)
        count = transcript_lengths.sum()
        scale = len(feats) / count.clamp(min=1)
        stats = {"loss": found.total * scale, "loss_ctc": found.ctc * scale}
        if found.attention is not None:
            stats |= {"loss_att": found.attention * scale, "acc": found.accuracy}
        return stats["loss"], {name: value.detach() for name, value in stats.items()}, count

    def losses(self, feats: Tensor, feat_lengths: Tensor, transcript_ids: Tensor, transcript_lengths: Tensor) -> Losses:
        """WeNet's losses; arguments as for :meth:`forward`."""
        conf = self.model_conf
        encoder_out, encoder_lengths = self.encoder(feats, feat_lengths)
        ctc = self.ctc.loss(encoder_out, encoder_lengths, transcript_ids, transcript_lengths)
        ctc = ctc * transcript_lengths.sum() / len(feats)
        if self.objective == "ctc":
            return Losses(ctc, ctc)
        audio, transcript = (encoder_out, encoder_lengths), (transcript_ids, transcript_lengths)
        left, correct = self._attention_loss(self.decoder.left_to_right, audio, transcript, backwards=False)
        right, attention = None, left
        if conf.reverse_weight > 0:
            right, _ = self._attention_loss(self.decoder.right_to_left, audio, transcript, backwards=True)
            attention = (1 - conf.reverse_weight) * left + conf.reverse_weight * right
        total = conf.ctc_weight * ctc + (1 - conf.ctc_weight) * attention
        return Losses(total, ctc, attention, left, right, correct)

    def _attention_loss(
        self,
        decoder: torch.nn.Module,
        audio: tuple[Tensor, Tensor],
        transcript: tuple[Tensor, Tensor],
        backwards: bool,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of one decoder."""
        taught = teaching(*transcript, self.sos, self.eos, backwards)
        logits = decoder(*audio, taught.inputs, taught.lengths)
        loss = smoothed_loss(logits, taught.targets, self.model_conf.lsm_weight)
        over = taught.lengths.sum() if self.model_conf.length_normalized_loss else len(taught.lengths)
        return loss / over, accuracy(logits, taught.targets)

    def name_languages(self, names: Sequence[str]) -> None:
        """What the numbers in ``languages`` stand for; '' is an utterance whose language is not known."""
        self.routing.languages = names

    def take_figures(self, total: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """What training steps since the last call say of the experts; see :meth:`RoutingStats.report`."""
        return self.routing.report(total)

    def set_objective(self, name: str) -> None:
        """Choose what :meth:`forward` computes.

        Raises:
            ConfigError: not one of ``hybrid``, ``ctc``.
        """
        if name not in OBJECTIVES:
            raise ConfigError(f"objective '{name}' is unknown to U2ppMoE{suggest(name, OBJECTIVES)}")
        self.objective = name

    # -- decoding ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def inference(
        self,
        data_in: Sequence[Any],
        data_lengths: Tensor | None = None,
        key: Sequence[str] | None = None,
        return_token_ids: bool = False,
        cache: dict[str, Any] | None = None,
        is_final: bool = False,
        hotword: Hotwords | None = None,
        **config: Any,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """FunASR's decoding contract; what ``AutoModel.generate`` calls with one batch.

        With ``cache`` the audio is the next piece of a stream: pass ``{}`` first, the same dict after that, and
        ``is_final=True`` with the last piece. The text is that of the whole stream so far; with ``endpoint_conf``
        (of the config or the call) that of the segment under way, and ``segments`` lists those that ended.

        Args:
            data_in: audio as paths, arrays (N,), tensors or bytes; features (T, F) with ``data_type="fbank"``.
            data_lengths: frames of each feature matrix, with ``data_type="fbank"``.
            key: utterance ids.
            return_token_ids: add ``token_ids``, ``score``, and everything else that :meth:`decode` returns.
            cache: the state of a stream; see :mod:`funasr_mooer.u2pp_moe.streaming`.
            is_final: whether this piece ends the stream.
            hotword: FunASR's spelling of the setting ``hotwords``: a string holds words between blanks.
            config: FunASR's config and the call's settings; those of :class:`DecodeConf` are used.

        Returns:
            one ``{"key", "text", "timestamp", "confidence"}`` per input, in order (of a stream also ``is_final``),
            and timing for FunASR's progress line.

        Raises:
            ConfigError: decoding settings that cannot work.
            DataError: audio that cannot be read, or is too long; or a stream that has ended.
        """
        if hotword and config.get("hotwords"):
            raise ConfigError("hotword and hotwords are two spellings of one setting; give hotwords alone")
        if hotword:
            config["hotwords"] = funasr_hotwords(hotword)
        conf = decode_conf(self.config.get("decode_conf"), config)
        if cache is not None:
            return self.hear(data_in, key, cache, is_final, conf, config, return_token_ids)

        def decode(feats: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
            return [shown(result, return_token_ids) for result in self.decode_with(conf, feats, lengths)]

        unit = f"one encoder frame of {self.encoder.frame_ms:g} ms"
        given = (data_in, data_lengths, key, config)
        return inputs.infer(self, *given, decode, self.encoder.output_lengths, unit, return_token_ids)
