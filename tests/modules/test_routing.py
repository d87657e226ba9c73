"""Shares of experts: those counted by hand, of speech alone, once however often a block is computed."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.modules.routing import RoutingStats


def alone(counts):
    """A total over one process."""
    return counts


class Two(nn.Module):
    """Two layers of experts one after the other."""

    def __init__(self, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (MoEFFN(8, 12, nn.SiLU(), num_experts=e, top_k=2) for e in (4, 6))
        self.recompute = recompute

    def forward(self, x, mask=None):
        x = checkpoint(self.first, x, mask, use_reentrant=False) if self.recompute else self.first(x, mask)
        return self.second(x, mask)


X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]


def by_hand(layer, x, mask, experts):
    counts = [0] * experts
    for row, speech in zip(x, mask):
        for frame, counted in zip(row, speech):
            for expert in layer.gate(frame).topk(2).indices.tolist():
                counts[expert] += int(counted)
    return counts


@pytest.mark.parametrize("recompute", [False, True])
def test_choices_are_counted_once_and_without_padding(recompute):
    model = Two(recompute)
    stats = RoutingStats(model)
    with stats.counting():
        y = model(X, MASK)
    y.sum().backward()
    counts = stats.take(alone)
    assert counts["first"].tolist() == [by_hand(model.first, X, MASK, 4)]
    assert counts["second"].tolist() == [by_hand(model.second, model.first(X, MASK), MASK, 6)]
    assert int(counts["first"].sum()) == int(counts["second"].sum()) == 2 * 12


def test_counts_add_up_until_they_are_taken_and_nothing_else_is_counted():
    model = Two()
    stats = RoutingStats(model)
    for _ in range(3):
        with stats.counting():
            model(X)
        model(X)
    assert stats.take(lambda counts: 2 * counts)["first"].sum() == 2 * 3 * 2 * 21  # as two processes would
    assert stats.take(alone) == {}
    assert stats.report(alone) == ({}, {})


def test_languages_are_counted_apart():
    model = Two()
    stats = RoutingStats(model)
    stats.languages = ["", "en", "zh"]
    with stats.counting(torch.tensor([2, 1, 2])):
        model(X, MASK)
    counts = stats.take(alone)["first"]
    zh = [0, 2]
    assert counts[1].tolist() == by_hand(model.first, X[1:2], MASK[1:2], 4)
    assert counts[2].tolist() == by_hand(model.first, X[zh], MASK[zh], 4)
    assert not counts[0].any()


def test_the_report_gives_shares_entropies_and_extremes_by_layer_and_language():
    stats = RoutingStats(Two())
    stats.languages = ["", "en", "zh"]
    stats.counts["first"] = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 8, 0, 0, 0])
    stats.counts["second"] = torch.tensor([1] * 18)
    line, details = stats.report(alone)
    shares = [9 / 12, 1 / 12, 1 / 12, 1 / 12]
    assert [details[f"experts/first/share_{e}"] for e in range(4)] == pytest.approx(shares)
    entropy = -sum(share * math.log(share) for share in shares) / math.log(4)
    assert details["experts/first/entropy"] == pytest.approx(entropy)
    assert (details["experts/first/max"], details["experts/first/min"]) == pytest.approx((0.75, 1 / 12))
    assert (details["experts/first/en/entropy"], details["experts/first/zh/entropy"]) == pytest.approx((1, 0))
    assert line == pytest.approx({"expert_entropy": (entropy + 1) / 2, "expert_max": 0.75})
    for layer, experts in (("first", 4), ("second/zh", 6)):
        assert sum(details[f"experts/{layer}/share_{e}"] for e in range(experts)) == pytest.approx(1)


def test_counting_never_waits_for_the_device():
    with FakeTensorMode() as mode:  # tensors without values: whoever asks for one gets an error
        layer = Two().first
        stats = RoutingStats(layer)
        stats.languages = ["", "en"]
        x, mask, languages = (mode.from_tensor(t) for t in (X, MASK, torch.tensor([0, 1, 1])))
        stats._count("", languages, layer, (x, mask), x)
        with pytest.raises(DataDependentOutputException):
            stats.counts[""].tolist()
