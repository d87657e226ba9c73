"""The adapter between speech encoder and LLM: one embedding per ``granularity_ms`` of audio."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError


class LinearAdapter(nn.Module):
    """Stack ``k`` encoder frames, then project them into the LLM embedding space.

    One output position stands for ``granularity_ms`` of audio; MooER (arXiv 2408.05101) uses
    120 ms, which is two 60 ms Paraformer frames.

    Args:
        encoder_dim: size of one encoder frame.
        llm_dim: size of one LLM embedding (3584 for Qwen2-7B).
        frame_ms: stride of the encoder output.
        granularity_ms: stride of the adapter output.
        hidden_dim: size between the two linear layers.

    Raises:
        ConfigError: if ``granularity_ms`` is not a multiple of ``frame_ms``.
    """

    def __init__(
        self,
        encoder_dim: int,
        llm_dim: int,
        frame_ms: float = 60,
        granularity_ms: float = 120,
        hidden_dim: int = 2048,
    ):
        super().__init__()
        self.k = round(granularity_ms / frame_ms)
        if self.k < 1 or self.k * frame_ms != granularity_ms:
            choices = [frame_ms * k for k in range(1, 5)]
            raise ConfigError(
                f"adapter_conf.granularity_ms={granularity_ms:g} is not a multiple of the encoder's "
                f"frame_ms={frame_ms:g}; use one of [{', '.join(f'{c:g}' for c in choices)}]"
            )
        self.granularity_ms = granularity_ms
        self.linear1 = nn.Linear(encoder_dim * self.k, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, llm_dim)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Audio embeddings per utterance, (B,), for encoder lengths in frames, (B,)."""
        return lengths // self.k

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B,) -> audio embeddings (B, T // k, D_llm) and their lengths (B,)."""
        B, T, D = x.shape
        # The last T % k frames are dropped, as in the released checkpoints: padding them
        # would add one embedding that the LLM never saw in training.
        x = x[:, : T - T % self.k].reshape(B, T // self.k, D * self.k)
        return self.linear2(torch.relu(self.linear1(x))), self.output_lengths(lengths)
