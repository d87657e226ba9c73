"""Which frames are speech, and which frames a frame may look at.

All masks are boolean and True where something is valid or visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funasr_mooer.errors import ConfigError

MAX_CHUNK = 25  # encoder frames; the longest chunk drawn in U2 training, WeNet's value


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths in frames -> (B, size), True on the frames that belong to the utterance."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def speech_mask(lengths: Tensor, size: int) -> Tensor | None:
    """:func:`padding_mask`, or on a CPU None where nothing is padding, which saves work.

    An accelerator always gets the mask: to look into it, the host would wait for all that the device still has to do.
    """
    speech = padding_mask(lengths, size)
    return None if lengths.device.type == "cpu" and bool(speech.all()) else speech


def chunk_mask(
    size: int, chunk_size: int, num_left_chunks: int = -1, device: torch.device | str | None = None
) -> Tensor:
    """(size, size): row i is True on the frames that frame i sees when audio comes in chunks.

    A frame sees its own chunk to the end and ``num_left_chunks`` chunks before it.

    Args:
        size: number of frames.
        chunk_size: frames per chunk, at least 1.
        num_left_chunks: chunks of history; negative means all of it.
        device: where the mask is made.

    Raises:
        ConfigError: ``chunk_size`` is less than 1.
    """
    if chunk_size < 1:
        raise ConfigError(f"chunk_size={chunk_size}: a chunk holds at least 1 frame; -1 means the whole utterance")
    chunk = torch.arange(size, device=device) // chunk_size
    distance = chunk[:, None] - chunk  # chunks from the looking frame (row) back to the seen one (column)
    visible = distance >= 0
    return visible if num_left_chunks < 0 else visible & (distance <= num_left_chunks)


def draw_chunk(size: int, dynamic_left: bool = False, max_chunk: int = MAX_CHUNK) -> tuple[int, int]:
    """Draw (chunk_size, num_left_chunks) for one training batch of ``size`` frames, as in U2 (arXiv 2012.05481).

    About half of the draws are the whole utterance, the others 1 to ``max_chunk`` frames. Torch's global
    generator is used, and as WeNet uses it, so that equal seeds give equal chunks.
    """
    if size < 2:
        return max(size, 1), -1
    chunk = int(torch.randint(1, size, (1,)))
    if chunk > size // 2:
        return size, -1
    chunk = chunk % max_chunk + 1
    most = (size - 1) // chunk
    if not dynamic_left or most == 0:
        return chunk, -1
    return chunk, int(torch.randint(0, most, (1,)))


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean (B, T or 1, T) -> (B, 1, T or 1, T) to add to attention scores: 0 where visible.

    Hidden places get the lowest finite number instead of -inf: a row that sees nothing (a padding frame
    far from the speech) then has a meaningless but finite result, and no NaN reaches a gradient.
    """
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest).unsqueeze(1)
