"""What ONNX holds of a U2ppMoE: modules without Python decisions, over the model's own weights."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.modules.ctc import CTCHead
from funasr_mooer.modules.masks import attention_bias, padding_mask
from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.modules.positions import AddedPositions, Positions
from funasr_mooer.u2pp_moe.decoder import MoETransformerDecoder

# Shapes: B utterances or streams, T feature frames, F feature size, T' encoder frames, S cached frames, D model size,
# L layers, H heads, K = D / H, C candidates of an utterance, N tokens, V vocabulary, E experts.
ENDLESS = 1 << 30  # frames of a chunk that holds any utterance


class EncoderGraph(nn.Module):
    """Whole utterances, at any chunk size."""

    def __init__(self, encoder: MoEConformerEncoder):
        super().__init__()
        self.encoder = exportable(encoder)

    def forward(
        self, feats: Tensor, lengths: Tensor, chunk_size: Tensor, num_left_chunks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,), and two integers as of ``MoEConformerEncoder.forward`` -> (B, T', D), (B,)."""
        encoder = self.encoder
        x, positions = encoder.embed(encoder._normalise(feats))
        lengths = encoder.output_lengths(lengths)
        speech = padding_mask(lengths, x.shape[1])  # (B, T')
        chunk_size = torch.where(chunk_size > 0, chunk_size, ENDLESS)
        chunk = torch.arange(x.shape[1]) // chunk_size
        distance = chunk[:, None] - chunk
        seen = (distance >= 0) & ((num_left_chunks < 0) | (distance <= num_left_chunks))  # (T', T')
        bias, speech = attention_bias(speech.unsqueeze(1) & seen, x.dtype), speech.to(x.dtype)
        for block in encoder.encoders:
            x = block(x, positions, bias, speech)
        return encoder.after_norm(x), lengths


class EncoderChunkGraph(nn.Module):
    """The next chunk of several streams; caches go in and come out."""

    def __init__(self, encoder: MoEConformerEncoder):
        super().__init__()
        self.encoder = exportable(encoder)

    def forward(
        self, feats: Tensor, lengths: Tensor, offsets: Tensor, cached: Tensor, att_cache: Tensor, cnn_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments and results of ``MoEConformerEncoder.forward_streams``."""
        encoder = self.encoder
        x, _ = encoder.embed(encoder._normalise(feats))
        lengths, before = encoder.output_lengths(lengths), att_cache.shape[3]
        places = torch.arange(before + x.shape[1]) - before  # of the frames seen, counted from the chunk's first
        positions = sinusoids((offsets[:, None] + places).clamp(min=0), encoder.output_size)  # (B, S + T', D)
        visible = (places >= -cached[:, None]) & (places < lengths[:, None])
        bias = attention_bias(visible.unsqueeze(1), x.dtype)
        att_caches, cnn_caches = [], []
        for i, block in enumerate(encoder.encoders):
            x, att, cnn = block.forward_chunk(x, positions, att_cache[i], cnn_cache[i], bias)
            att_caches.append(att)
            cnn_caches.append(cnn)
        return encoder.after_norm(x), lengths, torch.stack(att_caches), torch.stack(cnn_caches)


class CTCGraph(nn.Module):
    """Log probabilities of tokens per frame."""

    def __init__(self, ctc: CTCHead):
        super().__init__()
        self.ctc = ctc

    def forward(self, encoder_out: Tensor) -> Tensor:
        """(B, T', D) -> (B, T', V)."""
        return self.ctc.log_probs(encoder_out)


class DecoderGraph(nn.Module):
    """One direction of the attention decoder, over candidates that begin with the start symbol."""

    def __init__(self, decoder: MoETransformerDecoder):
        super().__init__()
        self.decoder = exportable(decoder)

    def forward(self, encoder_out: Tensor, encoder_lengths: Tensor, tokens: Tensor) -> Tensor:
        """(B, T', D), (B,), (B, C, N) -> logits of the token after each, (B, C, N, V)."""
        decoder = self.decoder
        speech = padding_mask(encoder_lengths, encoder_out.shape[1])
        bias = attention_bias(speech.unsqueeze(1), encoder_out.dtype)
        x = decoder.embed(tokens.flatten(0, 1))  # (B * C, N, D)
        for layer in decoder.decoders:
            x = layer(x, encoder_out, bias, None)
        return decoder.output_layer(decoder.after_norm(x)).view(*tokens.shape, -1)


class SparseExperts(nn.Module):
    """:class:`MoEFFN` with an operator per expert in place of its loop: an expert gets the frames that chose it.

    In onnxruntime on a CPU this is cheaper at 4 to 300 frames than all experts at once with weights of zero
    (``benchmarks/onnx_moe.py``).
    """

    def __init__(self, experts: MoEFFN):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); what stands on padding means nothing."""
        experts, frames = self.experts, x.reshape(-1, x.shape[-1])
        chosen, weights = experts.route(frames)
        shares = weights.new_zeros(frames.shape[0], experts.num_experts).scatter(1, chosen, weights)  # (frames, E)
        y = torch.zeros_like(frames)
        for e in range(experts.num_experts):
            rows = (chosen == e).any(dim=-1).nonzero().squeeze(1)
            b_1, b_2 = (None if b is None else b[e] for b in (experts.b_1, experts.b_2))
            hidden = experts.activation(F.linear(frames[rows], experts.w_1[e], b_1))
            y = y.index_add(0, rows, F.linear(hidden, experts.w_2[e], b_2) * shares[rows, e].unsqueeze(1))
        return y.view_as(x)


class ComputedPositions(nn.Module):
    """:class:`Positions` without a table, which would limit the length of what a graph can hear."""

    def __init__(self, positions: Positions):
        super().__init__()
        self.scale, self.size = positions.scale, positions.pe.shape[2]
        self.added = isinstance(positions, AddedPositions)

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor] | Tensor:
        """As the class that it stands for."""
        rows = sinusoids(torch.arange(x.shape[1])[None] + offset, self.size)
        return x * self.scale + rows if self.added else (x * self.scale, rows)


def sinusoids(frames: Tensor, size: int) -> Tensor:
    """Frame numbers (B, T) -> (B, T, size); the rows of ``modules.positions.sinusoids``."""
    rates = torch.exp(torch.arange(0, size, 2, dtype=torch.float32) * -(math.log(10000.0) / size))
    angles = frames.unsqueeze(-1).float() * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(2)


def exportable(module: nn.Module) -> nn.Module:
    """A copy over the same weights, in evaluation mode, with experts and positions that ONNX can hold."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, shared).eval()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoEFFN):
                setattr(parent, name, SparseExperts(child))
            elif isinstance(child, Positions):
                setattr(parent, name, ComputedPositions(child))
    return module
