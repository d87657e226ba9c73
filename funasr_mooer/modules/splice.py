"""Put audio embeddings where the prompt has its audio placeholders.

Shapes: B rows, L tokens per row, A audios in all, U embeddings per audio, S spliced positions, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
AUDIO_ID = -1  # in input_ids: "one audio goes here"; never looked up in the embedding table


class Spliced(NamedTuple):
    """What the LLM reads: embeddings (B, S, D), validity mask (B, S) bool; labels and segments (B, S) or None."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    segments: Tensor | None = None


def splice_audio(
    input_ids: Tensor,
    attention_mask: Tensor,
    embeds: Tensor,
    audio_embeds: Tensor,
    audio_lengths: Tensor,
    labels: Tensor | None = None,
    padding_side: str = "right",
    segments: Tensor | None = None,
) -> Spliced:
    """Replace each ``AUDIO_ID`` by the embeddings of one audio, the i-th placeholder by the i-th audio.

    The number of placeholders must equal the number of audios. How many positions an audio takes is
    read from ``audio_lengths`` alone, so prompt and adapter cannot disagree.

    Args:
        input_ids: (B, L), ``AUDIO_ID`` where an audio goes.
        attention_mask: (B, L), true at tokens, false at padding; padding may be anywhere.
        embeds: (B, L, D) embeddings of ``input_ids``; those at placeholders and padding are not used.
        audio_embeds: (A, U, D).
        audio_lengths: (A,) valid embeddings of each audio.
        labels: (B, L); positions of audio and padding get ``IGNORE_INDEX``.
        padding_side: ``right`` for training, ``left`` for generation.
        segments: (B, L) numbers of the utterances of packed rows, from 1; padding gets 0.

    Raises:
        ValueError: another number of placeholders than of audios.
    """
    B, L = input_ids.shape
    D = embeds.shape[-1]
    attention_mask = attention_mask.bool()
    is_audio = (input_ids == AUDIO_ID) & attention_mask  # (B, L)
    placeholders = int(is_audio.sum())
    if placeholders != len(audio_lengths):
        raise ValueError(f"{placeholders} audio placeholders in the prompts for {len(audio_lengths)} audios")

    widths = attention_mask.long()  # (B, L) positions that each token takes: 0 padding, 1 text, n audio
    widths = widths.masked_scatter(is_audio, audio_lengths.to(widths))
    totals = widths.sum(1)  # (B,)
    S = int(totals.max())
    starts = widths.cumsum(1) - widths  # (B, L)
    if padding_side == "left":
        starts = starts + (S - totals)[:, None]

    flat = torch.arange(B, device=input_ids.device)[:, None] * S + starts  # (B, L)
    is_text = attention_mask & ~is_audio
    out = embeds.new_zeros(B * S, D)
    out = out.index_copy(0, flat[is_text], embeds[is_text])
    inside = torch.arange(audio_embeds.shape[1], device=input_ids.device)[None] < audio_lengths[:, None]  # (A, U)
    audio_at = flat[is_audio][:, None] + torch.arange(audio_embeds.shape[1], device=input_ids.device)  # (A, U)
    out = out.index_copy(0, audio_at[inside], audio_embeds[inside].to(out.dtype))

    position = torch.arange(S, device=input_ids.device)[None]
    left = (S - totals)[:, None] if padding_side == "left" else torch.zeros_like(totals)[:, None]
    mask = (position >= left) & (position < left + totals[:, None])  # (B, S)
    if labels is not None:
        spliced = labels.new_full((B * S,), IGNORE_INDEX)
        labels = spliced.index_copy(0, flat[is_text], labels[is_text]).view(B, S)
    if segments is not None:
        numbers = segments[attention_mask].repeat_interleave(widths[attention_mask])
        segments = segments.new_zeros(B, S).masked_scatter(mask, numbers)
    return Spliced(out.view(B, S, D), mask, labels, segments)
