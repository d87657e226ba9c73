"""Measuring on the dev set: the loss per labelled token, and error rates of a decoded sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from funasr_mooer import device as devices
from funasr_mooer.train.engine import Engine
from funasr_mooer.train.figures import Loader, loss_weight, weighted_means
from funasr_mooer.train.update import memory_error

# (model, rank, world) -> {"cer": (errors, reference tokens)} of this process's share of the sample.
DecodeSample = Callable[[nn.Module, int, int], Mapping[str, tuple[float, float]]]


@torch.no_grad()
def validate(
    model: nn.Module, engine: Engine, dev: Loader | None, decode: DecodeSample | None, limit: int | None, step: int
) -> dict[str, float]:
    """Loss, the model's other statistics, and error rates in per cent; the same numbers on every process.

    Args:
        model: measured in evaluation mode, and left in training mode.
        engine: processes and device.
        dev: None measures no loss.
        decode: None measures no error rate.
        limit: batches per process; None for all.
        step: for messages.
    """
    model.eval()
    stats, weights = [], []
    batches = dev.epoch(0, rank=engine.rank, world=engine.world, start_batch=0) if dev is not None else ()
    for number, batch in enumerate(batches):
        if limit is not None and number >= limit:
            break
        with memory_error(step, batch, engine), devices.autocast(engine.device, engine.dtype):
            loss, found, _ = model(**engine.move(batch.inputs))
        stats.append({**found, "loss": loss})
        weights.append(loss_weight(model, batch))
    metrics = weighted_means(stats, weights, engine) if dev is not None else {}
    if decode is not None:
        counts = decode(model, engine.rank, engine.world)
        pairs = torch.tensor([list(pair) for pair in counts.values()], dtype=torch.float64, device=engine.device)
        for name, (errors, length) in zip(counts, engine.sum(pairs).tolist(), strict=True):
            metrics[name] = 100 * errors / max(1.0, length)
    model.train()
    return metrics
