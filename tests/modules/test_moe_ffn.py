"""A layer of experts: equal to its definition, to its own parts, and to WeNet's keys."""

import pytest
import torch
import torch.nn.functional as F

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.moe_ffn import MoEFFN, wenet_state_dict


def layer(num_experts=4, top_k=2, bias=True) -> MoEFFN:
    torch.manual_seed(0)
    return MoEFFN(8, 12, torch.nn.SiLU(), num_experts=num_experts, top_k=top_k, bias=bias).double()


def dense_sum(moe: MoEFFN, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every frame, weighted by a softmax over the top k logits and 0 elsewhere."""
    logits = moe.gate(x)
    kept = logits >= logits.topk(moe.top_k, dim=-1).values[..., -1:]
    weights = logits.masked_fill(~kept, float("-inf")).softmax(-1, dtype=torch.float32).double()
    total = torch.zeros_like(x)
    for e in range(moe.num_experts):
        hidden = F.silu(F.linear(x, moe.w_1[e], None if moe.b_1 is None else moe.b_1[e]))
        total += weights[..., e : e + 1] * F.linear(hidden, moe.w_2[e], None if moe.b_2 is None else moe.b_2[e])
    return total


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_is_the_dense_weighted_sum(top_k, bias):
    moe, x = layer(top_k=top_k, bias=bias), torch.randn(3, 7, 8).double()
    grads = []
    for f in (moe, lambda x: dense_sum(moe, x)):
        moe.zero_grad()
        y = f(x)
        y.pow(2).sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in moe.parameters())])
    for ours, expected in zip(*grads):
        # one float32 softmax is summed in another order
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_padding_is_neither_routed_nor_changed():
    moe, x = layer(), torch.randn(2, 5, 8).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    y = moe(x, mask)
    torch.testing.assert_close(y[mask], moe(x)[mask])
    assert not y[~mask].any()
    torch.testing.assert_close(moe(x.masked_fill(~mask.unsqueeze(-1), 1e9), mask), y)


@pytest.mark.parametrize("speech", [True, False])
def test_experts_without_frames_have_zero_gradients(speech):
    moe = layer(num_experts=8, top_k=1)
    moe(torch.randn(1, 1, 8).double(), torch.tensor([[speech]])).sum().backward()
    for name, p in moe.named_parameters():
        assert p.grad is not None, name
        if p.dim() > 2:
            assert sum(bool(g.any()) for g in p.grad) == (1 if speech else 0), name


def test_wenets_keys_load_and_are_written_back():
    moe, other = layer(), layer()
    torch.nn.init.normal_(other.w_1)
    state = wenet_state_dict(torch.nn.ModuleDict({"ffn": moe}))
    assert "ffn.experts.3.w_1.weight" in state
    assert "ffn.w_1" not in state
    torch.nn.ModuleDict({"ffn": other}).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), other.parameters()))


def test_a_checkpoint_with_fewer_experts_does_not_load():
    with pytest.raises(RuntimeError, match="Missing key"):
        layer(num_experts=4).load_state_dict(wenet_state_dict(layer(num_experts=3)))


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_active_experts_than_experts_is_an_error(top_k):
    with pytest.raises(ConfigError, match=f"n_expert_activated={top_k} must lie between 1 and n_expert=4"):
        layer(top_k=top_k)
