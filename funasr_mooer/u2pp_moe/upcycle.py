"""A dense U2++ model as the start of one with experts: each expert is a copy of the feed-forward layer in its place.

Whichever experts a frame goes to, it gets what the dense layer would have given: training goes on from the dense model's
results, and the experts part ways as the router sends them different frames. (An option of ours, not of the paper.)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer import weights
from funasr_mooer.border.build import build_model
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.model_dir import read_model_dir, write_model_dir
from funasr_mooer.modules.moe_ffn import PARTS, MoEFFN

GATE_STD = 0.01  # small, so that at first the router hardly prefers any expert


def upcycle(dense: str | Path, out: str | Path, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> None:
    """Write the model with experts that a dense one makes.

    Args:
        dense: model directory of a U2ppMoE with ``mlp_type: position_wise_feed_forward``.
        out: model directory to write.
        num_experts: experts per layer.
        top_k: experts per frame.
        seed: of the routers' weights.

    Raises:
        CheckpointError: not a U2ppMoE.
        ConfigError: the model has experts already, or ``top_k`` does not fit.
    """
    config = read_model_dir(dense)
    if config.get("model") != "U2ppMoE":
        raise CheckpointError(f"{dense}: holds a {config.get('model')}; upcycling is for a dense U2ppMoE")
    target = _with_experts(config, num_experts, top_k, dense)
    model, source = build_model(target), build_model(config)
    weights.load_strict(model, copied_experts(model, source.state_dict(), seed), dense)
    write_model_dir(model, out, model.part_names)


def copied_experts(model: nn.Module, dense: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A dense model's weights as those of ``model``, its experts copies and its routers drawn with ``seed``."""
    state, draw = dict(dense), torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, MoEFFN):
            continue
        for theirs, ours in PARTS.items():
            weight = state.pop(f"{name}.{theirs}", None)
            if weight is not None:
                state[f"{name}.{ours}"] = weight.expand(layer.num_experts, *weight.shape)
        gate = layer.gate.weight
        state[f"{name}.gate.weight"] = torch.randn(gate.shape, generator=draw).to(gate.dtype) * GATE_STD
    return state


def _with_experts(config: dict[str, Any], num_experts: int, top_k: int, dense: str | Path) -> dict[str, Any]:
    target = copy.deepcopy(config)
    for part in ("encoder", "decoder"):
        conf = target.setdefault(f"{part}_conf", {})
        if conf.get("mlp_type", "moe") == "moe":
            raise ConfigError(f"{dense}: {part}_conf.mlp_type is moe already; give a model without experts")
        for key in ("init", "fingerprint"):
            conf.pop(key, None)
        conf |= {"mlp_type": "moe", "n_expert": num_experts, "n_expert_activated": top_k}
    return target
