"""Measuring on the dev set: the loss per labelled token, and error rates of a decoded sample."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from funasr_mooer import device as devices
from funasr_mooer.train.engine import Engine
from funasr_mooer.train.figures import Loader, loss_weight, weighted_means
from funasr_mooer.train.progress import Decoded
from funasr_mooer.train.update import memory_error


class DecodeSample(Protocol):
    """Decodes a sample of the dev set."""

    def __call__(self, model: nn.Module, rank: int, world: int) -> Sequence[Decoded]:
        """The answers of this process's share."""

    def score(self, texts: Sequence[Decoded]) -> Mapping[str, float]:
        """Error rates in per cent, BLEU: of the whole sample."""


@torch.no_grad()
def validate(
    model: nn.Module, engine: Engine, dev: Loader | None, decode: DecodeSample | None, limit: int | None, step: int
) -> tuple[dict[str, float], list[Decoded]]:
    """Loss, the model's other statistics, and error rates of a decoded sample; the same on every process.

    Args:
        model: measured in evaluation mode, and left in training mode.
        engine: processes and device.
        dev: None measures no loss.
        decode: None measures no error rate.
        limit: batches per process; None for all.
        step: for messages.

    Returns:
        the figures, and the sample by task and utterance.
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
    texts: list[Decoded] = []
    if decode is not None:
        # Answers differ in length. Where a step of one process needs the others' shares, all decode the same.
        share = (0, 1) if engine.splits_parameters else (engine.rank, engine.world)
        with compiling_nothing():
            answers = list(decode(model, *share))
        shares = engine.gather(answers)
        texts = sorted({(text.task, text.utt_id): text for own in shares for text in own}.values())
        metrics |= decode.score(texts)
    model.train()
    return metrics, texts


def compiling_nothing() -> contextlib.AbstractContextManager:
    """Inside, layers run as they are where they were not compiled before: decoding meets too many shapes."""
    stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return stance("eager_on_recompile") if stance else contextlib.nullcontext()
