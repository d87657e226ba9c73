"""What stock funasr.bin.train calls, called as it does."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from funasr_mooer.data.features import Features
from funasr_mooer.data.funasr_dataset import MooerBatchSampler, MooerDataloader, MooerDataset
from funasr_mooer.errors import ConfigError

DATASET = {"dataloader": "MooerDataloader", "budget": 200, "num_workers": 0}


@pytest.fixture
def dataloader(fakes, pack_dir):
    class Dataloader(MooerDataloader):
        build_prompt = staticmethod(lambda tokenizer, conf: fakes.Prompt())

    def build(**config):
        lists = {"train_data_set_list": str(pack_dir), "valid_data_set_list": str(pack_dir)}
        config = {"dataset_conf": DATASET, "llm": "LoRAQwenDecoder", **lists, **config}
        return Dataloader(frontend=None, tokenizer=fakes.Tokenizer(), **config)

    return build


def test_an_epoch_as_funasrs_trainer_runs_it(dataloader):
    loader = dataloader()
    assert loader.data_split_num == 1
    train, valid = loader.build_iter(1, data_split_i=0, start_step=0)
    train.batch_sampler.set_epoch(1)
    batches = list(train)
    assert len(batches) == len(train)
    assert sum(len(batch["input_ids"]) for batch in batches) == 24
    assert sum(len(batch["feats"]) for batch in valid) == 24
    rest, _ = loader.build_iter(1, 0, start_step=2)
    assert len(rest) == len(train) - 2
    for a, b in zip(batches[2:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other, _ = loader.build_iter(2)
    assert any(
        a["feats"].shape != b["feats"].shape or not torch.equal(a["feats"], b["feats"]) for a, b in zip(batches, other)
    )


def test_sections_may_be_omegaconf_as_hydra_makes_them(dataloader, pack_dir):
    conf = OmegaConf.create(
        {**DATASET, "corpora": {"pack": 1.0}, "augment": {"speed": [0.9, 1.1]}, "tasks": {"asr": 1}}
    )
    train, _ = dataloader(dataset_conf=conf, train_data_set_list=OmegaConf.create([str(pack_dir)])).build_iter(0)
    assert len(list(train)) == len(train)


def test_workers_give_the_same_batches(dataloader):
    a, _ = dataloader().build_iter(0)
    b, _ = dataloader(dataset_conf={**DATASET, "num_workers": 2}).build_iter(0)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x["feats"], y["feats"])


def test_without_an_llm_batches_are_for_ctc(dataloader):
    train, _ = dataloader(llm=None).build_iter(0)
    assert "input_ids" not in next(iter(train))


def test_the_frontend_of_funasr_is_taken_over(fakes, pack_dir):
    cmvn = torch.stack([torch.ones(80), torch.full((80,), 2.0)])
    frontend = types.SimpleNamespace(fs=16000, window="hamming", n_mels=80, frame_length=25, frame_shift=10)
    frontend.__dict__.update(
        lfr_m=1, lfr_n=1, dither=1.0, snip_edges=True, upsacle_samples=True, cmvn=cmvn, cmvn_file=None
    )
    dataset = MooerDataset(str(pack_dir), None, frontend, fakes.Tokenizer(), **{**DATASET, "budget": 600})
    feats = dataset.collator([(0, 3)])["feats"][0]
    expected = (Features({"lfr_m": 1, "lfr_n": 1})(dataset.corpus.packs[0].samples(3)) + 1) * 2
    torch.testing.assert_close(feats, expected)
    assert dataset.get_source_len(3) == len(dataset.corpus.packs[0].samples(3)) // 160
    assert dataset.get_target_len(3) == len(dataset.corpus.tokens(3)["text"])


def test_the_sampler_spreads_into_a_dataloader_like_funasrs_own(fakes, pack_dir):
    dataset = MooerDataset([str(pack_dir)], tokenizer=fakes.Tokenizer(), **DATASET)
    sampler = MooerBatchSampler(dataset, is_training=True, **DATASET)
    sampler["batch_sampler"].set_epoch(3)
    loader = torch.utils.data.DataLoader(dataset, collate_fn=dataset.collator, **sampler)
    assert sum(len(batch["feats"]) for batch in loader) == 24


def test_missing_pieces_are_named(fakes, pack_dir):
    with pytest.raises(ConfigError, match="train_data_set_list"):
        MooerDataset(None, tokenizer=fakes.Tokenizer())
    with pytest.raises(ConfigError, match="funasr_mooer.bin.cmvn"):
        MooerDataset(str(pack_dir), tokenizer=None)
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        MooerDataset(str(pack_dir), tokenizer=fakes.Tokenizer(), budgett=3)
    with pytest.raises(ConfigError, match="features=device: FunASR's trainer .* use worker"):
        MooerDataset(str(pack_dir), tokenizer=fakes.Tokenizer(), features="device")
