"""The LLM: any causal language model of transformers, with LoRA by peft."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from funasr_mooer import weights
from funasr_mooer.config import section
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.modules.loss import cross_entropy
from funasr_mooer.modules.packing import lay_out
from funasr_mooer.modules.splice import IGNORE_INDEX
from funasr_mooer.mooer import attention as attentions

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QWEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


@dataclasses.dataclass
class LoRAConf:
    """``llm_conf.lora``: low-rank updates of the LLM's projections (arXiv 2106.09685).

    Attributes:
        r: rank; MooER uses 64.
        alpha: scale; the update is multiplied by ``alpha / r``.
        dropout: on the input of the low-rank path, in training.
        targets: the projections that get an update.
        init: folder in peft's format to start from (any version); None starts from zero updates.
    """

    r: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] = dataclasses.field(default_factory=lambda: list(QWEN_PROJECTIONS))
    init: str | None = None


class LoRAQwenDecoder(nn.Module):
    """A causal LLM of transformers (Qwen2, Qwen2.5, Qwen3, ...) that reads embeddings, with LoRA or without.

    Made under ``torch.device("meta")`` it has sizes only: of the folder nothing but ``config.json`` is read.

    Args:
        init: folder of the base model, weights included.
        lora: the ``lora`` section; None for the base model alone.
        dtype: type of the base weights: ``float32``, ``bfloat16``, ``float16``. LoRA weights are float32.
        gradient_checkpointing: recompute the layers in the backward pass.
        attention: attention kernel of transformers (``sdpa``, ``eager``, ``flash_attention_2``).
        logits_mib: most memory for logits in training, MiB; batches with more labels compute their loss in chunks.
        fingerprint: hash of the base weights that the model was trained on; others are refused.

    Raises:
        CheckpointError: the folder or some of its weights are missing, or they are not those of ``fingerprint``.
    """

    def __init__(
        self,
        init: str,
        lora: Mapping | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        attention: str = "sdpa",
        logits_mib: int = 512,
        fingerprint: str | None = None,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"llm_conf.dtype: '{dtype}' is not one of {', '.join(DTYPES)}")
        self.init, self.attention, self.max_logits = Path(init), attention, logits_mib * 2**20 // 4
        self.lora = None if lora is None else section(LoRAConf, lora, "llm_conf.lora")
        self.model = _load_base(self.init, DTYPES[dtype], attentions.kernel(attention))
        self.fingerprint = None
        if not self.embedding.weight.is_meta:
            self.fingerprint = weights.fingerprint(self.init)
            weights.check_fingerprint(self.init, fingerprint, "llm_conf.fingerprint")
        if self.lora is not None:
            self._add_lora()
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self._merged = False

    @property
    def embedding(self) -> nn.Embedding:
        """The table of input embeddings, (V, D_llm)."""
        return self.model.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        """Size of one embedding, D_llm."""
        return self.embedding.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Logits of a position, V."""
        return self.model.get_output_embeddings().out_features

    @property
    def layers(self) -> nn.ModuleList:
        """The layers between embeddings and output head."""
        return self._backbone.layers

    @property
    def rotary_embedding(self) -> nn.Module:
        """What turns positions into rotations."""
        return self._backbone.rotary_emb

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D_llm); ids below 0 (audio placeholders) get the embedding of id 0."""
        return self.embedding(input_ids.clamp(min=0))

    def forward(
        self, inputs_embeds: Tensor, labels: Tensor, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token loss and accuracy at the labelled positions; no logits are computed elsewhere.

        Args:
            inputs_embeds: (B, S, D_llm), padded on the right, which no labelled position can see.
            labels: (B, S), ``IGNORE_INDEX`` where nothing is to be learnt, as at the begin of each utterance.
            segments: (1, S) which utterance of a packed row a position belongs to; None: a row is an utterance.

        Returns:
            mean loss, accuracy and number of labelled positions, each 0-dim.

        Raises:
            ConfigError: a packed row, and an attention kernel that cannot keep its utterances apart.
        """
        hidden, targets = self.labelled_states(inputs_embeds, labels, segments)
        loss, hits = cross_entropy(self.model.get_output_embeddings(), hidden, targets, self.max_logits)
        count = torch.tensor(len(targets), device=targets.device)
        return loss / max(len(targets), 1), hits / count.clamp(min=1), count

    def labelled_states(
        self, inputs_embeds: Tensor, labels: Tensor, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states (N, D_llm) that predict the N labels, and these labels (N,), row by row."""
        packed = {} if segments is None else attentions.packed_arguments(self.attention, lay_out(segments))
        with self._checkpointing():
            hidden = self._backbone(
                inputs_embeds=inputs_embeds.to(self.embedding.weight.dtype), use_cache=False, **packed
            ).last_hidden_state
        predicts = labels[:, 1:] != IGNORE_INDEX
        return hidden[:, :-1][predicts], labels[:, 1:][predicts]

    def compile_layers(self) -> None:
        """Compile each layer with torch.compile: one compilation serves all layers and lengths; names stay as they are.

        Decoding runs what is not compiled yet as it is (see :func:`funasr_mooer.train.validate.validate`).
        """
        for layer in self.layers:
            layer.compile(dynamic=True)

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Inside, layers checkpoint themselves if they are to, also where the LLM is frozen and in evaluation mode.

        transformers asks a layer's ``training``; that of the modules inside, which dropout asks, stays as it is.
        """
        layers = [m for m in self._backbone.modules() if getattr(m, "gradient_checkpointing", False)]
        modes = [layer.training for layer in layers]
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode

    # -- LoRA -----------------------------------------------------------------------------------------------

    def lora_parameters(self) -> list[nn.Parameter]:
        """The low-rank weights; empty without LoRA."""
        return [parameter for name, parameter in self.named_parameters() if ".lora_" in name]

    def base_parameters(self) -> list[nn.Parameter]:
        """The weights of the base model."""
        return [parameter for name, parameter in self.named_parameters() if ".lora_" not in name]

    def save_lora(self, directory: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, as peft does."""
        from peft import get_peft_model_state_dict

        self._unmerge()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.model.peft_config["default"].save_pretrained(str(directory))
        weights.save_tensors(get_peft_model_state_dict(self.model), directory / "adapter_model.safetensors")

    def load_lora(self, directory: str | Path) -> None:
        """Read a LoRA folder of any peft version into the LoRA weights, which stay trainable.

        Raises:
            CheckpointError: no such folder, another rank, or tensors missing or unexpected.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        directory = Path(directory)
        tensors = weights.read_tensors(_lora_file(directory))
        tensors = {
            name.removeprefix("llm.").replace(".default.weight", ".weight"): tensor for name, tensor in tensors.items()
        }
        wanted = get_peft_model_state_dict(self.model)
        ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
        if ranks and ranks != {self.lora.r}:
            found = "/".join(map(str, sorted(ranks)))
            raise CheckpointError(
                f"{directory}: {len(tensors)} LoRA tensors have r={found}, the model has r={self.lora.r}; "
                f"set llm_conf.lora.r: {found}"
            )
        shapes = [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ]
        weights.complain(
            directory, missing=wanted.keys() - tensors.keys(), unexpected=tensors.keys() - wanted.keys(), other=shapes
        )
        set_peft_model_state_dict(self.model, tensors)

    def merge(self) -> None:
        """Add the updates to the base weights, for decoding: same answers, no extra matrix products."""
        if self.lora is not None and not self._merged:
            self.model.merge_adapter()
            self._merged = True

    def train(self, mode: bool = True) -> LoRAQwenDecoder:
        if mode:
            self._unmerge()
        return super().train(mode)

    def _unmerge(self) -> None:
        if getattr(self, "_merged", False):
            self.model.unmerge_adapter()
            self._merged = False

    def _add_lora(self) -> None:
        """Wrap the base model; sizes come from the folder in ``lora.init`` where there is one."""
        from peft import LoraConfig, get_peft_model

        conf = self.lora
        if conf.init is not None:
            conf = self.lora = dataclasses.replace(conf, **_lora_sizes(Path(conf.init)))
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=conf.r,
            lora_alpha=conf.alpha,
            lora_dropout=conf.dropout,
            target_modules=list(conf.targets),
            base_model_name_or_path=str(self.init),
        )
        with warnings.catch_warnings():  # that peft asks transformers by an old name is nothing a user can mend
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            self.model = get_peft_model(self.model, peft_config)
        for parameter in self.lora_parameters():
            parameter.data = parameter.data.float()
        if conf.init is not None:
            self.load_lora(conf.init)

    # -- the base model ---------------------------------------------------------------------------------------

    @property
    def _backbone(self) -> nn.Module:
        """The layers without the output head."""
        causal = self.model.base_model.model if self.lora is not None else self.model
        return causal.model

    def save_base(self, directory: str | Path) -> None:
        """Write the base model's weights and config as transformers does (after full training)."""
        self._unmerge()
        causal = self.model.base_model.model if self.lora is not None else self.model
        state = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in causal.state_dict().items()
            if ".lora_" not in name
        }
        causal.save_pretrained(str(directory), state_dict=state)

    def load_base(self, directory: str | Path) -> None:
        """Read what :meth:`save_base` wrote.

        Raises:
            CheckpointError: weights missing or of another model.
        """
        saved = _load_base(Path(directory), self.embedding.weight.dtype, "sdpa").state_dict()
        causal = self.model.base_model.model if self.lora is not None else self.model
        wanted = {name: name.replace(".base_layer.", ".") for name in causal.state_dict() if ".lora_" not in name}
        weights.complain(directory, missing=set(wanted.values()) - saved.keys())
        causal.load_state_dict({name: saved[source] for name, source in wanted.items()}, strict=False)


