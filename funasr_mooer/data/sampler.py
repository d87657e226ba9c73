"""Batches of utterance indices, filled to a token budget; any batch of any epoch is found at once."""

# A corpus is dealt into parts of about half a million utterances, at random but the same in every epoch. Each part is a plan
# of its own (plan.py); an epoch goes through the parts in an order of its own. At the start every part's batches are counted,
# which takes no sorting; only the part that is being read is ever held. A small corpus is one part.

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from funasr_mooer.data.plan import Group, Plan, Shape, cut, slot_costs
from funasr_mooer.errors import ConfigError

PART = 1 << 19  # utterances per epoch that are planned together
PAGE = 1 << 16  # neighbours in the index that are dealt together: read in one go
THREADS = 8  # that count parts at the start
NAMED = 3  # utterances without a cost that are remembered


class Costs(Protocol):
    """What each utterance costs in the budget's unit, 0 to leave it out: an array, or what computes one by slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class TokenBudgetSampler:
    """Every utterance once per epoch, in batches whose padded cost stays within ``budget``.

    Args:
        costs: (n,) integers; see :class:`Costs`.
        budget: most that a batch may cost, padding included: utterances times the largest cost.
        window: most neighbours in length that an utterance is shuffled with; small corpora use fewer.
        max_utts: most utterances in a batch.
        seed: with the epoch, decides everything.
        groups: (count, weight) of each corpus in the order of ``costs``. Weight 2 shows its utterances twice per epoch;
            0.5 shows half of them, the other half in the next epoch.
        length_multiple: costs are rounded up to a multiple, as padding will be.
        shuffle: False keeps the order by cost (validation).
        ascending_epochs: so many epochs at the start take the shortest batches first. A model that learns with CTC from
            nothing finds the words in short utterances long before it finds them in long ones.
        packed: a batch costs the sum of its utterances, as they stand in one row without padding.
        part: utterances that are planned together.

    Attributes:
        left_out: utterances without a cost.
        left_out_first: the first of them.

    Raises:
        ConfigError: nothing to sample, or an utterance that alone exceeds the budget.
    """

    def __init__(
        self,
        costs: Costs,
        budget: int,
        window: int = 2000,
        max_utts: int = 1024,
        seed: int = 0,
        groups: Sequence[tuple[int, float]] | None = None,
        length_multiple: int = 1,
        shuffle: bool = True,
        ascending_epochs: int = 0,
        packed: bool = False,
        part: int = PART,
    ):
        self.costs, self.seed, self.multiple, self.ascending_epochs = costs, seed, length_multiple, ascending_epochs
        self.shape = Shape(budget, window, max_utts, shuffle, packed)
        self._corpora = list(groups or [(len(costs), 1.0)])
        _check(self._corpora, len(costs))
        self._parts = max(1, -(-int(sum(count * weight for count, weight in self._corpora)) // part))
        self._pages = [_deal_pages(count, self._parts, (seed, k)) for k, (count, _) in enumerate(self._corpora)]
        self._count()
        self._plan = functools.lru_cache(maxsize=2)(self._plan)  # two, as ranks meet the next part at different batches
        self._epoch, self._order, self._ends = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Utterances per epoch."""
        return self._utterances

    @property
    def num_batches(self) -> int:
        """Batches per epoch over all ranks, the same in every epoch."""
        return int(self._batches.sum())

    def steps(self, world: int = 1, start: int = 0) -> int:
        """Batches that each of ``world`` ranks gets when ``start`` batches of the epoch are done."""
        return -(-(self.num_batches - start) // world)

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """Indices of batch ``number`` of ``epoch``, int64."""
        if epoch != self._epoch:
            order = np.arange(self._parts)
            if self._shuffles(epoch):
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._epoch, self._order, self._ends = epoch, order, np.cumsum(self._batches[order])
        place = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[place - 1]) if place else 0
        return self._plan(int(self._order[place])).batch(epoch, number - before, not self._shuffles(epoch))

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

    def _shuffles(self, epoch: int) -> bool:
        return self.shape.shuffle and epoch >= self.ascending_epochs

    def _count(self) -> None:
        """Batches and utterances of every part, without sorting any."""
        with concurrent.futures.ThreadPoolExecutor(min(self._parts, THREADS)) as pool:  # numpy works beside Python
            counted = list(pool.map(self._count_part, range(self._parts)))
        self._batches = np.array([each.batches for each in counted], np.int64)
        self._utterances = sum(each.utterances for each in counted)
        self.left_out = sum(each.left_out for each in counted)
        self.left_out_first = sorted(index for each in counted for index in each.left_out_first)[:NAMED]
        if not self._utterances:
            raise ConfigError("no utterances to sample: all were left out by their length or weight")
        worst = max(each.worst for each in counted)
        if worst > self.shape.budget:
            raise ConfigError(
                f"dataset_conf.budget={self.shape.budget}: an utterance alone costs {worst}; raise the budget or lower "
                "max_duration_s"
            )

    def _count_part(self, part: int) -> _Counted:
        groups = self._groups(part)
        missing = np.concatenate([group.indices[group.costs <= 0] for group in groups])
        slots = slot_costs(groups)
        batches = len(cut(slots, self.shape)) - 1 if slots.any() else 0
        return _Counted(batches, int(slots.sum()), len(slots) - 1, len(missing), np.sort(missing)[:NAMED].tolist())

    def _plan(self, part: int) -> Plan:
        return Plan(self._groups(part), self.shape, (self.seed, part))

    def _groups(self, part: int) -> list[Group]:
        """The utterances of one part, by corpus."""
        groups, offset = [], 0
        for (count, weight), (edges, dealt) in zip(self._corpora, self._pages):
            pages = [slice(offset + int(edges[p]), offset + int(edges[p + 1])) for p in dealt[part]]
            costs = np.concatenate([self.costs[page] for page in pages])
            costs = -(-costs // self.multiple) * self.multiple if self.multiple > 1 else costs
            indices = np.concatenate([np.arange(page.start, page.stop) for page in pages])
            # Fractions of an utterance are rounded at another point in each part, so that they add up over the parts.
            groups.append(Group(indices, costs, weight, (part + 0.5) / self._parts))
            offset += count
        return groups


@dataclasses.dataclass(frozen=True)
class _Counted:
    """What one part holds; ``worst`` is the largest cost."""

    batches: int
    utterances: int
    worst: int
    left_out: int
    left_out_first: list[int]


def _check(corpora: Sequence[tuple[int, float]], count: int) -> None:
    if sum(size for size, _ in corpora) != count:
        raise ConfigError(f"groups hold {sum(size for size, _ in corpora)} utterances, costs {count}")
    for _, weight in corpora:
        if weight < 0:
            raise ConfigError(f"a corpus has the weight {weight}; use 0 or more")


def _deal_pages(count: int, parts: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pages of a corpus, dealt to parts at random.

    Returns:
        where each page begins, (pages + 1,), and the pages of each part in ascending order, (parts, pages / parts).
    """
    each = max(1, round(count / (parts * PAGE)))
    edges = np.arange(parts * each + 1) * count // (parts * each)
    dealt = np.random.default_rng(key).permutation(parts * each).reshape(parts, each)
    return edges, np.sort(dealt, axis=1)


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
