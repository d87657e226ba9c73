"""Conformer encoder of U2++: dense or with mixture-of-experts layers, streaming or not, with WeNet's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.attention import RelativeAttention
from funasr_mooer.modules.convolution import ConvolutionModule
from funasr_mooer.modules.feed_forward import activation
from funasr_mooer.modules.masks import attention_bias, chunk_mask, draw_chunk, speech_mask
from funasr_mooer.modules.mlp import build_mlp
from funasr_mooer.modules.positions import Positions
from funasr_mooer.modules.subsampling import INPUT_LAYERS

# Shapes: B batch, T input frames, T' encoder frames, F feature size, D model size, L layers, H heads.
FULL_CONTEXT = -1


class MoEConformerEncoder(nn.Module):
    """Conformer whose feed-forward layers may be mixtures of experts (U2++ MoE, arXiv 2404.16407).

    Argument names and state-dict keys are WeNet's, so its configs and checkpoints fit (the experts' keys
    are stacked on loading). ``mlp_type: position_wise_feed_forward`` is the dense baseline. Trained with
    ``use_dynamic_chunk`` and ``causal``, one model decodes whole utterances and streams.

    Args:
        input_size: feature size F.
        output_size: model size D.
        attention_heads: H; divides D.
        linear_units: inner size of one feed-forward layer or expert.
        num_blocks: conformer blocks L.
        dropout_rate: after every sub-layer.
        positional_dropout_rate: on the input and its sinusoids.
        attention_dropout_rate: on attention weights.
        ffn_dropout_rate: inside the feed-forward layers; WeNet's is ``dropout_rate``, the default here.
        input_layer: ``conv2d`` (a quarter of the frames), ``linear`` (all of them) or ``linear2`` (ours: half).
        input_frame_ms: stride of the features; if not given 10 ms for conv2d, 60 ms (LFR 7/6) for the others.
        pos_enc_layer_type: only ``rel_pos``.
        selfattention_layer_type: only ``rel_selfattn``.
        activation_type: ``swish``, ``relu`` or ``gelu``.
        normalize_before: only true; WeNet's configs state it.
        use_cnn_module: only true; WeNet's configs state it.
        cnn_module_kernel: frames of the depthwise convolution.
        cnn_module_norm: ``layer_norm`` or ``batch_norm``.
        causal: convolutions look back only.
        pad_with_bias: batch padding as in WeNet; see :class:`ConvolutionModule`.
        use_dynamic_chunk: draw a chunk size per training batch.
        use_dynamic_left_chunk: draw the number of left chunks too.
        static_chunk_size: a fixed chunk size, in training and decoding; 0 for none.
        global_cmvn: normalise the features with the buffers ``global_cmvn.mean`` and ``.istd``.
        mlp_type: ``moe`` or ``position_wise_feed_forward``.
        n_expert: experts per layer.
        n_expert_activated: experts per frame.
        mlp_bias: biases in feed-forward layers and experts.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.

    Raises:
        ConfigError: a setting that cannot work; the message says what would.
    """

    def __init__(
        self,
        input_size: int = 80,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        ffn_dropout_rate: float | None = None,
        input_layer: str = "conv2d",
        input_frame_ms: float | None = None,
        pos_enc_layer_type: str = "rel_pos",
        selfattention_layer_type: str = "rel_selfattn",
        activation_type: str = "swish",
        normalize_before: bool = True,
        use_cnn_module: bool = True,
        cnn_module_kernel: int = 15,
        cnn_module_norm: str = "layer_norm",
        causal: bool = False,
        pad_with_bias: bool = False,
        use_dynamic_chunk: bool = False,
        use_dynamic_left_chunk: bool = False,
        static_chunk_size: int = 0,
        global_cmvn: bool = False,
        mlp_type: str = "moe",
        n_expert: int = 8,
        n_expert_activated: int = 2,
        mlp_bias: bool = True,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        _only("input_layer", input_layer, *INPUT_LAYERS)
        _only("pos_enc_layer_type", pos_enc_layer_type, "rel_pos")
        _only("selfattention_layer_type", selfattention_layer_type, "rel_selfattn")
        _only("normalize_before", normalize_before, True)
        _only("use_cnn_module", use_cnn_module, True)
        if output_size % 2 or num_blocks < 1:
            raise ConfigError(f"output_size={output_size} must be even and num_blocks={num_blocks} at least 1")
        if static_chunk_size < 0:
            raise ConfigError(f"static_chunk_size={static_chunk_size} must be 0 (none) or a number of frames")
        self.output_size = output_size
        self.use_dynamic_chunk = use_dynamic_chunk
        self.use_dynamic_left_chunk = use_dynamic_left_chunk
        self.static_chunk_size = static_chunk_size
        self.gradient_checkpointing = gradient_checkpointing

        self.global_cmvn = GlobalCMVN(input_size) if global_cmvn else None
        positions = Positions(output_size, positional_dropout_rate)
        self.embed = INPUT_LAYERS[input_layer](input_size, output_size, dropout_rate, positions)
        self.frame_ms = (input_frame_ms or (10.0 if input_layer == "conv2d" else 60.0)) * self.embed.factor
        self.factor, self.right_context, self.causal = self.embed.factor, self.embed.right_context, causal

        inner_dropout = dropout_rate if ffn_dropout_rate is None else ffn_dropout_rate

        def mlp() -> nn.Module:
            experts = (n_expert, n_expert_activated)
            return build_mlp(mlp_type, output_size, linear_units, activation_type, inner_dropout, mlp_bias, *experts)

        self.encoders = nn.ModuleList(
            ConformerBlock(
                RelativeAttention(output_size, attention_heads, attention_dropout_rate),
                mlp(),
                mlp(),
                ConvolutionModule(
                    output_size, cnn_module_kernel, activation(activation_type), cnn_module_norm, causal, pad_with_bias
                ),
                output_size,
                dropout_rate,
            )
            for _ in range(num_blocks)
        )
        self.after_norm = nn.LayerNorm(output_size)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Encoder frames per utterance, (B,), for feature lengths in frames, (B,)."""
        return self.embed.output_lengths(lengths)

    def forward(
        self, feats: Tensor, lengths: Tensor, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            feats: (B, T, F).
            lengths: frames per utterance, (B,).
            chunk_size: encoder frames per chunk, to see what streaming would see; -1 is full context. Not
                given: in training as configured (dynamic, static or full), otherwise the static size or full.
            num_left_chunks: chunks of history that a frame sees; negative means all.

        Returns:
            encoder_out (B, T', D) and its lengths (B,). Values beyond the lengths mean nothing.

        Raises:
            ConfigError: ``chunk_size`` is 0, or given to an encoder that was not trained with chunks.
        """
        x, positions = self.embed(self._normalise(feats))
        lengths, size = self.output_lengths(lengths), x.shape[1]
        speech = speech_mask(lengths, size)  # (B, T')
        visible = None if speech is None else speech.unsqueeze(1)  # (B, 1, T')
        chunks = self._chunks(size, chunk_size, num_left_chunks)
        if chunks is not None:
            seen = chunk_mask(size, *chunks, device=x.device)
            visible = seen[None] if visible is None else visible & seen  # (1 or B, T', T')
        bias = None if visible is None else attention_bias(visible, x.dtype)
        for block in self.encoders:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, positions, bias, speech, use_reentrant=False)
            else:
                x = block(x, positions, bias, speech)
        return self.after_norm(x), lengths

    def forward_chunk(
        self,
        xs: Tensor,
        offset: int,
        required_cache_size: int,
        att_cache: Tensor | None = None,
        cnn_cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the next chunk of one utterance; nothing is kept in the module.

        Args:
            xs: features of the chunk, (1, T, F). With conv2d, consecutive chunks share the frames of the
                right context: chunk i starts at ``i * 4 * chunk_size`` and holds
                ``4 * (chunk_size - 1) + 7`` of them.
            offset: encoder frames before this chunk.
            required_cache_size: encoder frames to keep for the next chunk; 0 none, negative all.
            att_cache: what the call before returned, (L, H, frames, 2D / H); None or empty at the start.
            cnn_cache: likewise, (L, 1, D, cnn_module_kernel - 1).

        Returns:
            encoder_out (1, T', D), att_cache and cnn_cache for the next call.
        """
        layers, first = len(self.encoders), self.encoders[0].self_attn
        if att_cache is None or att_cache.shape[0] == 0:
            att_cache = xs.new_zeros(layers, first.heads, 0, 2 * first.head_size)
        if cnn_cache is not None and cnn_cache.shape[0] == 0:
            cnn_cache = None
        x, _ = self.embed(self._normalise(xs), offset)
        before = att_cache.shape[2]
        total = before + x.shape[1]
        positions = self.embed.pos_enc.table(offset - before, total)
        keep_from = 0 if required_cache_size < 0 else max(total - required_cache_size, 0)
        att_caches, cnn_caches = [], []
        for i, block in enumerate(self.encoders):
            past = None if cnn_cache is None else cnn_cache[i]
            x, att, cnn = block.forward_chunk(x, positions, att_cache[i : i + 1], past)
            att_caches.append(att[:, :, keep_from:])
            cnn_caches.append(cnn)
        return self.after_norm(x), torch.cat(att_caches), torch.stack(cnn_caches)

    def caches(self) -> tuple[Tensor, Tensor]:
        """The caches of a stream that has not begun, (L, H, 0, 2D / H) and (L, D, cnn_module_kernel - 1)."""
        layers, first = len(self.encoders), self.encoders[0]
        at, attention = self.after_norm.weight, first.self_attn
        att_cache = at.new_zeros(layers, attention.heads, 0, 2 * attention.head_size)
        return att_cache, at.new_zeros(layers, self.output_size, first.conv_module.context)

    def forward_streams(
        self,
        xs: Tensor,
        lengths: Tensor,
        offsets: Tensor,
        cached: Tensor,
        att_cache: Tensor,
        cnn_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode the next chunk of several streams at once, each at its own place; nothing is kept in the module.

        Args:
            xs: features of the chunks, (B, T, F); see :meth:`forward_chunk`.
            lengths: features per stream, (B,); less than T only where a stream ends.
            offsets: encoder frames before this chunk, (B,).
            cached: frames in the cache, (B,); they stand at its right end.
            att_cache: (L, B, H, S, 2D / H).
            cnn_cache: (L, B, D, cnn_module_kernel - 1), zeros at the start.

        Returns:
            encoder_out (B, T', D), its lengths (B,), and both caches with the new frames behind all the old ones.
        """
        x, _ = self.embed(self._normalise(xs))
        lengths, before = self.output_lengths(lengths), att_cache.shape[3]
        B, size = x.shape[:2]
        places = torch.arange(-before, size, device=x.device)  # of the frames seen, counted from the chunk's first
        frames = (offsets[:, None] + places).clamp(min=0)  # (B, S + T')
        table = self.embed.pos_enc.rows(0, int(offsets.max()) + size)[0]
        visible = (places >= -cached[:, None]) & (places < lengths[:, None])
        bias = None if bool(visible.all()) else attention_bias(visible.unsqueeze(1), x.dtype)
        positions = table[frames] if B > 1 else table[frames[0]][None]
        att_caches, cnn_caches = [], []
        for i, block in enumerate(self.encoders):
            x, att, cnn = block.forward_chunk(x, positions, att_cache[i], cnn_cache[i], bias)
            att_caches.append(att)
            cnn_caches.append(cnn)
        return self.after_norm(x), lengths, torch.stack(att_caches), torch.stack(cnn_caches)

    def _normalise(self, feats: Tensor) -> Tensor:
        return feats if self.global_cmvn is None else self.global_cmvn(feats)

    def _chunks(self, size: int, chunk_size: int | None, num_left_chunks: int) -> tuple[int, int] | None:
        """(chunk_size, num_left_chunks) for a batch of ``size`` frames; None is full context."""
        if chunk_size is None:
            if self.use_dynamic_chunk and self.training:
                chunk_size, num_left_chunks = draw_chunk(size, self.use_dynamic_left_chunk)
            else:
                chunk_size = self.static_chunk_size or FULL_CONTEXT
        elif chunk_size > 0 and not (self.use_dynamic_chunk or self.static_chunk_size):
            raise ConfigError(
                f"chunk_size={chunk_size}: this encoder was made for full context; train it with use_dynamic_chunk: true"
            )
        return None if chunk_size < 0 else (chunk_size, num_left_chunks)


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward; each normalised before and added."""

    def __init__(
        self,
        self_attn: RelativeAttention,
        feed_forward: nn.Module,
        feed_forward_macaron: nn.Module,
        conv_module: ConvolutionModule,
        size: int,
        dropout: float,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.feed_forward_macaron = feed_forward_macaron
        self.conv_module = conv_module
        self.norm_ff_macaron = nn.LayerNorm(size)
        self.norm_mha = nn.LayerNorm(size)
        self.norm_conv = nn.LayerNorm(size)
        self.norm_ff = nn.LayerNorm(size)
        self.norm_final = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor | None, speech: Tensor | None) -> Tensor:
        """(B, T', D) -> (B, T', D); ``bias`` is added to attention scores, ``speech`` (B, T') marks no padding."""
        return self._run(x, positions, bias, speech, None, None)[0]

    def forward_chunk(
        self, x: Tensor, positions: Tensor, att_cache: Tensor, cnn_cache: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk (B, T', D) after the cached frames -> its output and both new caches."""
        return self._run(x, positions, bias, None, att_cache, cnn_cache)

    def _run(self, x, positions, bias, speech, att_cache, cnn_cache):
        mask = None if speech is None else speech.unsqueeze(-1)
        x = x + 0.5 * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x), speech))
        y, att_cache = self.self_attn(self.norm_mha(x), positions, bias, att_cache)
        x = x + self.dropout(y)
        y, cnn_cache = self.conv_module(self.norm_conv(x), mask, cnn_cache)
        x = x + self.dropout(y)
        x = x + 0.5 * self.dropout(self.feed_forward(self.norm_ff(x), speech))
        return self.norm_final(x), att_cache, cnn_cache


class GlobalCMVN(nn.Module):
    """(feats - mean) * istd, per feature dimension; identity until weights are loaded."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("istd", torch.ones(size))

    def forward(self, feats: Tensor) -> Tensor:
        """(B, T, F) -> (B, T, F)."""
        return (feats - self.mean) * self.istd


def _only(name: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not supported; use {' or '.join(map(str, allowed))}")
