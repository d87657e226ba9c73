"""Paraformer's SANM encoder: FunASR's own layers behind our encoder interface."""

from __future__ import annotations

import torch
from funasr.models.sanm.encoder import SANMEncoder
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class ParaformerEncoder(SANMEncoder):
    """SANM encoder over LFR features, one output frame per 60 ms (arXiv 2006.01713).

    The layers and the names of their weights are FunASR's, so Paraformer and MooER checkpoints load as they are.
    Positions and the scaling of the input are computed in float32 whatever the weights' type: in bfloat16
    positions beyond 256 would coincide.

    Args:
        input_size: size of one feature frame (560 for 80 mel bins, LFR 7/6).
        output_size: D.
        attention_heads: heads of each self-attention.
        linear_units: hidden size of the feed-forward layers.
        num_blocks: layers.
        kernel_size: width of the FSMN memory, frames.
        sanm_shift: shift of the FSMN memory, frames.
        dropout_rate: of residual and feed-forward paths.
        attention_dropout_rate: of attention weights.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    frame_ms = 60.0

    def __init__(
        self,
        input_size: int = 560,
        output_size: int = 512,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 50,
        kernel_size: int = 11,
        sanm_shift: int = 0,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(
            input_size=input_size,
            output_size=output_size,
            attention_heads=attention_heads,
            linear_units=linear_units,
            num_blocks=num_blocks,
            dropout_rate=dropout_rate,
            positional_dropout_rate=dropout_rate,
            attention_dropout_rate=attention_dropout_rate,
            input_layer="pe",
            kernel_size=kernel_size,
            sanm_shfit=sanm_shift,
            selfattention_layer_type="sanm",
        )
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def output_size(self) -> int:
        """Size of one output frame, D."""
        return self._output_size

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames for feature frames: as many."""
        return lengths

    def forward(self, feats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> encoder frames (B, T, D) and their lengths (B,)."""
        B, T, _ = feats.shape
        mask = torch.arange(T, device=feats.device)[None, None] < lengths[:, None, None]  # (B, 1, T)
        x = self.embed(feats.float() * self.output_size**0.5).to(self.after_norm.weight.dtype)
        for layer in [*self.encoders0, *self.encoders]:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(_run, layer, x, mask, use_reentrant=False)
            else:
                x = _run(layer, x, mask)
        return self.after_norm(x), self.output_lengths(lengths)


def _run(layer: torch.nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x, mask)[0]
