"""One change of the weights, by the mean loss over all labelled tokens of its batches on all processes.

One large batch, accumulated batches, and batches on several processes give the same gradient.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from funasr_mooer import device as devices
from funasr_mooer.errors import TrainingError
from funasr_mooer.mooer.flops import Flops
from funasr_mooer.train.engine import Engine
from funasr_mooer.train.figures import Batch, Sums, batch_flops, first, loss_weight, weighted_rows

log = logging.getLogger(__name__)


class Updater:
    """Makes updates; everything random in one is seeded by (seed, update, process).

    So the generators' states need not be saved to resume: nothing that happens between two updates matters.

    Args:
        model: the model, for its objective.
        engine: forward, backward and optimiser.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, engine: Engine, seed: int):
        self.model, self.engine, self.seed = model, engine, seed
        self.flops: Flops | None = None  # of the model as this stage trains it
        self.checked = False  # that model and loader count alike

    def make(self, step: int, group: Sequence[Batch], rate: float, wait_s: float, asked: bool) -> tuple[Sums, bool]:
        """Make update number ``step + 1``.

        Args:
            step: updates made before.
            group: this process's batches.
            rate: share of the full learning rates.
            wait_s: seconds for which the batches were waited for.
            asked: whether this process was asked to stop.

        Returns:
            the update's figures, and whether any process was asked to stop.

        Raises:
            TrainingError: a loss or the gradient is not finite (no weight has changed), or memory ran out.
        """
        engine = self.engine
        weights = [loss_weight(self.model, batch) for batch in group]
        total = engine.sum(torch.tensor(float(sum(weights)), device=engine.device)).clamp(min=1.0)
        devices.seed_all(update_seed(self.seed, step, engine.rank))
        for param_group in engine.optimizer.param_groups:
            param_group["lr"] = param_group["full_lr"] * rate
        stats = []
        for number, (batch, weight) in enumerate(zip(group, weights, strict=True), 1):
            with memory_error(step + 1, batch, engine):
                loss, found, counted = engine.micro_step(batch.inputs, weight / total, last=number == len(group))
            stats.append({**found, "loss": loss})
            if not self.checked:
                check_count(int(counted), weight)
                self.checked = True
        sums, stop = self._add_up(step + 1, group, weights, stats, wait_s, asked)
        with memory_error(step + 1, group[-1], engine):
            engine.step()
        return sums, stop

    def _add_up(
        self,
        number: int,
        group: Sequence[Batch],
        weights: Sequence[int],
        stats: Sequence[dict[str, Tensor]],
        wait_s: float,
        asked: bool,
    ) -> tuple[Sums, bool]:
        """Figures of the update over all processes: read from the device once, checked before a weight changes."""
        engine = self.engine
        norm = engine.gradient_norm()
        names, own_stats = weighted_rows(stats, weights)
        own = [float(asked), sum(weights), sum(b.audio_s for b in group), sum(b.frames for b in group)]
        own += [sum(b.padded_frames for b in group), wait_s / engine.world]
        own += [sum(batch_flops(self.model, self.flops, b) for b in group)]
        values = torch.cat([torch.tensor(own, dtype=torch.float64, device=own_stats.device), own_stats])
        stop, weight, audio_s, frames, padded, wait_s, flops, *found = engine.sum(values).tolist()
        sums = Sums(weight, dict(zip(names, found, strict=True)), audio_s, frames, padded, wait_s, flops, float(norm))
        if not math.isfinite(sums.stats["loss"]) or not math.isfinite(sums.norm):
            bad = [u for b, each in zip(group, stats, strict=True) if not each["loss"].isfinite() for u in b.utt_ids]
            bad = [utt_id for utt_ids in engine.gather(bad) for utt_id in utt_ids]
            what = (
                f"the loss is not a number; its batch: {first(bad)}" if bad else f"the gradient's norm is {sums.norm}"
            )
            raise TrainingError(
                f"step {number}: {what}. No checkpoint holds this; look at these utterances, lower optim.lr or set "
                "clip, and run the same command again"
            )
        return sums, stop > 0


@contextlib.contextmanager
def memory_error(number: int, batch: Batch, engine: Engine) -> Iterator[None]:
    """Name the batch for which memory ran out; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        size = f"{len(batch.utt_ids)} utterances, {batch.audio_s:.0f} s, {batch.padded_frames} frames with padding"
        raise TrainingError(
            f"step {number}: out of memory on {engine.device} for a batch of {size} ({first(batch.utt_ids)}); "
            "lower the batch budget in dataset_conf (and raise accum to make up for it), or switch on gradient "
            "checkpointing"
        ) from error


def check_count(counted: int, weight: int) -> None:
    """Warn if model and loader disagree about the number of labelled tokens."""
    if weight and counted != weight:
        log.warning("the model counts %d labelled tokens, the loader %d, by which losses are weighted", counted, weight)


def update_seed(seed: int, step: int, rank: int) -> int:
    """Seed of everything random in one update on one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
