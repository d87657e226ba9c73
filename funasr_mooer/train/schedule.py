"""The learning rate over a stage: a warm-up, then a shape. Pure functions of the update's number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError

TYPES = ("log", "linear", "cosine", "constant", "warmuplr")


@dataclass(frozen=True)
class ScheduleConf:
    """How the learning rate moves during a stage.

    Attributes:
        type: ``log`` (DeepSpeed's WarmupDecayLR as MooER used it: logarithmic warm-up, then linear decay),
            ``linear`` and ``cosine`` (linear warm-up, then that decay), ``constant`` (linear warm-up only), or
            ``warmuplr`` (FunASR's and WeNet's: linear warm-up, then the inverse square root).
        warmup_steps: updates until the full rate is reached.
        total_steps: update at which the decay ends; None takes the length of the stage.
        floor: share of the full rate at which the decay ends.
    """

    type: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ConfigError(f"schedule.type: '{self.type}' is not known{suggest(self.type, TYPES)}")
        if self.warmup_steps < 0 or not 0 <= self.floor <= 1:
            raise ConfigError(f"schedule: warmup_steps={self.warmup_steps} must be >= 0, floor={self.floor} in [0, 1]")
        if self.type == "warmuplr" and self.warmup_steps == 0:
            raise ConfigError("schedule: type warmuplr needs warmup_steps > 0")


def factor(conf: ScheduleConf, update: int, total: int) -> float:
    """Share of the full learning rate with which update number ``update`` (from 1) is made.

    Args:
        conf: the shape.
        update: 1 for the first update of the stage.
        total: updates in the stage; ``conf.total_steps`` goes before it.
    """
    warmup, total = conf.warmup_steps, conf.total_steps or total
    if conf.type == "warmuplr":
        return min(update / warmup, math.sqrt(warmup / update))
    if update < warmup:
        # With ``log`` the first update has rate 0, as in DeepSpeed.
        return math.log(update) / math.log(warmup) if conf.type == "log" else update / warmup
    if conf.type == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if conf.type == "cosine" else 1 - progress
    return conf.floor + (1 - conf.floor) * remaining
