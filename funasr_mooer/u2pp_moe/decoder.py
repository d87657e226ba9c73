"""Attention decoders of U2++: left to right, or both ways, dense or with mixture-of-experts layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.attention import MultiHeadAttention
from funasr_mooer.modules.masks import attention_bias, speech_mask
from funasr_mooer.modules.mlp import build_mlp
from funasr_mooer.modules.positions import AddedPositions

# Shapes: B utterances, R = B * C rows of tokens (C candidates per utterance), N tokens, T encoder frames, D model size,
# V vocabulary. Row r belongs to utterance r // C: encoder frames are never repeated per candidate.


@dataclasses.dataclass
class DecoderCache:
    """What one more token needs to know of the tokens before it and of the audio.

    Attributes:
        memory: per layer, keys and values of the encoder frames, (B, H, T, K) each.
        memory_bias: hides padding frames, (B, 1, 1, T), or None.
        past: per layer, keys and values of the tokens so far, (R, H, N, K) each, or None before the first.
        length: tokens so far.
    """

    memory: list[tuple[Tensor, Tensor]]
    memory_bias: Tensor | None
    past: list[tuple[Tensor, Tensor] | None]
    length: int = 0

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (R,), in this order; each stays with its own utterance."""
        self.past = [None if p is None else (p[0][rows], p[1][rows]) for p in self.past]


class MoETransformerDecoder(nn.Module):
    """Transformer decoder with WeNet's argument names and state-dict keys; predicts the next token.

    Args:
        vocab_size: V.
        encoder_output_size: D; the decoder has the encoder's size.
        attention_heads: divides D.
        linear_units: inner size of one feed-forward layer or expert.
        num_blocks: layers.
        dropout_rate: after every sub-layer and inside the feed-forward layers.
        positional_dropout_rate: on embedded tokens.
        self_attention_dropout_rate: on attention weights between tokens.
        src_attention_dropout_rate: on attention weights to the encoder.
        activation_type: ``relu``, ``swish`` or ``gelu``.
        input_layer: only ``embed``.
        use_output_layer: only true; WeNet's configs state it.
        normalize_before: only true; WeNet's configs state it.
        mlp_type: ``moe`` or ``position_wise_feed_forward``.
        n_expert: experts per layer.
        n_expert_activated: experts per token.
        mlp_bias: biases in feed-forward layers and experts.
        gradient_checkpointing: recompute layers in the backward pass to save memory.

    Raises:
        ConfigError: a setting that cannot work; the message says what would.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        self_attention_dropout_rate: float = 0.0,
        src_attention_dropout_rate: float = 0.0,
        activation_type: str = "relu",
        input_layer: str = "embed",
        use_output_layer: bool = True,
        normalize_before: bool = True,
        mlp_type: str = "moe",
        n_expert: int = 8,
        n_expert_activated: int = 2,
        mlp_bias: bool = True,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        size = encoder_output_size
        _only("input_layer", input_layer, "embed")
        _only("use_output_layer", use_output_layer, True)
        _only("normalize_before", normalize_before, True)
        if num_blocks < 1:
            raise ConfigError(f"decoder num_blocks={num_blocks} must be at least 1")
        self.gradient_checkpointing = gradient_checkpointing

        def mlp() -> nn.Module:
            experts = (n_expert, n_expert_activated)
            return build_mlp(mlp_type, size, linear_units, activation_type, dropout_rate, mlp_bias, *experts)

        self.embed = nn.Sequential(nn.Embedding(vocab_size, size), AddedPositions(size, positional_dropout_rate))
        self.decoders = nn.ModuleList(
            DecoderLayer(
                MultiHeadAttention(size, attention_heads, self_attention_dropout_rate),
                MultiHeadAttention(size, attention_heads, src_attention_dropout_rate),
                mlp(),
                size,
                dropout_rate,
            )
            for _ in range(num_blocks)
        )
        self.after_norm = nn.LayerNorm(size)
        self.output_layer = nn.Linear(size, vocab_size)

    @property
    def left_to_right(self) -> MoETransformerDecoder:
        """The decoder that reads tokens in their order: this one."""
        return self

    @property
    def right_to_left(self) -> MoETransformerDecoder | None:
        """The decoder that reads them backwards: none here."""
        return None

    def forward(self, encoder_out: Tensor, encoder_lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        """Scores of the token after each given one.

        Args:
            encoder_out: (B, T, D).
            encoder_lengths: (B,).
            tokens: (R, N), beginning with the start symbol; R is a multiple of B.
            token_lengths: (R,).

        Returns:
            logits (R, N, V); values beyond the lengths mean nothing.
        """
        bias = self._memory_bias(encoder_out, encoder_lengths)
        real = speech_mask(token_lengths, tokens.shape[1])  # (R, N)
        x = self.embed(tokens)
        for layer in self.decoders:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, encoder_out, bias, real, use_reentrant=False)
            else:
                x = layer(x, encoder_out, bias, real)
        return self.output_layer(self.after_norm(x))

    def start(self, encoder_out: Tensor, encoder_lengths: Tensor) -> DecoderCache:
        """The cache before the first token, for (B, T, D) and (B,)."""
        memory = [layer.src_attn.keys_and_values(encoder_out) for layer in self.decoders]
        return DecoderCache(memory, self._memory_bias(encoder_out, encoder_lengths), [None] * len(memory))

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """Log probabilities of the next token, (R, V) float32, after the tokens (R,); the cache grows by one."""
        x = self.embed[1](self.embed[0](tokens[:, None]), cache.length)  # (R, 1, D)
        for i, layer in enumerate(self.decoders):
            x, cache.past[i] = layer.step(x, cache.memory[i], cache.memory_bias, cache.past[i])
        cache.length += 1
        return self.output_layer(self.after_norm(x[:, 0])).log_softmax(dim=-1, dtype=torch.float32)

    @staticmethod
    def _memory_bias(encoder_out: Tensor, encoder_lengths: Tensor) -> Tensor | None:
        speech = speech_mask(encoder_lengths, encoder_out.shape[1])
        return None if speech is None else attention_bias(speech.unsqueeze(1), encoder_out.dtype)


class MoEBiTransformerDecoder(nn.Module):
    """Two decoders over one encoder (U2++, arXiv 2106.05642): left to right, and right to left for training and rescoring.

    Args are those of :class:`MoETransformerDecoder`, the same for both, except for the number of layers: ``num_blocks`` from
    left to right and ``r_num_blocks`` from right to left.

    Raises:
        ConfigError: a setting that cannot work; the message says what would.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 3,
        r_num_blocks: int = 3,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        self_attention_dropout_rate: float = 0.0,
        src_attention_dropout_rate: float = 0.0,
        activation_type: str = "relu",
        input_layer: str = "embed",
        use_output_layer: bool = True,
        normalize_before: bool = True,
        mlp_type: str = "moe",
        n_expert: int = 8,
        n_expert_activated: int = 2,
        mlp_bias: bool = True,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        if r_num_blocks < 1:
            raise ConfigError(f"r_num_blocks={r_num_blocks}: use decoder: MoETransformerDecoder for one direction")

        sizes = (vocab_size, encoder_output_size, attention_heads, linear_units)
        rates = (dropout_rate, positional_dropout_rate, self_attention_dropout_rate, src_attention_dropout_rate)
        kinds = (activation_type, input_layer, use_output_layer, normalize_before)
        mlps = (mlp_type, n_expert, n_expert_activated, mlp_bias)
        self.left_decoder, self.right_decoder = (
            MoETransformerDecoder(*sizes, blocks, *rates, *kinds, *mlps, gradient_checkpointing)
            for blocks in (num_blocks, r_num_blocks)
        )

    @property
    def left_to_right(self) -> MoETransformerDecoder:
        """The decoder that reads tokens in their order."""
        return self.left_decoder

    @property
    def right_to_left(self) -> MoETransformerDecoder:
        """The decoder that reads them backwards."""
        return self.right_decoder


