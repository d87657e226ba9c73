"""Batches of utterance indices, filled to a token budget; any batch of any epoch is found at once."""

# How it works. Utterances are sorted by cost once. Batches are consecutive ranges of that order, planned once and so that
# they stay inside the budget even if each place is taken by an utterance up to ``reach`` places further on. In each epoch
# utterances are shuffled among the ``reach`` places around them, and batches among each other. Hence the number of batches
# never changes, no epoch has to be replayed to continue in its middle, and memory is a few bytes per utterance.

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from funasr_mooer.errors import ConfigError


class TokenBudgetSampler:
    """Every utterance once per epoch, in batches whose padded cost stays within ``budget``.

    Args:
        costs: (n,) integers, what each utterance costs in the budget's unit; 0 leaves it out.
        budget: most that a batch may cost, padding included: utterances times the largest cost.
        window: most neighbours in length that an utterance is shuffled with; small corpora use fewer.
        max_utts: most utterances in a batch.
        seed: with the epoch, decides everything.
        groups: (count, weight) of each corpus in the order of ``costs``. Weight 2 shows its utterances twice per epoch;
            0.5 shows half of them, the other half in the next epoch.
        length_multiple: costs are rounded up to a multiple, as padding will be.
        shuffle: False keeps the order by cost (validation).
        packed: a batch costs the sum of its utterances, as they stand in one row without padding.
        ascending_epochs: so many epochs at the start take the shortest batches first. A model that learns with CTC from
            nothing finds the words in short utterances long before it finds them in long ones.

    Raises:
        ConfigError: nothing to sample, or an utterance that alone exceeds the budget.
    """

    def __init__(
        self,
        costs: np.ndarray,
        budget: int,
        window: int = 2000,
        max_utts: int = 1024,
        seed: int = 0,
        groups: Sequence[tuple[int, float]] | None = None,
        length_multiple: int = 1,
        shuffle: bool = True,
        ascending_epochs: int = 0,
        packed: bool = False,
    ):
        self.seed, self.budget, self.shuffle, self.ascending_epochs = seed, budget, shuffle, ascending_epochs
        self.costs = np.asarray(costs)
        if length_multiple > 1:
            self.costs = -(-self.costs // length_multiple) * length_multiple
        self._order, self._first, self._span = _slots(self.costs, groups or [(len(self.costs), 1.0)])
        if len(self) == 0:
            raise ConfigError("no utterances to sample: all were left out by their length or weight")
        worst = self._cost_at(len(self) - 1)
        if worst > budget:
            raise ConfigError(
                f"dataset_conf.budget={budget}: an utterance alone costs {worst}; raise the budget or lower max_duration_s"
            )
        self.reach = max(1, min(window, len(self) // 32)) if shuffle else 1
        self._starts = self._plan_packed(max_utts) if packed else self._plan(max_utts)
        self._epoch, self._batch_order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Utterances per epoch."""
        return len(self._order) if self._first is None else len(self._first)

    @property
    def num_batches(self) -> int:
        """Batches per epoch over all ranks, the same in every epoch."""
        return len(self._starts) - 1

    def steps(self, world: int = 1, start: int = 0) -> int:
        """Batches that each of ``world`` ranks gets when ``start`` batches of the epoch are done."""
        return -(-(self.num_batches - start) // world)

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """Indices of batch ``number`` of ``epoch``, int64."""
        b = self._shuffled(epoch)[number]
        return self._indices(epoch, int(self._starts[b]), int(self._starts[b + 1]))

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The batches of ``epoch`` from number ``start`` on, made one at a time."""
        return (self.batch(epoch, number) for number in range(start, self.num_batches))

    def rank_batches(self, epoch: int, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[np.ndarray]:
        """The batches of one rank: number ``start + step * world + rank`` for each step.

        All ranks get the same number. Where the last step has fewer batches than ranks, the largest of them are halved.

        Args:
            epoch: counted from 0.
            rank: of ``world``.
            world: number of ranks.
            start: batches of this epoch that were done before, by all ranks together, at whatever world size.
        """
        whole = (self.num_batches - start) // world
        for step in range(whole):
            yield self.batch(epoch, start + step * world + rank)
        if start + whole * world < self.num_batches:
            yield _deal(list(self.batches(epoch, start + whole * world)), world)[rank]

    def padding_excess(self, epoch: int = 0) -> float:
        """How much padding adds to the costs of an epoch: 0.05 is 5 %. Visits all batches; for reports and tests."""
        found = [self.costs[batch] for batch in self.batches(epoch)]
        return sum(len(c) * int(c.max()) for c in found) / sum(int(c.sum()) for c in found) - 1

    def _plan(self, max_utts: int) -> np.ndarray:
        """Where each batch starts in the order by cost, (num_batches + 1,)."""
        starts, position, last = [0], 0, len(self) - 1
        while position <= last:
            size = min(max_utts, max(1, self.budget // self._cost_at(min(position + self.reach - 1, last))))
            if size > 1:  # as costs ascend, what fits at the far end fits
                size = min(size, max(1, self.budget // self._cost_at(min(position + size + self.reach - 2, last))))
            position += size
            starts.append(min(position, last + 1))
        return np.array(starts, np.int64)

    def _plan_packed(self, max_utts: int) -> np.ndarray:
        """The same where a batch costs the sum of its utterances."""
        starts, count = [0], len(self)
        while starts[-1] < count:
            slots = np.arange(starts[-1], min(starts[-1] + max_utts, count))
            totals = self._costs_at(np.minimum(slots + self.reach - 1, count - 1)).cumsum()
            starts.append(starts[-1] + max(1, int(np.searchsorted(totals, self.budget, side="right"))))
        return np.array(starts, np.int64)

    def _cost_at(self, slot: int) -> int:
        """Largest cost that the slot can have."""
        return int(self._costs_at(np.array(slot)))

    def _costs_at(self, slots: np.ndarray) -> np.ndarray:
        """The same for many slots."""
        places = slots if self._first is None else self._first[slots] + self._span[slots] - 1
        return self.costs[self._order[places]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            order = np.arange(self.num_batches, dtype=np.int64)
            if self.shuffle and epoch >= self.ascending_epochs:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._epoch, self._batch_order = epoch, order
        return self._batch_order

    def _indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Utterances that take the places ``start .. stop`` in this epoch."""
        slots = np.arange(start, stop)
        if self.reach > 1:
            # Blocks of `reach` places are shuffled inside; where they begin changes with the epoch.
            phase = (epoch * 2654435761 + self.seed) % self.reach
            blocks = range((start + phase) // self.reach, (stop - 1 + phase) // self.reach + 1)
            edges = [(max(0, k * self.reach - phase), min(len(self), (k + 1) * self.reach - phase)) for k in blocks]
            shuffled = [
                low + np.random.default_rng((self.seed, epoch, k)).permutation(high - low)
                for k, (low, high) in zip(blocks, edges)
            ]
            slots = np.concatenate(shuffled)[start - edges[0][0] : stop - edges[0][0]]
        if self._first is not None:
            slots = self._first[slots] + (epoch + slots) % self._span[slots]
        return self._order[slots].astype(np.int64)


def _slots(
    costs: np.ndarray, groups: Sequence[tuple[int, float]]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Indices by cost and, where weights are not 1, the slots of an epoch: each takes turns among ``span`` neighbours.

    Returns:
        order (n,): indices with a cost, ascending by cost inside each group.
        first, span (S,): where in ``order`` each slot's candidates begin, and how many they are; slots ascend by cost.
            None when every utterance is its own slot.
    """
    if sum(count for count, _ in groups) != len(costs):
        raise ConfigError(f"groups hold {sum(count for count, _ in groups)} utterances, costs {len(costs)}")
    if all(weight == 1 for _, weight in groups):
        return _ascending(costs, 0), None, None
    orders, firsts, spans, offset, base = [], [], [], 0, 0
    for count, weight in groups:
        if weight < 0:
            raise ConfigError(f"a corpus has the weight {weight}; use 0 or more")
        order = _ascending(costs[offset : offset + count], offset)
        size = round(weight * len(order))
        edges = np.arange(size + 1) * len(order) // max(size, 1)
        orders.append(order)
        firsts.append(base + edges[:-1])
        spans.append(np.maximum(np.diff(edges), 1))
        offset, base = offset + count, base + len(order)
    order, first, span = np.concatenate(orders), np.concatenate(firsts), np.concatenate(spans)
    by_cost = np.argsort(costs[order[first + span - 1]], kind="stable")
    return order, first[by_cost], span[by_cost]


def _ascending(costs: np.ndarray, offset: int) -> np.ndarray:
    """Indices of positive costs by ascending cost, as small as they can be stored."""
    small = costs.astype(np.uint16) if len(costs) and costs.max() < 1 << 16 else costs  # sorted 8 times faster
    order = np.argsort(small, kind="stable")
    order = order[np.searchsorted(costs[order], 1) :] + offset
    return order.astype(np.uint32) if offset + len(costs) < 2**32 else order


def _deal(batches: list[np.ndarray], world: int) -> list[np.ndarray]:
    """Fewer batches than ranks -> one for each rank, by halving; single utterances are repeated when nothing is left."""
    while len(batches) < world:
        largest = max(range(len(batches)), key=lambda k: len(batches[k]))
        half = len(batches[largest]) // 2
        if half == 0:
            batches.append(batches[0])
        else:
            batches.append(batches[largest][half:])
            batches[largest] = batches[largest][:half]
    return batches
