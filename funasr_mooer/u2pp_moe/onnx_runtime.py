"""Encoder and decoder whose work is done by onnxruntime, for the searches and the streaming of a U2ppMoE."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from funasr_mooer.errors import CheckpointError, ConfigError, DependencyError

# Shapes: B utterances or streams, T feature frames, F feature size, T' encoder frames, D model size, V vocabulary,
# R = B * C rows of tokens (C candidates per utterance), N tokens.
CHUNK_FILE, RIGHT_FILE = "encoder_chunk.onnx", "decoder_right.onnx"  # beside encoder_full.onnx and decoder.onnx


class OnnxGraph:
    """One graph that takes and gives tensors.

    Raises:
        CheckpointError: no such file.
        DependencyError: onnxruntime is not installed.
    """

    def __init__(self, file: str | Path):
        try:
            import onnxruntime
        except ImportError as error:
            raise DependencyError("ONNX graphs need onnxruntime: pip install 'funasr-mooer[onnx]'") from error
        if not Path(file).is_file():
            raise CheckpointError(f"{file} does not exist; write it with funasr-mooer export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.shapes = {each.name: each.shape for each in self.session.get_inputs()}  # free sizes by their names

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Inputs in the graph's order -> outputs in the graph's order."""
        given = {name: tensor.detach().cpu().numpy() for name, tensor in zip(self.shapes, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, given)]


class OnnxEncoder(nn.Module):
    """``encoder: MoEOnnxEncoder``: an exported :class:`MoEConformerEncoder`; the export writes its settings.

    Args:
        input_size: feature size F; the graph knows it too.
        file: ``encoder_full.onnx``; the graph for chunks lies beside it.
        output_size: D.
        frame_ms: stride of the output.
        factor: features per encoder frame.
        right_context: features that an encoder frame sees beyond its first one.
        causal: convolutions look back only.
        use_dynamic_chunk: trained with chunks of many sizes.
        static_chunk_size: trained with chunks of this size; 0 for none.
    """

    def __init__(
        self,
        input_size: int,
        file: str,
        output_size: int,
        frame_ms: float,
        factor: int,
        right_context: int,
        causal: bool,
        use_dynamic_chunk: bool,
        static_chunk_size: int,
    ):
        super().__init__()
        self.input_size, self.output_size, self.frame_ms = input_size, output_size, frame_ms
        self.factor, self.right_context, self.causal = factor, right_context, causal
        self.use_dynamic_chunk, self.static_chunk_size = use_dynamic_chunk, static_chunk_size
        self.whole = OnnxGraph(file)
        self.chunk = OnnxGraph(Path(file).with_name(CHUNK_FILE)) if streams(self) else None

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Encoder frames per utterance, (B,), for feature lengths in frames, (B,)."""
        return ((lengths - self.right_context - 1 + self.factor) // self.factor).clamp(min=0)

    def forward(
        self, feats: Tensor, lengths: Tensor, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> (B, T', D), (B,); see :meth:`MoEConformerEncoder.forward`.

        Raises:
            ConfigError: ``chunk_size`` is 0, or given to an encoder that was not trained with chunks.
        """
        if chunk_size is None:
            chunk_size = self.static_chunk_size or -1
        if chunk_size == 0:
            raise ConfigError("chunk_size=0: a chunk holds at least 1 frame; -1 means the whole utterance")
        if chunk_size > 0 and not (self.use_dynamic_chunk or self.static_chunk_size):
            raise ConfigError(f"chunk_size={chunk_size}: this encoder was made for full context")
        chunks = (torch.tensor(chunk_size), torch.tensor(num_left_chunks))
        encoder_out, lengths = self.whole(self._long_enough(feats), lengths, *chunks)
        return encoder_out.to(feats.device), lengths.to(feats.device)

    def caches(self) -> tuple[Tensor, Tensor]:
        """The caches of a stream that has not begun, (L, H, 0, 2D / H) and (L, D, kernel - 1)."""
        (L, _, H, _, size), (_, _, D, context) = self.chunk.shapes["att_cache"], self.chunk.shapes["cnn_cache"]
        return torch.zeros(L, H, 0, size), torch.zeros(L, D, context)

    def forward_streams(
        self, xs: Tensor, lengths: Tensor, offsets: Tensor, cached: Tensor, att_cache: Tensor, cnn_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next chunk of several streams; see :meth:`MoEConformerEncoder.forward_streams`."""
        found = self.chunk(self._long_enough(xs), lengths, offsets, cached, att_cache, cnn_cache)
        return tuple(tensor.to(xs.device) for tensor in found)

    def _long_enough(self, feats: Tensor) -> Tensor:
        """Padded to what one encoder frame needs."""
        return nn.functional.pad(feats, (0, 0, 0, max(0, self.right_context + 1 - feats.shape[1])))


def streams(encoder: nn.Module) -> bool:
    """Whether an encoder takes audio in chunks."""
    return encoder.causal and bool(encoder.use_dynamic_chunk or encoder.static_chunk_size)


class OnnxDecoder(nn.Module):
    """``decoder: MoEOnnxDecoder``: an exported attention decoder, or the two of U2++.

    Args:
        vocab_size: V; the graph knows it too.
        encoder_output_size: D; the graph knows it too.
        file: ``decoder.onnx``; a right-to-left one lies beside it.
    """

    def __init__(self, vocab_size: int, encoder_output_size: int, file: str):
        super().__init__()
        self.vocab_size, self.encoder_output_size = vocab_size, encoder_output_size
        backwards = Path(file).with_name(RIGHT_FILE)
        self.left_to_right = OnnxDirection(file)
        self.right_to_left = OnnxDirection(backwards) if backwards.is_file() else None


class OnnxDirection:
    """One decoder: scores tokens that are known, and goes on token by token for the attention search.

    Args:
        file: its graph.
    """

    def __init__(self, file: str | Path):
        self.graph = OnnxGraph(file)

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        """(B, T', D), (B,), (R, N) -> logits (R, N, V); see :meth:`MoETransformerDecoder.forward`."""
        candidates = tokens.unflatten(0, (len(encoder_out), -1))  # (B, C, N)
        (logits,) = self.graph(encoder_out, encoder_lengths, candidates)
        return logits.flatten(0, 1).to(encoder_out.device)

    def start(self, encoder_out: Tensor, encoder_lengths: Tensor) -> TokensSoFar:
        """What is known before the first token."""
        return TokensSoFar(encoder_out, encoder_lengths)

    def step(self, tokens: Tensor, cache: TokensSoFar) -> Tensor:
        """Log probabilities of the next token, (R, V); the graph reads all tokens again, N steps cost N * N."""
        cache.tokens = tokens[:, None] if cache.tokens is None else torch.cat((cache.tokens, tokens[:, None]), dim=1)
        logits = self(cache.encoder_out, cache.encoder_lengths, cache.tokens, torch.empty(0))
        return logits[:, -1].log_softmax(dim=-1, dtype=torch.float32)


@dataclasses.dataclass
class TokensSoFar:
    """The attention search between two tokens.

    Attributes:
        encoder_out: (B, T', D).
        encoder_lengths: (B,).
        tokens: (R, N) beginning with the start symbol, or None before it.
    """

    encoder_out: Tensor
    encoder_lengths: Tensor
    tokens: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (R,)."""
        self.tokens = self.tokens[rows]