class DecoderLayer(nn.Module):
    """Attention to the tokens so far, attention to the audio, feed-forward; each normalised before and added."""

    def __init__(
        self,
        self_attn: MultiHeadAttention,
        src_attn: MultiHeadAttention,
        feed_forward: nn.Module,
        size: int,
        dropout: float,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.src_attn = src_attn
        self.feed_forward = feed_forward
        self.norm1 = nn.LayerNorm(size)
        self.norm2 = nn.LayerNorm(size)
        self.norm3 = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, encoder_out: Tensor, memory_bias: Tensor | None, real: Tensor | None) -> Tensor:
        """(R, N, D) -> (R, N, D); ``real`` (R, N) marks what is no padding.

        Padding stands on the right, so that a token never sees it: the causal mask is enough.
        """
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, *self.self_attn.keys_and_values(y), causal=True))
        return self._finish(x, self.src_attn.keys_and_values(encoder_out), memory_bias, real)

    def step(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_bias: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token per row, (R, 1, D) -> (R, 1, D), and the keys and values of all tokens so far."""
        y = self.norm1(x)
        now = self.self_attn.keys_and_values(y)
        if past is not None:
            now = (torch.cat((past[0], now[0]), dim=2), torch.cat((past[1], now[1]), dim=2))
        x = x + self.dropout(self.self_attn(y, *now))
        return self._finish(x, memory, memory_bias, None), now

    def _finish(
        self, x: Tensor, memory: tuple[Tensor, Tensor], memory_bias: Tensor | None, real: Tensor | None
    ) -> Tensor:
        y = self.norm2(x).reshape(
            memory[0].shape[0], -1, x.shape[2]
        )  # (B, C * N, D): candidates ask one audio together
        x = x + self.dropout(self.src_attn(y, *memory, memory_bias)).view_as(x)
        return x + self.dropout(self.feed_forward(self.norm3(x), real))


def _only(name: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise ConfigError(f"decoder {name}={value!r} is not supported; use {' or '.join(map(str, allowed))}")
