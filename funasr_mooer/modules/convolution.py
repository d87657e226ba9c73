"""The convolution of a conformer block: what a frame learns from its close neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise, norm, activation, pointwise; frames stay in the middle axis, (B, T, D).

    Args:
        size: channels D.
        kernel_size: frames that the depthwise convolution spans.
        activation: between the norm and the last pointwise convolution.
        norm: ``layer_norm`` or ``batch_norm``.
        causal: look at past frames only; needed for streaming.
        pad_with_bias: treat batch padding as WeNet does. There, padding frames pass the first pointwise
            convolution, and its bias reaches the last frames of shorter utterances: in a batch they
            differ from the utterance alone. Without it they do not. Causal models never see the difference.

    Raises:
        ConfigError: an unknown norm, or an even kernel in a convolution that is not causal.
    """

    def __init__(
        self,
        size: int,
        kernel_size: int,
        activation: nn.Module,
        norm: str = "layer_norm",
        causal: bool = False,
        pad_with_bias: bool = False,
    ):
        super().__init__()
        if norm not in ("layer_norm", "batch_norm"):
            raise ConfigError(f"cnn_module_norm={norm!r} is not known; use layer_norm or batch_norm")
        if kernel_size < 1 or (not causal and kernel_size % 2 == 0):
            raise ConfigError(f"cnn_module_kernel={kernel_size}: without causal: true the kernel is an odd number")
        self.context = kernel_size - 1 if causal else 0  # frames of the past that streaming has to keep
        self.side = 0 if causal else (kernel_size - 1) // 2
        self.pad_with_bias = pad_with_bias
        self.pointwise_conv1 = nn.Conv1d(size, 2 * size, 1)
        self.depthwise_conv = nn.Conv1d(size, size, kernel_size, groups=size)
        self.norm = nn.LayerNorm(size) if norm == "layer_norm" else nn.BatchNorm1d(size)
        self.activation = activation
        self.pointwise_conv2 = nn.Conv1d(size, size, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix neighbouring frames.

        Args:
            x: (B, T, D).
            mask: (B, T, 1), False on padding; None where there is none.
            cache: the last ``kernel_size - 1`` input frames before ``x``, (B, D, kernel_size - 1); None at the start.

        Returns:
            (B, T, D), zero on padding, and the next cache (its last axis is empty unless causal).
        """
        if mask is not None:
            x = x * mask
        if self.context:
            # The zeros before the first frame pass the pointwise convolution too, as in WeNet.
            x = F.pad(x, (0, 0, self.context, 0)) if cache is None else torch.cat((cache.transpose(1, 2), x), dim=1)
        cache = x[:, x.shape[1] - self.context :].transpose(1, 2)
        x = F.glu(pointwise(x, self.pointwise_conv1), dim=-1)
        if mask is not None and not self.context and not self.pad_with_bias:
            x = x * mask
        x = depthwise(x, self.depthwise_conv, self.side)
        x = self.norm(x) if isinstance(self.norm, nn.LayerNorm) else self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = pointwise(self.activation(x), self.pointwise_conv2)
        return (x if mask is None else x * mask), cache


def pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of width 1 over (B, T, D), as the matrix product that it is."""
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def depthwise(x: Tensor, conv: nn.Conv1d, side: int) -> Tensor:
    """A depthwise convolution over (B, T, D) with ``side`` zero frames at both ends.

    Written as a 2-D convolution of height 1: (B, T, D) is then "channels last" as it lies in memory, which
    needs no copies and runs 3 times as fast as ``conv1d`` on a CPU (forward and backward, D = 192, kernel 15).
    """
    image = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
    weight = conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(image, weight, conv.bias, padding=(0, side), groups=conv.groups)
    return y.squeeze(2).transpose(1, 2)
