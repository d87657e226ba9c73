"""The dense feed-forward layer, and the activations that configs name."""

from __future__ import annotations

from torch import Tensor, nn

from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError

ACTIVATIONS = {"swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def activation(name: str) -> nn.Module:
    """The activation of that name.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation_type={name!r} is not known{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear.

    Args:
        size: model size D.
        hidden: inner size.
        act: the activation between.
        dropout: on the inner values, the widest of the model: on a CPU it costs a tenth of a training step.
        bias: whether the two linear layers have one.
    """

    def __init__(self, size: int, hidden: int, act: nn.Module, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.w_1 = nn.Linear(size, hidden, bias=bias)
        self.w_2 = nn.Linear(hidden, size, bias=bias)
        self.activation = act
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); ``mask`` is there for MoEFFN's sake and changes nothing."""
        return self.w_2(self.dropout(self.activation(self.w_1(x))))
