"""Several packs as one list of utterances, of which any few are made into a batch."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from funasr_mooer.config import check_least
from funasr_mooer.data.audio import SAMPLE_RATE
from funasr_mooer.data.augment import Augment, AugmentConf
from funasr_mooer.data.batch import TRANSCRIPT, Batch, Example, Prompt, TaskDraw, collate
from funasr_mooer.data.costs import CorpusCosts, Lengths, PackCosts
from funasr_mooer.data.features import Features
from funasr_mooer.data.mix import CorpusConf, mix
from funasr_mooer.data.pack_format import Tokenizer
from funasr_mooer.data.shards import Pack
from funasr_mooer.errors import ConfigError, DataError

SUBSTITUTES = 20  # neighbours tried in place of an utterance that cannot be loaded


@dataclasses.dataclass(frozen=True)
class DatasetConf:
    """``dataset_conf``.

    Attributes:
        tasks: task -> weight, of those in ``prompt_conf``; None draws all alike. Each utterance gets one task per epoch.
        budget: most that a batch may hold on each process, padding included, in ``budget_unit``.
        budget_unit: ``positions`` that the LLM reads (audio embeddings, prompt and answer), or ``frames`` of the frontend;
            ``auto`` is positions for MooER and frames for CTC.
        packing: put the texts and audio embeddings of a batch into one row of the LLM, without padding; its attention
            keeps utterances apart. ``budget`` is then the length of the row. Not for CTC.
        max_utts: most utterances in a batch.
        window: most neighbours in length among which utterances are shuffled.
        ascending_epochs: epochs at the start that go from the shortest batches to the longest; 1 helps CTC from nothing.
        min_duration_s: shorter utterances are left out.
        max_duration_s: longer utterances are left out; MooER was trained on up to 20 s.
        corpora: how often packs are shown and with which tasks; see :class:`~funasr_mooer.data.mix.CorpusConf`.
        length_multiple: padded lengths are multiples of this, so that few shapes occur; CPU kernels like 8 or 16.
        augment: see :class:`~funasr_mooer.data.augment.AugmentConf`.
        features: who makes them: ``worker``; or ``device``, where workers ship 16-bit samples and the model's device makes
            the features of a whole batch, which leaves the CPU almost nothing to do.
        num_workers: processes that load; 0 loads in the training process.
        prefetch: batches that each of them keeps ready.
        max_bad: stop when more than this fraction of the utterances cannot be loaded.
        dataloader: read by FunASR's trainer.
        batch_sampler: read by FunASR's trainer.
        data_split_num: read by FunASR's trainer; packs need no splitting.
    """

    tasks: Mapping[str, float] | None = None
    budget: int = 8000
    budget_unit: str = "auto"
    packing: bool = False
    max_utts: int = 256
    window: int = 2000
    ascending_epochs: int = 0
    min_duration_s: float = 0.1
    max_duration_s: float = 40.0
    corpora: Mapping | None = None
    length_multiple: int = 1
    augment: AugmentConf = dataclasses.field(default_factory=AugmentConf)
    features: str = "worker"
    num_workers: int = 2
    prefetch: int = 4
    max_bad: float = 0.01
    dataloader: str = "MooerDataloader"
    batch_sampler: str = "MooerBatchSampler"
    data_split_num: int = 1

    def __post_init__(self) -> None:
        if self.budget_unit not in ("auto", "positions", "frames"):
            raise ConfigError(f"dataset_conf.budget_unit={self.budget_unit}; use auto, positions or frames")
        if self.features not in ("worker", "device"):
            raise ConfigError(f"dataset_conf.features={self.features}; use worker or device")
        check_least(self, "dataset_conf", budget=1, max_utts=1, window=1, length_multiple=1, prefetch=1, num_workers=0)
        if self.packing and self.budget_unit == "frames":
            raise ConfigError("dataset_conf.packing: a row is filled with positions; set budget_unit: positions")


class Corpus(torch.utils.data.Dataset):
    """Several packs as one list of utterances; makes a batch of any of them.

    Args:
        conf: the section ``dataset_conf``.
        packs: packs or their folders.
        features: the frontend.
        tokenizer: of the LLM; must be the one that made the packs.
        prompt: builds rows for MooER; None makes batches for CTC.
        seed: of task drawing and augmentation.
        training: False leaves augmentation out.
        with_languages: batches say the language of each utterance, as an index into ``languages``.

    Attributes:
        languages: of the packs' manifests, after '' for utterances without one.

    Raises:
        DataError: a folder that is not a pack, or was packed with another tokenizer.
        ConfigError: tasks or weights that do not fit.
    """

    def __init__(
        self,
        conf: DatasetConf,
        packs: Sequence[Pack | str | os.PathLike],
        features: Features,
        tokenizer: Tokenizer,
        prompt: Prompt | None,
        seed: int = 0,
        training: bool = True,
        with_languages: bool = False,
    ):
        if not packs:
            raise ConfigError("no packs to read; give at least one folder written by funasr_mooer.bin.pack")
        if conf.packing and prompt is None:
            raise ConfigError("dataset_conf.packing: needs a model with an LLM, whose rows are packed; remove it")
        self.conf, self.features, self.prompt = conf, features, prompt
        self.packs = [pack if isinstance(pack, Pack) else Pack(pack) for pack in packs]
        for pack in self.packs:
            pack.check_tokenizer(tokenizer)
        self.pad_id = tokenizer.pad_id
        self.ends = list(itertools.accumulate(map(len, self.packs)))
        self.mix = mix(conf.corpora, [pack.path for pack in self.packs]) if training else [CorpusConf()] * len(packs)
        tasks = [each.tasks or conf.tasks for each in self.mix]
        self.draws = [None if prompt is None else TaskDraw(prompt, weights, seed) for weights in tasks]
        self.augment = None
        if training:
            self.augment = Augment(conf.augment, seed, features.conf.n_mels, features.frame_ms)
        self.training, self.with_languages = training, with_languages
        self.languages = ["", *sorted({lang for pack in self.packs for lang in pack.langs if lang})]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch:
        """The batch of ``(epoch, utterance indices)``; a bad utterance is named in it and a neighbour takes its place."""
        epoch, indices = request
        bad: list[str] = []
        examples = [self._load_or_neighbour(index, epoch, bad) for index in indices.tolist()]
        batch = collate(
            examples,
            self.features,
            self.prompt,
            self.pad_id,
            epoch,
            self.augment,
            self.conf.length_multiple,
            self.conf.packing,
            self.conf.features == "device",
        )
        batch.bad = bad
        return batch

    def utt_id(self, index: int) -> str:
        """Name of an utterance."""
        number, i = self._locate(index)
        return self.packs[number].utt_id(i)

    def tokens(self, index: int) -> dict[str, np.ndarray]:
        """Field -> token ids of an utterance."""
        number, i = self._locate(index)
        return self.packs[number].tokens(i)

    def samples(self) -> np.ndarray:
        """(n,) samples of every utterance at 16 kHz, int64."""
        return np.concatenate([pack.records["samples"] for pack in self.packs]).astype(np.int64)

    def costs(self, audio_lengths: Lengths | None) -> CorpusCosts:
        """What each utterance costs of the budget; 0 for those that are not trained on."""
        given = (self.conf, self.features, self.prompt)
        return CorpusCosts(
            [
                PackCosts(pack, *given, draw, self.augment, audio_lengths)
                for pack, draw in zip(self.packs, self.draws, strict=True)
            ]
        )

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the pack, and of the utterance in it."""
        number = bisect.bisect_right(self.ends, index)
        return number, index - (self.ends[number - 1] if number else 0)

    def _load(self, index: int, epoch: int) -> Example:
        number, i = self._locate(index)
        pack, draw = self.packs[number], self.draws[number]
        tokens = pack.tokens(i)
        if not (TRANSCRIPT in tokens if draw is None else draw.possible(tokens)):
            raise DataError("has no text for any task")
        task = "" if draw is None else draw(tokens, epoch, index)
        language = self.languages.index(pack.lang(i)) if self.with_languages else None
        return Example(pack.utt_id(i), index, pack.samples(i), tokens, task, language)

    def _load_or_neighbour(self, index: int, epoch: int, bad: list[str]) -> Example:
        """The utterance, or, where it cannot be loaded, one that is not longer."""
        try:
            return self._load(index, epoch)
        except DataError as error:
            bad.append(f"utterance {index}: {error}")
        number, i = self._locate(index)
        pack = self.packs[number]
        limit, count = pack.records["samples"][i], len(pack)
        for step in range(1, count):
            j = (i + step) % count
            if min(limit, SAMPLE_RATE // 2) <= pack.records["samples"][j] <= limit:
                try:
                    return self._load(index - i + j, epoch)
                except DataError as error:
                    bad.append(f"utterance {index - i + j}: {error}")
            if len(bad) > SUBSTITUTES:
                break
        raise DataError(f"{pack.path}: {bad[0]}; and no utterance could take its place")
