"""What a batch is to the loop, and how figures are averaged: by labelled tokens, over batches and processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from funasr_mooer.mooer.flops import Flops
from funasr_mooer.train.engine import Engine


class Batch(Protocol):
    """What the loop reads of a batch; see :mod:`funasr_mooer.data.batch`."""

    inputs: dict[str, Any]  # arguments of the model
    weight: int  # labelled tokens
    audio_s: float
    frames: int  # without padding
    padded_frames: int
    utt_ids: list[str]


class Loader(Protocol):
    """Batches of a corpus, the same number for each process; see :mod:`funasr_mooer.data.loader`."""

    def steps(self, epoch: int, world: int) -> int:
        """Batches that each of ``world`` processes gets in this epoch."""

    def epoch(self, epoch: int, *, rank: int, world: int, start_batch: int) -> Iterable[Batch]:
        """The batches of one process when all together had ``start_batch`` of the epoch before."""


@dataclass
class Sums:
    """Figures added up over updates and processes.

    Attributes:
        weight: labelled tokens.
        stats: each of the model's statistics, times the weight of its batch.
        audio_s: seconds of audio.
        frames: feature frames.
        padded_frames: the same with padding.
        wait_s: seconds that a process waited for data.
        flops: floating point operations, see :mod:`funasr_mooer.mooer.flops`; 0 where they are not known.
        norm: the last gradient norm.
    """

    weight: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)
    audio_s: float = 0.0
    frames: float = 0.0
    padded_frames: float = 0.0
    wait_s: float = 0.0
    flops: float = 0.0
    norm: float = 0.0

    def add(self, other: Sums) -> None:
        """Add the figures of another update."""
        for name, value in other.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + value
        for name in (f.name for f in fields(self) if f.name not in ("stats", "norm")):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.norm = other.norm

    def report(self, seconds: float) -> dict[str, float]:
        """Figures for one line of the log, about ``seconds`` of training."""
        seconds = max(seconds, 1e-9)
        return {name: value / max(1.0, self.weight) for name, value in self.stats.items()} | {
            "grad_norm": self.norm,
            "audio_s_per_s": self.audio_s / seconds,
            "tokens_per_s": self.weight / seconds,
            "tflops": self.flops / seconds / 1e12,
            "data_wait": self.wait_s / seconds,
            "padding": 1 - self.frames / max(1.0, self.padded_frames),
        }


def loss_weight(model: nn.Module, batch: Batch) -> int:
    """Labelled tokens of a batch: of the answers, or of the transcripts where the objective is a CTC loss."""
    lengths = batch.inputs.get("transcript_lengths")
    if lengths is not None and str(getattr(model, "objective", "")).endswith("ctc"):
        return int(lengths.sum())
    return int(batch.weight)


def batch_flops(model: nn.Module, flops: Flops | None, batch: Batch) -> float:
    """Floating point operations of one batch without its padding; 0 where they are not known."""
    if flops is None:
        return 0.0
    frames = batch.frames * model.features.frame_ms / model.encoder.frame_ms
    audio = batch.frames * model.features.frame_ms / model.adapter.granularity_ms
    if model.objective != "llm":
        return flops.step(frames, audio, 0, 0)
    tokens = int(batch.inputs["attention_mask"].sum()) - len(batch.utt_ids)
    return flops.step(frames, audio, audio + tokens, batch.weight)


def weighted_rows(stats: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> tuple[list[str], Tensor]:
    """Names of the statistics and, per name, their sum over batches times weight; batches of weight 0 count nothing.

    Returns:
        names, sorted; and sums in float64, (names,).
    """
    names = sorted(stats[0])
    rows = torch.stack([torch.stack([each[name].double() for name in names]) for each in stats])  # (batches, names)
    counts = torch.tensor(weights, dtype=torch.float64, device=rows.device)[:, None]
    return names, torch.where(counts > 0, rows * counts, 0.0).sum(0)


def weighted_means(stats: Sequence[Mapping[str, Tensor]], weights: Sequence[int], engine: Engine) -> dict[str, float]:
    """Means of statistics per labelled token, over all batches of all processes; a process may have no batch."""
    names, sums = weighted_rows(stats, weights) if stats else ([], None)
    names = next((own for own in engine.gather(names) if own), [])
    if sums is None:
        sums = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
    total, *values = engine.sum(torch.cat([sums.new_tensor([sum(weights)]), sums])).tolist()
    return {name: value / max(1.0, total) for name, value in zip(names, values, strict=True)}


def first(utt_ids: Sequence[str], count: int = 8) -> str:
    """The first few ids, and how many more there are."""
    more = f" (and {len(utt_ids) - count} more)" if len(utt_ids) > count else ""
    return ", ".join(utt_ids[:count]) + more
