"""Packs -> batches for training: in which order, from where on, made ahead by worker processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from funasr_mooer.data.batch import Batch, Prompt
from funasr_mooer.data.corpus import Corpus, DatasetConf
from funasr_mooer.data.costs import Lengths
from funasr_mooer.data.device_features import DeviceFeatures
from funasr_mooer.data.features import Features
from funasr_mooer.data.kaldi_dir import check_problems
from funasr_mooer.data.mix import shares
from funasr_mooer.data.pack_format import Tokenizer
from funasr_mooer.data.sampler import NAMED, TokenBudgetSampler
from funasr_mooer.data.shards import Pack

logger = logging.getLogger(__name__)


class Loader:
    """Batches of a corpus for the training loop, from any step of any epoch, on any number of processes.

    Args:
        corpus: makes the batches.
        sampler: says which.
        pin_memory: put batches in page-locked memory (for accelerators).
        device: makes the features, with ``dataset_conf.features: device``; None is the CPU.
    """

    def __init__(
        self,
        corpus: Corpus,
        sampler: TokenBudgetSampler,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ):
        self.corpus, self.sampler = corpus, sampler
        self.bad: dict[str, None] = {}  # an ordered set
        self.on_device = None
        if corpus.conf.features == "device":
            self.on_device = DeviceFeatures(corpus.features, device or torch.device("cpu"))
        workers = corpus.conf.num_workers
        self._requests = _Requests(sampler)
        self._loader = torch.utils.data.DataLoader(
            corpus,
            batch_size=None,  # a request is a whole batch
            sampler=self._requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=corpus.conf.prefetch if workers else None,
            pin_memory=pin_memory,
        )

    def steps(self, epoch: int = 0, world: int = 1) -> int:
        """Batches that each of ``world`` processes gets; the same in every epoch."""
        return self.sampler.steps(world)

    def __len__(self) -> int:
        return self.steps()

    @property
    def worker_pids(self) -> list[int]:
        """Processes that load, once they were started."""
        return [worker.pid for worker in getattr(self._loader._iterator, "_workers", [])]

    def epoch(
        self, epoch: int = 0, start_step: int = 0, rank: int = 0, world: int = 1, start_batch: int | None = None
    ) -> Iterator[Batch]:
        """The batches of one process, without the first ``start_step``.

        Args:
            epoch: counted from 0.
            start_step: steps of this epoch that were done, at this world size.
            rank: of this process.
            world: number of processes.
            start_batch: instead of ``start_step``: batches that all processes together had done, at another world size.

        Raises:
            DataError: more than ``max_bad`` of the utterances could not be loaded.
        """
        self._requests.place = (epoch, start_step * world if start_batch is None else start_batch, rank, world)
        for batch in self._loader:
            for name in batch.bad:
                if name not in self.bad:
                    logger.warning("skipped %s", name)
                    self.bad[name] = None
            if batch.bad:
                check_problems(list(self.bad), len(self.sampler), self.corpus.conf.max_bad, "loading")
            yield batch if self.on_device is None else self.on_device(batch)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()


class _Requests(torch.utils.data.Sampler):
    """What the workers are asked for: (epoch, indices), from the place where the epoch is entered."""

    def __init__(self, sampler: TokenBudgetSampler):
        self.sampler, self.place = sampler, (0, 0, 0, 1)

    def __len__(self) -> int:
        _, start, _, world = self.place
        return self.sampler.steps(world, start)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch, start, rank, world = self.place
        return ((epoch, indices) for indices in self.sampler.rank_batches(epoch, rank, world, start))


def build_loader(
    conf: DatasetConf,
    packs: Sequence[Pack | str | os.PathLike],
    features: Features,
    tokenizer: Tokenizer,
    prompt: Prompt | None = None,
    audio_lengths: Lengths | None = None,
    *,
    seed: int = 0,
    training: bool = True,
    pin_memory: bool = False,
    with_languages: bool = False,
    device: torch.device | None = None,
) -> Loader:
    """Everything between packs and the training loop, in one call.

    Args:
        conf: the section ``dataset_conf``.
        packs: packs or their folders.
        features: the model's frontend.
        tokenizer: the model's.
        prompt: the model's; None makes batches for CTC.
        audio_lengths: samples (n,) -> audio embeddings (n,); ``model.audio_lengths``. None for CTC.
        seed: of order, tasks and augmentation.
        training: False: no augmentation, no shuffling, every utterance once (validation).
        pin_memory: for accelerators.
        with_languages: batches say the language of each utterance; see :class:`Corpus`.
        device: where the model is; makes features if ``conf.features`` says so.

    Raises:
        DataError: a folder that is not a pack, or was packed with another tokenizer.
        ConfigError: settings that leave nothing to train on.
    """
    corpus = Corpus(conf, packs, features, tokenizer, prompt, seed, training, with_languages)
    return Loader(corpus, build_sampler(corpus, audio_lengths, seed), pin_memory, device)


def build_sampler(corpus: Corpus, audio_lengths: Lengths | None, seed: int = 0) -> TokenBudgetSampler:
    """The order of a corpus; logs what is left out and why."""
    conf = corpus.conf
    sampler = TokenBudgetSampler(
        corpus.costs(audio_lengths),
        conf.budget,
        conf.window,
        conf.max_utts,
        seed,
        groups=[(len(pack), each.weight) for pack, each in zip(corpus.packs, corpus.mix)],
        length_multiple=1 if conf.packing else conf.length_multiple,
        shuffle=corpus.training,
        ascending_epochs=conf.ascending_epochs,
        packed=conf.packing,
    )
    _log(corpus, sampler)
    return sampler


def _log(corpus: Corpus, sampler: TokenBudgetSampler) -> None:
    """What an epoch holds, and what is left out and why."""
    hours, conf = [pack.hours for pack in corpus.packs], corpus.conf
    line = f"{'data':12} {'train' if corpus.training else 'dev'} {len(sampler)} utts of {sum(hours):.2f} h"
    if sampler.left_out:
        names = ", ".join(map(corpus.utt_id, sampler.left_out_first))
        line += (
            f" | skipped {sampler.left_out} (outside {conf.min_duration_s:g}-{conf.max_duration_s:g} s, too short to be "
            f"heard, or without text for any task): {names}{', ...' if sampler.left_out > NAMED else ''}"
        )
    logger.info(line)
    weights = [each.weight for each in corpus.mix]
    for pack, hour, weight, share in zip(corpus.packs, hours, weights, shares(hours, weights)):
        if corpus.training and conf.corpora:
            logger.info("%-12s %s %.2f h x %g: %.1f %% of an epoch", "corpus", pack.path, hour, weight, 100 * share)
