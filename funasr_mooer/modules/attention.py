"""Attention: to frames with positions of the keys, as in WeNet's conformer, and the plain one of its decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError

# Shapes: B batch, T frames, S frames seen (cached ones and T), H heads, K = D / H.


class RelativeAttention(nn.Module):
    """Multi-head attention whose scores are (q + u)(k)' + (q + v)(p)', p a projection of the keys' sinusoids.

    That is Transformer-XL without its shift, which WeNet left out (``rel_selfattn``). The four terms are
    regrouped, so that one matrix product does the work of two: q(k + p)' + (uk' + vp'), where the second
    bracket depends on the key alone. The key bias also lets ``scaled_dot_product_attention`` do the rest.

    Args:
        size: model size D.
        heads: number of heads H.
        dropout: on the attention weights.

    Raises:
        ConfigError: ``heads`` does not divide ``size``.
    """

    def __init__(self, size: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or size % heads:
            raise ConfigError(f"attention_heads={heads} does not divide output_size={size}")
        self.heads, self.head_size, self.dropout = heads, size // heads, dropout
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.head_size))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.head_size))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self, x: Tensor, positions: Tensor, bias: Tensor | None = None, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every frame of ``x`` to the cached frames and to ``x``.

        Args:
            x: (B, T, D).
            positions: sinusoids of the frames seen, (1, S, D).
            bias: added to the scores, broadcastable to (B, H, T, S); see ``masks.attention_bias``.
            cache: keys and values of the frames before ``x``, (B, H, S - T, 2K); None outside streaming.

        Returns:
            (B, T, D), and the keys and values of all S frames, (B, H, S, 2K), or None where no cache came in.
        """
        q, k, v = self._split(self.linear_q(x)), self._split(self.linear_k(x)), self._split(self.linear_v(x))
        if cache is not None:
            k_before, v_before = cache.split(self.head_size, dim=-1)
            k, v = torch.cat((k_before, k), dim=2), torch.cat((v_before, v), dim=2)
            cache = torch.cat((k, v), dim=-1)
        p = self._split(self.linear_pos(positions))  # (1, H, S, K)
        scale = self.head_size**-0.5
        key_bias = self._dot(k, self.pos_bias_u) + self._dot(p, self.pos_bias_v)  # (B, H, 1, S)
        key_bias = key_bias * scale
        scores_bias = key_bias if bias is None else key_bias + bias
        y = F.scaled_dot_product_attention(
            q, k + p, v, attn_mask=scores_bias, dropout_p=self.dropout if self.training else 0.0
        )
        return self.linear_out(y.transpose(1, 2).flatten(2)), cache

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)  # (B, H, T, K)

    @staticmethod
    def _dot(keys: Tensor, vector: Tensor) -> Tensor:
        """(B, H, S, K), (H, K) -> (B, H, 1, S)."""
        return (keys @ vector[:, :, None]).transpose(2, 3)


class MultiHeadAttention(nn.Module):
    """Multi-head attention without positions (Attention Is All You Need, 3.2.2), with WeNet's names.

    Args:
        size: model size D.
        heads: number of heads H.
        dropout: on the attention weights.

    Raises:
        ConfigError: ``heads`` does not divide ``size``.
    """

    def __init__(self, size: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or size % heads:
            raise ConfigError(f"attention_heads={heads} does not divide the model size {size}")
        self.heads, self.head_size, self.dropout = heads, size // heads, dropout
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What can be attended to: (B, S, D) -> keys and values, (B, H, S, K) each."""
        return self._split(self.linear_k(x)), self._split(self.linear_v(x))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from x (B, T, D) to keys and values (B, H, S, K) -> (B, T, D).

        Args:
            x: what asks.
            keys: what is asked.
            values: what is answered.
            bias: added to the scores, broadcastable to (B, H, T, S); see ``masks.attention_bias``.
            causal: place t of x sees keys 0 to t only.
        """
        dropout = self.dropout if self.training else 0.0
        q = self._split(self.linear_q(x))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, dropout_p=dropout, is_causal=causal)
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)  # (B, H, T, K)
