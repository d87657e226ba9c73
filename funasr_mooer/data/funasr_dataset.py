"""The data room as stock ``python -m funasr.bin.train`` wants it: a dataset, a batch sampler, a dataloader."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from funasr_mooer.config import section
from funasr_mooer.data.corpus import Corpus, DatasetConf
from funasr_mooer.data.features import Features, FrontendConf
from funasr_mooer.data.loader import build_sampler
from funasr_mooer.data.sampler import TokenBudgetSampler
from funasr_mooer.errors import ConfigError

logger = logging.getLogger(__name__)


class MooerDataset(torch.utils.data.Dataset):
    """Packs as FunASR's trainer reads a dataset: single utterances, joined by :meth:`collator`.

    Args:
        path: folder of a pack, several with commas between, or a list (``train_data_set_list``).
        index_ds: not used; packs have an index.
        frontend: FunASR's ``WavFrontend``; its settings are taken over.
        tokenizer: of the LLM.
        is_training: augmentation and shuffling.
        prompt: for MooER; None for CTC.
        audio_lengths: samples (n,) -> audio embeddings (n,), for MooER.
        seed: of order, tasks and augmentation.
        dataset_conf: see :class:`~funasr_mooer.data.corpus.DatasetConf`.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        index_ds: Any = None,
        frontend: Any = None,
        tokenizer: Any = None,
        is_training: bool = True,
        prompt: Any = None,
        audio_lengths: Callable[[np.ndarray], np.ndarray] | None = None,
        seed: int = 0,
        **dataset_conf: Any,
    ):
        if path is None:
            raise ConfigError(
                "++train_data_set_list and ++valid_data_set_list: give folders written by funasr_mooer.bin.pack"
            )
        if tokenizer is None:
            raise ConfigError("MooerDataset needs a tokenizer; for statistics use python -m funasr_mooer.bin.cmvn")
        packs = path.split(",") if isinstance(path, str) else list(path)
        conf = section(DatasetConf, _plain(dataset_conf), "dataset_conf")
        if conf.features != "worker":
            raise ConfigError(
                f"dataset_conf.features={conf.features}: FunASR's trainer knows no such thing; use worker"
            )
        features = frontend if isinstance(frontend, Features) else Features(*_settings(frontend))
        self.corpus = Corpus(conf, packs, features, tokenizer, prompt, seed, is_training)
        self.sampler: TokenBudgetSampler = build_sampler(self.corpus, audio_lengths, seed)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, int]:
        """(epoch, utterance) as it is: :meth:`collator` loads a whole batch at once."""
        return item

    def get_source_len(self, index: int) -> int:
        """Length of an utterance in 10 ms frames."""
        return int(self.corpus.samples()[index]) // 160

    def get_target_len(self, index: int) -> int:
        """Tokens of an utterance's texts."""
        return sum(map(len, self.corpus.tokens(index).values()))

    def collator(self, items: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """(epoch, utterance) pairs -> the arguments of ``model.forward``."""
        batch = self.corpus[items[0][0], np.array([index for _, index in items])]
        for name in batch.bad:
            logger.warning("skipped %s", name)
        return batch.inputs


class MooerBatchSampler(torch.utils.data.Sampler):
    """The batches of this process, as (epoch, utterance) pairs.

    FunASR writes ``DataLoader(dataset, **batch_sampler)``, so this is also the mapping of those arguments.

    Args:
        dataset: a :class:`MooerDataset`.
        is_training: not used; the dataset knows.
        start_step: steps of the first epoch that were done.
        conf: the section ``dataset_conf``, which the dataset has read already.
    """

    def __init__(self, dataset: MooerDataset, is_training: bool = True, start_step: int = 0, **conf: Any):
        self.sampler, self.start_step, self.epoch = dataset.sampler, start_step, 0
        self.rank, self.world = _rank_and_world()
        workers = dataset.corpus.conf.num_workers
        self._arguments: dict[str, Any] = {"batch_sampler": self, "num_workers": workers}
        if workers:
            self._arguments["prefetch_factor"] = dataset.corpus.conf.prefetch

    def keys(self) -> list[str]:
        """Names of the arguments for ``DataLoader``."""
        return list(self._arguments)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sampler.steps(self.world, self.start_step * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.start_step * self.world
        for indices in self.sampler.rank_batches(self.epoch, self.rank, self.world, start):
            yield [(self.epoch, int(index)) for index in indices]


class MooerDataloader:
    """What ``funasr.bin.train`` asks for the batches of each epoch.

    Args:
        frontend: built by FunASR from ``frontend_conf``.
        tokenizer: built by FunASR from ``tokenizer_conf``.
        config: FunASR's whole config; ``dataset_conf``, ``prompt_conf``, ``adapter_conf``, ``train_data_set_list`` and
            ``valid_data_set_list`` are read. Without ``llm`` or ``llm_conf`` batches are for CTC.
    """

    build_prompt: ClassVar[Callable[[Any, Mapping[str, Any] | None], Any] | None] = None
    """``(tokenizer, prompt_conf) -> Prompt``; set where the package is put together, as data knows no models."""

    data_split_num = 1

    def __init__(self, frontend: Any = None, tokenizer: Any = None, **config: Any):
        config = _plain(config)
        conf = config.get("dataset_conf") or {}
        features = Features(*_settings(frontend))
        prompt = audio_lengths = None
        if config.get("llm") or config.get("llm_conf"):
            if type(self).build_prompt is None:
                raise ConfigError(
                    "dataset_conf.dataloader: import funasr_mooer first; it gives MooerDataloader its prompts"
                )
            prompt = type(self).build_prompt(tokenizer, config.get("prompt_conf"))
            granularity_ms = (config.get("adapter_conf") or {}).get("granularity_ms", 120)

            def audio_lengths(samples: np.ndarray) -> np.ndarray:
                return (np.asarray(features.num_frames(samples)) * features.frame_ms // granularity_ms).astype(np.int64)

        shared = {"prompt": prompt, "audio_lengths": audio_lengths, "seed": int(config.get("seed") or 0)}
        self.train, self.valid = (
            MooerDataset(config.get(key), None, features, tokenizer, training, **shared, **conf)
            for key, training in (("train_data_set_list", True), ("valid_data_set_list", False))
        )

    def build_iter(
        self, epoch: int = 0, data_split_i: int = 0, start_step: int = 0, **unused: Any
    ) -> tuple[torch.utils.data.DataLoader, torch.utils.data.DataLoader]:
        """Loaders of one epoch of training, from ``start_step`` on, and of validation."""
        loaders = []
        for dataset, start in ((self.train, start_step), (self.valid, 0)):
            batches = MooerBatchSampler(dataset, start_step=start)
            batches.set_epoch(epoch)
            loaders.append(torch.utils.data.DataLoader(dataset, collate_fn=dataset.collator, **batches))
        return loaders[0], loaders[1]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with FunASR's OmegaConf sections as dicts and lists."""
    from omegaconf import OmegaConf

    return {key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in config.items()}


def _settings(frontend: Any) -> tuple[FrontendConf, torch.Tensor | None]:
    """Settings and CMVN of FunASR's ``WavFrontend``, or our defaults."""
    if frontend is None:
        return FrontendConf(), None
    names = [name for name in FrontendConf.__dataclass_fields__ if hasattr(frontend, name) and name != "dither"]
    values = {name: getattr(frontend, name) for name in names}
    return section(FrontendConf, values, "frontend_conf"), getattr(frontend, "cmvn", None)


def _rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
