"""Sampling: once per epoch, inside the budget, equal on all ranks, and continued anywhere."""

import numpy as np
import pytest

from funasr_mooer.data.sampler import TokenBudgetSampler
from funasr_mooer.errors import ConfigError


def log_normal(n, seed=0):
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(np.log(6), 0.6, n), 0.5, 30)
    return (seconds / 0.12 + 26 + 2 * seconds).astype(np.int32)


COSTS = log_normal(3000)


def epoch_of(sampler, epoch=0):
    return np.sort(np.concatenate(list(sampler.batches(epoch))))


@pytest.mark.parametrize("n", [1, 7, 100, 3000])
@pytest.mark.parametrize("epoch", [0, 5])
@pytest.mark.parametrize("part", [1 << 19, 400])
def test_every_utterance_comes_once_per_epoch(n, epoch, part):
    np.testing.assert_array_equal(epoch_of(TokenBudgetSampler(COSTS[:n], 2000, part=part), epoch), np.arange(n))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weight", [1, 0.4, 2.5])
def test_batches_are_counted_without_being_made(packed, weight):
    sampler = TokenBudgetSampler(COSTS, 2000, groups=[(3000, weight)], packed=packed, part=400, max_utts=40)
    made = list(sampler.batches(3))
    assert sampler.num_batches == len(made)
    assert len(sampler) == sum(map(len, made)) == round(3000 * weight)
    assert all((COSTS[batch].sum() if packed else len(batch) * COSTS[batch].max()) <= 2000 for batch in made)


