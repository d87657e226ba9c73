"""Several corpora in one training: how often each is shown, and what is asked about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from funasr_mooer.config import section, suggest
from funasr_mooer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CorpusConf:
    """One entry of ``dataset_conf.corpora``; a plain number is its weight.

    Attributes:
        weight: times that each utterance is shown per epoch: 2 shows all of them twice, 0.5 half of them, the other half in
            the next epoch, and 0 none. A corpus of H hours has the share weight * H of the epoch's sum of these.
        tasks: task -> weight, in place of ``dataset_conf.tasks``.
    """

    weight: float = 1.0
    tasks: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"dataset_conf.corpora: a corpus has the weight {self.weight}; use 0 or more")


def mix(corpora: Mapping[str, Any] | None, packs: Sequence[Path]) -> list[CorpusConf]:
    """What is said about each pack: by the name of its folder, or by the last parts of its path; default is weight 1.

    Args:
        corpora: ``dataset_conf.corpora``: ``{aishell2: 2, wenetspeech/train: {weight: 0.5, tasks: {asr: 1}}}``.
        packs: folders.

    Raises:
        ConfigError: a name that fits no pack, or several, or two names for one pack.
    """
    found = [CorpusConf() for _ in packs]
    named: dict[int, str] = {}
    for name, values in (corpora or {}).items():
        parts = Path(str(name)).parts
        fitting = [k for k, pack in enumerate(packs) if pack.resolve().parts[-len(parts) :] == parts]
        if not fitting:
            known = {pack.resolve().name for pack in packs}
            raise ConfigError(f"dataset_conf.corpora.{name}: no pack ends like that{suggest(name, known)}")
        if len(fitting) > 1:
            where = ", ".join(str(packs[k]) for k in fitting)
            raise ConfigError(f"dataset_conf.corpora.{name}: fits {where}; write more of the path")
        if fitting[0] in named:
            raise ConfigError(f"dataset_conf.corpora: {named[fitting[0]]} and {name} are one pack; keep one of them")
        named[fitting[0]] = name
        values = {"weight": values} if isinstance(values, (int, float)) else values
        found[fitting[0]] = section(CorpusConf, values, f"dataset_conf.corpora.{name}")
    return found


def shares(hours: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The part of an epoch's audio that each corpus has."""
    shown = [hour * weight for hour, weight in zip(hours, weights, strict=True)]
    return [each / max(sum(shown), 1e-9) for each in shown]
