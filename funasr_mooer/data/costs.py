"""What utterances cost of a batch's budget, computed a slice at a time: from the index, whatever its size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from funasr_mooer.data.audio import SAMPLE_RATE
from funasr_mooer.data.augment import Augment
from funasr_mooer.data.batch import TRANSCRIPT, Prompt, TaskDraw
from funasr_mooer.data.features import Features
from funasr_mooer.data.shards import Pack
from funasr_mooer.errors import ConfigError

Lengths = Callable[[np.ndarray], np.ndarray]  # samples (n,) -> audio embeddings (n,)


class Limits(Protocol):
    """What is read of :class:`~funasr_mooer.data.corpus.DatasetConf`."""

    budget_unit: str
    min_duration_s: float
    max_duration_s: float


class PackCosts:
    """What each utterance of one pack costs; 0 for those that are not trained on.

    With augmentation, the longest that an utterance can become counts; so does the longest row, over its tasks.

    Args:
        pack: the utterances.
        conf: limits and unit.
        features: the frontend.
        prompt: builds rows; None for CTC.
        draw: the tasks that an utterance may get; None for CTC.
        augment: None where audio stays as it is.
        audio_lengths: None for CTC.

    Raises:
        ConfigError: the unit is positions, and there is no LLM that reads them.
    """

    def __init__(
        self,
        pack: Pack,
        conf: Limits,
        features: Features,
        prompt: Prompt | None,
        draw: TaskDraw | None,
        augment: Augment | None,
        audio_lengths: Lengths | None,
    ):
        self.pack, self.conf, self.augment = pack, conf, augment
        self.positions = conf.budget_unit == "positions" or (conf.budget_unit == "auto" and prompt is not None)
        if self.positions and (audio_lengths is None or prompt is None):
            raise ConfigError("dataset_conf.budget_unit=positions needs a model with an LLM; use frames")
        self.num_frames, self.heard = features.num_frames, audio_lengths or features.num_frames
        self.tasks = [_Task(pack, task, draw, prompt) for task in draw.weights] if draw is not None else []
        self.answerable = _by_fields(pack, lambda fields: bool(draw.possible(fields)) if draw else TRANSCRIPT in fields)

    def __getitem__(self, rows: slice) -> np.ndarray:
        records = self.pack.records[rows]
        samples, fields = records["samples"].astype(np.int32), records["fields"]
        longest = shortest = samples
        if self.augment is not None and self.augment.changes_lengths:
            samples = samples.astype(np.int64)
            longest = -(-samples * SAMPLE_RATE // self.augment.rates[0])
            shortest = self.augment.shortest(samples)
        heard = np.asarray(self.heard(longest))
        costs = heard if self.positions else np.asarray(self.num_frames(longest))
        if self.positions:
            counts = self.pack.token_counts(rows) if any(len(task.needs) for task in self.tasks) else {}
            costs = costs + functools.reduce(np.maximum, (task.lengths(fields, counts) for task in self.tasks))
        inside = (samples >= self.conf.min_duration_s * SAMPLE_RATE) & (
            samples <= self.conf.max_duration_s * SAMPLE_RATE
        )
        inside &= self.answerable[fields]
        inside &= (heard if shortest is longest else np.asarray(self.heard(shortest))) > 0
        return np.where(inside, costs, 0)


class CorpusCosts:
    """The same for several packs, one behind the other.

    Args:
        packs: one for each pack.
    """

    def __init__(self, packs: Sequence[PackCosts]):
        self.packs = packs
        self.ends = np.cumsum([len(each.pack) for each in packs])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces, begin = [np.zeros(0, np.int64)], 0
        for costs, end in zip(self.packs, self.ends.tolist()):
            rows = slice(max(start - begin, 0), min(stop, end) - begin)
            if rows.start < rows.stop:
                pieces.append(costs[rows])
            begin = end
        return np.concatenate(pieces)


class _Task:
    """How long the rows of one task are."""

    def __init__(self, pack: Pack, task: str, draw: TaskDraw, prompt: Prompt):
        self.possible = _by_fields(pack, lambda fields: task in draw.possible(fields))
        self.always = bool(self.possible[1 : 1 << len(pack.fields)].all())  # utterances without any text are left out
        fields = pack.fields if self.possible.any() else []
        self.needs = [f for f in fields if task not in draw.possible([g for g in fields if g != f])]
        self.around = 0
        if self.possible.any():
            self.around = len(prompt.ids(task)) - 1 + len(prompt.answer_ids(task, {field: [] for field in self.needs}))

    def lengths(self, fields: np.ndarray, counts: dict[str, np.ndarray]) -> np.ndarray:
        """(n,) tokens of a row, 0 where an utterance cannot get the task."""
        tokens = sum((counts[field] for field in self.needs), np.int32(self.around))
        return tokens if self.always else np.where(self.possible[fields], tokens, 0)


def _by_fields(pack: Pack, judge: Callable[[list[str]], bool]) -> np.ndarray:
    """``judge(fields)`` for each value that ``fields`` of a record can have, (256,) bool."""
    table = np.zeros(256, bool)
    for bits in range(1 << len(pack.fields)):
        table[bits] = judge([field for bit, field in enumerate(pack.fields) if bits >> bit & 1])
    return table
