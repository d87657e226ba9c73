"""One part of a corpus as batches: sorted by cost, cut to the budget, shuffled among neighbours in length."""

# How it works. Utterances are sorted by cost once; each place in that order is a slot. Batches are consecutive ranges of
# slots, cut so that they stay inside the budget even if each slot is taken by an utterance up to ``reach`` slots further on.
# In each epoch utterances are shuffled among the ``reach`` slots around them, and batches among each other. Hence the number
# of batches never changes, and no epoch has to be replayed to continue in its middle.

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """What batches look like; see :class:`~funasr_mooer.data.sampler.TokenBudgetSampler`."""

    budget: int
    window: int = 2000
    max_utts: int = 1024
    shuffle: bool = True
    packed: bool = False

    def reach(self, slots: int) -> int:
        """Neighbours among which an utterance is shuffled, where there are so many slots."""
        return max(1, min(self.window, slots // 32)) if self.shuffle else 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Some utterances of one corpus, and how many of them an epoch shows.

    Attributes:
        indices: (n,) of the utterances.
        costs: (n,) what each costs; 0 leaves it out.
        weight: times that an utterance comes per epoch.
        carry: from 0 to 1, what counts as another utterance when the weight gives a fraction of one.
    """

    indices: np.ndarray
    costs: np.ndarray
    weight: float = 1.0
    carry: float = 0.5

    def slots(self, usable: int) -> int:
        """Utterances per epoch, of so many that have a cost."""
        return int(self.weight * usable + self.carry)


class Plan:
    """The batches of some groups, for any epoch.

    Args:
        groups: what there is.
        shape: of the batches.
        key: seeds what is random, with the epoch.
    """

    def __init__(self, groups: Sequence[Group], shape: Shape, key: tuple[int, ...]):
        self.shape, self.key = shape, key
        self.order, self.first, self.span = _slots(groups)  # (n,) indices; (S,), (S,) candidates of each slot
        self.starts = cut(slot_costs(groups), shape)  # (num_batches + 1,)
        self.reach = shape.reach(len(self.first))
        self._epoch, self._batches = -1, np.zeros(0, np.int64)

    def batch(self, epoch: int, number: int, ascending: bool = False) -> np.ndarray:
        """Indices of batch ``number`` of ``epoch``, int64; ``ascending`` numbers them from short to long."""
        b = number if ascending or not self.shape.shuffle else self._shuffled(epoch)[number]
        return self._indices(epoch, int(self.starts[b]), int(self.starts[b + 1]))

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            order = np.arange(len(self.starts) - 1)
            np.random.default_rng((*self.key, epoch)).shuffle(order)
            self._epoch, self._batches = epoch, order
        return self._batches

    def _indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Utterances that take the slots ``start .. stop`` in this epoch."""
        slots, reach = np.arange(start, stop), self.reach
        if reach > 1:
            # Blocks of `reach` slots are shuffled inside; where they begin changes with the epoch.
            phase = (epoch * 2654435761 + self.key[0]) % reach
            blocks = range((start + phase) // reach, (stop - 1 + phase) // reach + 1)
            edges = [(max(0, k * reach - phase), min(len(self.first), (k + 1) * reach - phase)) for k in blocks]
            shuffled = [
                low + np.random.default_rng((*self.key, epoch, k)).permutation(high - low)
                for k, (low, high) in zip(blocks, edges)
            ]
            slots = np.concatenate(shuffled)[start - edges[0][0] : stop - edges[0][0]]
        return self.order[self.first[slots] + (epoch + slots) % self.span[slots]]


def _slots(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices by cost, and the slots of an epoch: each takes turns among ``span`` neighbours.

    Returns:
        order (n,): indices with a cost, ascending by cost inside each group.
        first, span (S,): where in ``order`` each slot's candidates begin, and how many they are; slots ascend by cost.
    """
    orders, firsts, spans, tops, base = [], [], [], [], 0
    for group in groups:
        order = np.argsort(_small(group.costs), kind="stable")
        order = order[np.count_nonzero(group.costs <= 0) :]
        edges = _edges(group, len(order))
        orders.append(group.indices[order])
        firsts.append(base + edges[:-1])
        spans.append(np.maximum(np.diff(edges), 1))
        tops.append(group.costs[order[edges[:-1] + spans[-1] - 1]])
        base += len(order)
    by_cost = np.argsort(_small(np.concatenate(tops)), kind="stable")
    first, span = (np.concatenate(x)[by_cost].astype(np.int32) for x in (firsts, spans))
    return np.concatenate(orders), first, span


def slot_costs(groups: Sequence[Group]) -> np.ndarray:
    """How many slots have each cost, by the dearest utterance that may take them, (largest cost + 1,); nothing is sorted."""
    found = [np.bincount(np.maximum(group.costs, 0)) for group in groups]
    counts = np.zeros(max(map(len, found)), np.int64)
    for group, each in zip(groups, found):
        each[:1] = 0
        if group.weight == 1:
            counts[: len(each)] += each
            continue
        ascending = np.repeat(np.arange(len(each)), each)
        edges = _edges(group, len(ascending))
        last = edges[:-1] + np.maximum(np.diff(edges), 1) - 1
        counts[: len(each)] += np.bincount(ascending[last], minlength=len(each))
    return counts


def cut(costs: np.ndarray, shape: Shape) -> np.ndarray:
    """Where each batch starts among the slots, (num_batches + 1,), given how many slots have each cost.

    Between two costs all batches have one size, so this takes a step per cost and not per batch.
    """
    ends = np.cumsum(costs).tolist()  # slots up to and with this cost
    count = ends[-1]
    reach = shape.reach(count)
    ahead = reach - 1  # the dearest utterance that may come to a slot is so many slots further on

    def run(slot: int) -> tuple[int, int]:
        """What a slot may cost, and from it on, how many slots may cost the same."""
        cost = bisect.bisect_right(ends, min(slot + ahead, count - 1))
        return cost, (count if ends[cost] == count else ends[cost] - ahead) - slot

    starts, position = [], 0
    while position < count:
        cost, alike = run(position)
        size = max(1, min(shape.max_utts, shape.budget // cost))
        left = min(size, count - position)
        if alike >= size:
            starts.append(position + size * np.arange(alike // size))
            position += alike // size * size
        else:
            starts.append(np.array([position]))
            if shape.packed:
                position += _fitting(run, position, left, shape.budget)
            else:  # as costs ascend, what fits at the far end fits
                position += max(1, min(left, shape.budget // run(position + left - 1)[0]))
    return np.concatenate([*starts, [count]])


def _fitting(run: Callable[[int], tuple[int, int]], start: int, size: int, budget: int) -> int:
    """How many utterances from slot ``start`` on, at most ``size``, are within the budget together."""
    fitting = 0
    while fitting < size:
        cost, alike = run(start + fitting)
        wanted = min(size - fitting, alike)
        found = min(wanted, budget // cost)
        fitting, budget = fitting + found, budget - found * cost
        if found < wanted:
            break
    return max(1, fitting)


def _edges(group: Group, usable: int) -> np.ndarray:
    """Where in a group's order the candidates of each slot begin, (slots + 1,)."""
    size = group.slots(usable) if usable else 0
    return np.arange(size + 1) * usable // max(size, 1)


def _small(costs: np.ndarray) -> np.ndarray:
    """Costs in 16 bits where they fit: they are sorted 8 times faster."""
    return costs.astype(np.uint16) if len(costs) and costs.max() < 1 << 16 else costs