def _load_base(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """The causal LM of a folder, every weight read from it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"llm_conf.init: {folder} is not the folder of an LLM (no config.json); "
            "download the base model there, or give its folder with ++llm_conf.init=DIR"
        )
    if torch.get_default_device().type == "meta":
        sizes = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        return AutoModelForCausalLM.from_config(sizes, dtype=dtype, attn_implementation=attention)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, attn_implementation=attention, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"llm_conf.init: {folder}: {str(error).splitlines()[0]}") from error
    weights.complain(folder, missing=info["missing_keys"], other=[str(key) for key in info["mismatched_keys"]])
    # Sampling settings of a chat model (repetition_penalty 1.05, do_sample) must not leak into recognition.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    return model


def _lora_file(directory: Path) -> Path:
    """The weight file of a peft folder."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(
        f"llm_conf.lora.init: {directory} holds neither adapter_model.safetensors nor adapter_model.bin"
    )


def _lora_sizes(directory: Path) -> dict:
    """Rank, scale and targets of a peft folder of any version, from its ``adapter_config.json``."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"llm_conf.lora.init: {file} does not exist")
    try:
        conf = json.loads(file.read_text(encoding="utf-8"))
        sizes = {"r": conf["r"], "alpha": conf["lora_alpha"], "targets": sorted(conf["target_modules"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is not peft's adapter_config.json of a LoRA ({error!r})") from None
    if conf.get("peft_type") != "LORA" or conf.get("bias", "none") != "none" or conf.get("modules_to_save"):
        raise CheckpointError(f"{file}: only plain LoRA is read (peft_type LORA, bias none, no modules_to_save)")
    return sizes