def test_an_epoch_goes_through_the_parts_of_a_large_corpus_in_an_order_of_its_own():
    sampler = TokenBudgetSampler(COSTS, 2000, part=400)
    assert sampler._parts == 8
    orders = [[part_of(sampler, sampler.batch(epoch, number)) for number in range(0, 140, 20)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    whole = [sampler.batch(1, number) for number in range(sampler.num_batches)]
    again = TokenBudgetSampler(COSTS, 2000, part=400)
    for number in (130, 3, 77):
        np.testing.assert_array_equal(again.batch(1, number), whole[number])


def part_of(sampler, batch):
    (part,) = {part for part in range(sampler._parts) if np.isin(batch, sampler._groups(part)[0].indices).all()}
    return part


class Computed:
    """Costs that are computed by slices, and never all at once."""

    def __len__(self):
        return len(COSTS)

    def __getitem__(self, part):
        assert part.stop - part.start <= 500
        return COSTS[part]


def test_costs_may_be_computed_a_slice_at_a_time():
    a, b = (TokenBudgetSampler(costs, 2000, part=400) for costs in (COSTS, Computed()))
    for x, y in zip(a.batches(0), b.batches(0), strict=True):
        np.testing.assert_array_equal(x, y)


def test_small_corpora_keep_their_share_in_every_division_into_parts():
    groups = [(2900, 1.0), (100, 0.13)]
    sampler = TokenBudgetSampler(COSTS, 2000, groups=groups, part=100)
    shown = [np.bincount(epoch_of(sampler, epoch) >= 2900, minlength=2) for epoch in range(8)]
    assert all(count[0] == 2900 and count[1] in (12, 13, 14) for count in shown)


@pytest.mark.parametrize("multiple", [1, 16])
def test_padding_included_no_batch_exceeds_the_budget(multiple):
    sampler = TokenBudgetSampler(COSTS, 2000, max_utts=30, length_multiple=multiple)
    rounded = -(-COSTS // multiple) * multiple
    for epoch in range(3):
        for batch in sampler.batches(epoch):
            assert len(batch) * rounded[batch].max() <= 2000
            assert len(batch) <= 30


def test_padding_stays_below_8_percent_and_batches_are_full():
    costs = log_normal(20000)
    batches = list(TokenBudgetSampler(costs, 8000).batches(0))
    assert sum(len(batch) * costs[batch].max() for batch in batches) <= 1.08 * costs.sum()
    tokens = np.array([costs[batch].sum() for batch in batches])
    assert tokens.mean() > 0.88 * 8000
    assert tokens.std() / tokens.mean() < 0.12


def test_packed_rows_are_full_and_alike():
    costs = log_normal(20000)
    sampler = TokenBudgetSampler(costs, 8000, window=150, packed=True)
    rows = [batch for epoch in range(2) for batch in sampler.batches(epoch)]
    tokens = np.array([costs[row].sum() for row in rows])
    assert tokens.max() <= 8000
    assert tokens.mean() > 0.95 * 8000
    assert tokens.std() / tokens.mean() < 0.05
    frames = [costs[row] - 26 for row in rows]  # about what the encoder pads
    assert sum(len(f) * f.max() for f in frames) <= 1.08 * sum(f.sum() for f in frames)
    np.testing.assert_array_equal(epoch_of(sampler, 1), np.arange(len(costs)))


def test_epochs_differ_and_repeat_exactly():
    a, b = TokenBudgetSampler(COSTS, 2000, seed=3), TokenBudgetSampler(COSTS, 2000, seed=3)
    for epoch in (0, 1):
        for x, y in zip(a.batches(epoch), b.batches(epoch), strict=True):
            np.testing.assert_array_equal(x, y)

    def together(sampler, epoch):
        return {frozenset(batch.tolist()) for batch in sampler.batches(epoch)}

    assert len(together(a, 0) & together(a, 1)) == 0, "batches are made of other utterances"
    assert len(together(a, 0) & together(TokenBudgetSampler(COSTS, 2000, seed=4), 0)) == 0
    costs = [COSTS[batch].max() for batch in a.batches(0)]
    assert abs(np.corrcoef(costs, np.arange(len(costs)))[0, 1]) < 0.3, "short and long batches alternate"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_get_equal_numbers_and_share_the_epoch(world):
    sampler = TokenBudgetSampler(COSTS, 2000)
    ranks = [list(sampler.rank_batches(1, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {sampler.steps(world)}
    together = np.concatenate([batch for batches in ranks for batch in batches])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(COSTS)))


def test_training_continues_at_another_world_size():
    sampler = TokenBudgetSampler(COSTS, 2000)
    done = 4 * 3  # three steps of four ranks
    first = [b for rank in range(4) for b in list(sampler.rank_batches(2, rank, 4))[:3]]
    rest = [b for rank in range(3) for b in TokenBudgetSampler(COSTS, 2000).rank_batches(2, rank, 3, start=done)]
    np.testing.assert_array_equal(np.sort(np.concatenate(first + rest)), np.arange(len(COSTS)))
    same = list(sampler.rank_batches(2, 1, 4, start=done))
    for x, y in zip(list(sampler.rank_batches(2, 1, 4))[3:], same, strict=True):
        np.testing.assert_array_equal(x, y)


def test_more_ranks_than_utterances_still_get_one_batch_each():
    batches = [list(TokenBudgetSampler(COSTS[:3], 2000).rank_batches(0, rank, 8)) for rank in range(8)]
    assert all(len(b) == 1 and len(b[0]) == 1 for b in batches)


def test_a_batch_is_found_without_making_those_before_it():
    costs = log_normal(2_000_000)
    sampler = TokenBudgetSampler(costs, 8000)
    first = sampler.batch(7, 0)
    np.testing.assert_array_equal(next(sampler.batches(7)), first)
    assert len(sampler.batch(7, sampler.num_batches - 1)) > 0


def test_corpora_are_mixed_by_weight():
    n = 300
    groups = [(n, 1.0), (n, 2.0), (n, 0.5), (n, 0.0)]
    sampler = TokenBudgetSampler(COSTS[: 4 * n], 2000, groups=groups)
    counts = [np.bincount(epoch_of(sampler, epoch), minlength=4 * n) for epoch in range(2)]
    for count in counts:
        assert (count[:n] == 1).all()
        assert (count[n : 2 * n] == 2).all()
        assert count[2 * n : 3 * n].sum() == n // 2
        assert count[3 * n :].sum() == 0
    np.testing.assert_array_equal(counts[0][2 * n : 3 * n] + counts[1][2 * n : 3 * n], 1)
    for batch in sampler.batches(0):
        assert len(batch) * COSTS[batch].max() <= 2000


def test_cost_zero_leaves_an_utterance_out():
    costs = COSTS.copy()
    costs[::3] = 0
    np.testing.assert_array_equal(epoch_of(TokenBudgetSampler(costs, 2000)), np.flatnonzero(costs))


def test_without_shuffle_batches_ascend():
    sampler = TokenBudgetSampler(COSTS, 2000, shuffle=False)
    tops = [COSTS[batch].max() for batch in sampler.batches(0)]
    assert tops == sorted(tops)


def test_ascending_epochs_go_from_short_to_long_and_hold_everything():
    sampler = TokenBudgetSampler(COSTS, 2000, ascending_epochs=1)
    lengths = [COSTS[batch].mean() for batch in sampler.batches(0)]
    assert np.corrcoef(lengths, np.arange(len(lengths)))[0, 1] > 0.8
    np.testing.assert_array_equal(epoch_of(sampler, 0), np.arange(len(COSTS)))
    plain = TokenBudgetSampler(COSTS, 2000)
    assert all(np.array_equal(a, b) for a, b in zip(sampler.batches(1), plain.batches(1)))


def test_budgets_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"budget=50: an utterance alone costs \d+"):
        TokenBudgetSampler(COSTS, 50)
    with pytest.raises(ConfigError, match="no utterances to sample"):
        TokenBudgetSampler(COSTS * 0, 50)
