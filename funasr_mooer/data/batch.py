"""Utterances to one padded batch: which task each is given, and the tensors that a model takes."""

# Shapes: B rows, T feature frames, F feature size, L tokens of a row, N tokens of a transcript.

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.config import suggest
from funasr_mooer.data.audio import SAMPLE_RATE, to_float
from funasr_mooer.data.augment import Augment, Changes, change_
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.splice import IGNORE_INDEX

TRANSCRIPT = "text"  # the field that CTC objectives learn


class Prompt(Protocol):
    """What surrounds the audio; see :mod:`funasr_mooer.mooer.prompt`."""

    tasks: Mapping

    def ids(self, task: str) -> list[int]: ...

    def answer_ids(self, task: str, fields: Mapping[str, Sequence[int]]) -> list[int]: ...

    def tasks_for(self, fields: Mapping | Sequence[str]) -> list[str]: ...


@dataclasses.dataclass
class Batch:
    """What a model takes, and what the training log wants to know about it.

    Attributes:
        inputs: arguments of ``model.forward``.
        weight: labelled tokens, what the loss is averaged over.
        audio_s: seconds of audio.
        frames: feature frames without padding.
        padded_frames: feature frames with padding.
        utt_ids: a name per row.
        tasks: a task per row; empty for CTC.
        changes: what is still to be done to the features of each row, where a device will make them.
        bad: utterances that could not be loaded, with the reason; neighbours took their places.
    """

    inputs: dict[str, Tensor]
    weight: int
    audio_s: float
    frames: int
    padded_frames: int
    utt_ids: list[str]
    tasks: list[str] = dataclasses.field(default_factory=list)
    changes: list[Changes] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; DataLoader calls it."""
        return dataclasses.replace(self, inputs={name: x.pin_memory() for name, x in self.inputs.items()})

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; copies run while the device works when the memory is pinned."""
        return dataclasses.replace(self, inputs={k: x.to(device, non_blocking=True) for k, x in self.inputs.items()})


@dataclasses.dataclass
class Example:
    """One utterance, loaded.

    Attributes:
        utterance: its index in the whole corpus, for augmentation.
        waveform: (N,) int16 or float32 at 16 kHz.
        tokens: field -> token ids.
        task: what is asked; '' for CTC.
        language: a number for it, where the model counts by language.
    """

    utt_id: str
    utterance: int
    waveform: np.ndarray
    tokens: Mapping[str, np.ndarray]
    task: str = ""
    language: int | None = None


class TaskDraw:
    """Gives each utterance one task per epoch, of those whose answer it has; depends on (seed, epoch, utterance) only.

    Args:
        prompt: knows the tasks.
        weights: task -> how often relative to others; tasks that are not named are not drawn. None: all alike.
        seed: of the run.

    Raises:
        ConfigError: a task that the prompt does not have, or no positive weight.
    """

    def __init__(self, prompt: Prompt, weights: Mapping[str, float] | None = None, seed: int = 0):
        weights = dict(weights) if weights else {task: 1.0 for task in prompt.tasks}
        for task in weights:
            if task not in prompt.tasks:
                raise ConfigError(f"dataset_conf.tasks.{task}: not a task of prompt_conf{suggest(task, prompt.tasks)}")
        self.weights = {task: float(weight) for task, weight in weights.items() if weight > 0}
        if not self.weights:
            raise ConfigError("dataset_conf.tasks: give at least one task a weight above 0")
        self.prompt, self.seed = prompt, seed
        self._known: dict[tuple[str, ...], tuple[list[str], list[float]]] = {}

    def possible(self, fields: Mapping | Sequence[str]) -> list[str]:
        """Tasks that an utterance with these fields can be given."""
        return self._edges(tuple(fields))[0]

    def __call__(self, fields: Mapping | Sequence[str], epoch: int, utterance: int) -> str:
        """The task of one utterance in one epoch."""
        tasks, edges = self._edges(tuple(fields))
        return tasks[bisect.bisect_right(edges, uniform(self.seed, epoch, utterance) * edges[-1])]

    def _edges(self, fields: tuple[str, ...]) -> tuple[list[str], list[float]]:
        """Tasks, and where the share of each ends; there are few combinations of fields."""
        if fields not in self._known:
            tasks = [task for task in self.prompt.tasks_for(fields) if task in self.weights]
            self._known[fields] = tasks, list(itertools.accumulate(self.weights[task] for task in tasks))
        return self._known[fields]


