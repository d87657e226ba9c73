"""The feed-forward layer that a config asks for: dense, or a mixture of experts."""

from __future__ import annotations

from torch import nn

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.feed_forward import FeedForward, activation
from funasr_mooer.modules.moe_ffn import MoEFFN

DENSE = "position_wise_feed_forward"


def build_mlp(
    mlp_type: str, size: int, hidden: int, act: str, dropout: float, bias: bool, num_experts: int, top_k: int
) -> nn.Module:
    """One feed-forward layer.

    Args:
        mlp_type: ``moe`` or ``position_wise_feed_forward``.
        size: model size.
        hidden: inner size of the layer, or of one expert.
        act: name of the activation.
        dropout: on the inner values.
        bias: whether linear layers have one.
        num_experts: of ``moe``.
        top_k: experts per frame.

    Raises:
        ConfigError: another ``mlp_type`` or activation, or ``top_k`` does not fit.
    """
    if mlp_type == "moe":
        return MoEFFN(size, hidden, activation(act), num_experts, top_k, dropout, bias)
    if mlp_type == DENSE:
        return FeedForward(size, hidden, activation(act), dropout, bias)
    raise ConfigError(f"mlp_type={mlp_type!r} is not supported; use moe or {DENSE}")
