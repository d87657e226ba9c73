"""A MooER without weights, on torch's meta device: how many it has, and what a position of it keeps for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer.border import build
from funasr_mooer.border.parts import Parts
from funasr_mooer.config import construct
from funasr_mooer.data.features import FrontendConf
from funasr_mooer.errors import ConfigError

SAMPLE = 64  # positions with which memory is probed


class Outline(Parts):
    """Encoder, adapter and LLM of a config, of which no file but the LLM's ``config.json`` is read.

    Args:
        config: the sections of a system; its ``init`` files need not exist.
        llm: folder with the LLM's ``config.json``.

    Raises:
        ConfigError: a model without an LLM, or settings that cannot work.
        CheckpointError: no ``config.json`` there.
    """

    part_names = ("encoder", "adapter", "lora", "llm")
    objective = "llm"

    def __init__(self, config: Mapping[str, Any], llm: Path):
        super().__init__()
        if config.get("model") != "MooER":
            raise ConfigError(f"model: {config.get('model')}: only MooER, which has an LLM, is forecast")
        frontend = FrontendConf(**{k: v for k, v in (config.get("frontend_conf") or {}).items() if k != "cmvn_file"})
        llm_conf = {k: v for k, v in (config.get("llm_conf") or {}).items() if k != "fingerprint"}
        if llm_conf.get("lora"):
            llm_conf["lora"] = {**llm_conf["lora"], "init": None}
        self.feature_size, self.feature_ms = frontend.n_mels * frontend.lfr_m, frontend.frame_shift * frontend.lfr_n
        with torch.device("meta"):
            self.encoder = self._part("encoder_classes", config, "encoder", input_size=self.feature_size)
            self.llm = construct(
                build.registered("decoder_classes", config, "llm"), llm_conf | {"init": str(llm)}, "llm_conf"
            )
            sizes = {"encoder_dim": self.encoder.output_size, "llm_dim": self.llm.hidden_size}
            self.adapter = self._part("adaptor_classes", config, "adapter", frame_ms=self.encoder.frame_ms, **sizes)
        frozen = build.encoder_is_frozen(config)
        self.train_parts(["adapter", *(["lora"] if self.llm.lora else []), *([] if frozen else ["encoder"])])

    def _part(self, table: str, config: Mapping[str, Any], key: str, **given: Any) -> nn.Module:
        conf, _ = build.split_init(config.get(f"{key}_conf"))
        conf.pop("freeze", None)
        return construct(build.registered(table, config, key), conf, f"{key}_conf", **given)

    def layer_bytes(self, dtype: torch.dtype) -> float:
        """What one layer of the LLM keeps for the backward pass, bytes per position, where attention needs no square."""
        layer = self.llm.layers[0].to(dtype).train()
        layer.gradient_checkpointing = False  # which keeps its input alone
        rotary = self.llm.rotary_embedding.to(dtype)

        def run(positions: int) -> Tensor:
            x = torch.empty(1, positions, self.llm.hidden_size, dtype=dtype, device="meta", requires_grad=True)
            place = rotary(x, torch.arange(positions, device="meta")[None])
            return layer(x, position_embeddings=place, attention_mask=None)

        return per_position(run, layer)

    def encoder_bytes(self) -> float:
        """What the whole encoder keeps for the backward pass in float32, bytes per feature frame."""
        encoder = self.encoder.train()

        def run(frames: int) -> Tensor:
            feats = torch.empty(1, frames, self.feature_size, device="meta", requires_grad=True)
            return encoder(feats, torch.full((1,), frames, device="meta"))

        return per_position(run, encoder)


def per_position(run: Callable[[int], Any], module: nn.Module) -> float:
    """Bytes kept for the backward pass that grow with the number of positions; those with its square are left out."""
    short, long = (kept_bytes(functools.partial(run, count), module) for count in (SAMPLE, 2 * SAMPLE))
    return (4 * short - long) / (2 * SAMPLE)  # a n + b n^2 -> a


def kept_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """Bytes of all tensors that autograd keeps after ``run``, each storage once, without the module's own weights."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in kept}
    del out
    return sum(storage.nbytes() for number, storage in storages.items() if number not in own)
