"""Corpora in one training: the shares that are asked for are those that come."""

from pathlib import Path

import numpy as np
import pytest

from funasr_mooer.data.mix import CorpusConf, mix, shares
from funasr_mooer.data.sampler import TokenBudgetSampler

MT5K = {"aishell2": 137, "librispeech": 131, "multi_cn": 100, "wenetspeech": 1361, "pseudo": 3274}


def test_shares_are_hours_times_weight():
    found = shares(list(MT5K.values()), [1] * 5)
    assert [round(100 * share, 1) for share in found] == [2.7, 2.6, 2.0, 27.2, 65.4]
    assert shares([1, 3], [3, 1]) == [0.5, 0.5]


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 3, 3, 1, 0.3], [0, 1, 1, 0.5, 0.01]])
@pytest.mark.parametrize("part", [1 << 19, 3000])
def test_an_epoch_has_the_shares_that_weights_ask_for_at_every_step_and_world(weights, part):
    rng = np.random.default_rng(0)
    counts = [10 * hours for hours in MT5K.values()]
    costs = rng.integers(60, 200, sum(counts))
    sampler = TokenBudgetSampler(costs, 8000, groups=list(zip(counts, weights)), part=part)
    corpus = np.repeat(np.arange(5), counts)
    wanted = np.array(shares(counts, weights))
    for epoch in range(2):
        batches = list(sampler.batches(epoch))
        whole = np.bincount(corpus[np.concatenate(batches)], minlength=5)
        np.testing.assert_allclose(whole, np.multiply(counts, weights), atol=1)
        early = np.bincount(corpus[np.concatenate(batches[: len(batches) // 2])], minlength=5)
        np.testing.assert_allclose(early / early.sum(), wanted, atol=0.03)
    rest = [b for rank in range(3) for b in sampler.rank_batches(1, rank, 3, start=40)]
    resumed = np.bincount(corpus[np.concatenate([*batches[:40], *rest])], minlength=5)
    assert (resumed >= whole).all()
    assert resumed.sum() - whole.sum() <= 3  # what ranks repeat so that all have a last batch


def test_each_pack_gets_what_is_said_of_it():
    packs = [Path("/p/aishell2/train"), Path("/p/pseudo/train"), Path("/p/dev")]
    found = mix({"pseudo/train": {"weight": 0.5, "tasks": {"asr": 1}}, "dev": 2}, packs)
    assert found == [CorpusConf(), CorpusConf(0.5, {"asr": 1}), CorpusConf(2)]
    assert mix(None, packs) == [CorpusConf()] * 3