def collate(
    examples: Sequence[Example],
    features: Features,
    prompt: Prompt | None,
    pad_id: int,
    epoch: int = 0,
    augment: Augment | None = None,
    multiple: int = 1,
    packed: bool = False,
    on_device: bool = False,
) -> Batch:
    """Examples -> batch for MooER, or for MooerCTC when ``prompt`` is None.

    Inputs for both: feats (B, T, F), feat_lengths (B,), transcript_ids (B, N) of the field ``text``, transcript_lengths (B,).
    For MooER also input_ids (B, L) = ``[AUDIO_ID][prompt][answer, eos]`` padded on the right, attention_mask (B, L) bool, and
    labels (B, L), which are the answer and ``IGNORE_INDEX`` elsewhere. Where examples have a language, languages (B,).

    Args:
        examples: at least one.
        features: the frontend.
        prompt: builds rows; None for CTC.
        pad_id: fills rows of tokens.
        epoch: for augmentation.
        augment: None leaves audio as it is.
        multiple: T and L are rounded up to a multiple of this.
        on_device: waves (B, N) and wave_lengths (B,) in place of feats, for :mod:`funasr_mooer.data.device_features`.
        packed: put all rows of tokens into one, (1, L), with ``segments`` (1, L) that count its utterances from 1.
    """
    waves = [e.waveform if augment is None else augment.waveform(e.waveform, epoch, e.utterance) for e in examples]
    lengths, changes = [features.num_frames(len(x)) for x in waves], []
    if augment is not None and augment.changes_features:
        changes = [augment.changes(n, epoch, e.utterance) for n, e in zip(lengths, examples)]
        lengths = [each.kept for each in changes]
    longest = -(-max(lengths) // multiple) * multiple
    if on_device:
        audio = pad_waves(waves)
    else:
        feats = features.batch(waves, multiple)[0]
        for row, each in zip(feats, changes):
            change_(row, each, features.conf.n_mels)
        audio = {"feats": feats[:, :longest]}
    transcripts = [example.tokens.get(TRANSCRIPT, ()) for example in examples]
    inputs = {
        **audio,
        "feat_lengths": torch.tensor(lengths),
        "transcript_ids": pad_rows(transcripts, pad_id),
        "transcript_lengths": torch.tensor([len(ids) for ids in transcripts]),
    }
    if examples[0].language is not None:
        inputs["languages"] = torch.tensor([example.language for example in examples])
    if prompt is None:
        weight = sum(map(len, transcripts))
    else:
        rows = token_rows(examples, prompt, pad_id, 1 if packed else multiple)
        rows = one_row(rows) if packed else rows
        weight = int((rows["labels"] != IGNORE_INDEX).sum())
        inputs.update(rows)
    return Batch(
        inputs=inputs,
        weight=weight,
        audio_s=sum(map(len, waves)) / SAMPLE_RATE,
        frames=sum(lengths),
        padded_frames=longest * len(waves),
        utt_ids=[example.utt_id for example in examples],
        tasks=[example.task for example in examples if example.task],
        changes=changes if on_device else [],
    )


def token_rows(examples: Sequence[Example], prompt: Prompt, pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, (B, L) each; see :func:`collate`."""
    prompts = [prompt.ids(example.task) for example in examples]
    texts = [{field: np.asarray(ids).tolist() for field, ids in example.tokens.items()} for example in examples]
    answers = [prompt.answer_ids(example.task, fields) for example, fields in zip(examples, texts)]
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)])
    input_ids = pad_rows([[*p, *a] for p, a in zip(prompts, answers)], pad_id, multiple)
    labels = pad_rows([[IGNORE_INDEX] * len(p) + a for p, a in zip(prompts, answers)], IGNORE_INDEX, multiple)
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def one_row(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`token_rows` gives, as one row without padding; adds ``segments``, which utterance a token is of."""
    tokens = rows["attention_mask"]  # (B, L)
    packed = {name: row[tokens][None] for name, row in rows.items()}
    return {**packed, "segments": torch.arange(1, len(tokens) + 1)[:, None].expand_as(tokens)[tokens][None]}


def pad_waves(waves: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """``waves`` (B, N), int16 if all of them are, else float32 in [-1, 1); and ``wave_lengths`` (B,) int64."""
    kind = np.int16 if all(x.dtype == np.int16 for x in waves) else np.float32
    padded = np.empty((len(waves), max(map(len, waves))), kind)
    for row, x in zip(padded, waves):
        row[: len(x)] = x if kind is np.int16 else to_float(x)
        row[len(x) :] = 0
    return {"waves": torch.from_numpy(padded), "wave_lengths": torch.tensor([len(x) for x in waves])}


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], value: int, multiple: int = 1) -> Tensor:
    """Rows of integers as (B, L) int64, filled with ``value`` on the right."""
    longest = -(-max(map(len, rows)) // multiple) * multiple
    padded = np.full((len(rows), longest), value, np.int64)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = ids
    return torch.from_numpy(padded)


def uniform(seed: int, epoch: int, utterance: int) -> float:
    """A number in [0, 1) that depends on its arguments only and costs nothing to make (splitmix64)."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + utterance * 0x94D049BB133111EB) & mask
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return (x >> 11) / (1 << 53)
