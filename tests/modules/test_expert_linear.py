"""Ways to apply a linear layer per expert: each equals ``F.linear`` on that expert's rows, with its gradients."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from funasr_mooer import device
from funasr_mooer.modules import moe_ffn
from funasr_mooer.modules.expert_linear import PACKED_ROWS, PackedLinear, grouped_linear, sorted_linear
from funasr_mooer.modules.moe_ffn import MoEFFN, pack_experts

COUNTS = [2, 0, 5, 1]
EXPERTS = torch.tensor([0, 0, 2, 2, 2, 2, 2, 3])
CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    not device.packs_weights(CPU, torch.float32), reason="this CPU's products take no packed weights"
)


def problem(dtype=torch.float64, bias=True, rows=8):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 8, dtype=dtype), torch.randn(4, 16, 8, dtype=dtype)
    return x, weight, torch.randn(4, 16, dtype=dtype) if bias else None


def by_definition(x, weight, bias, experts=EXPERTS):
    return torch.stack([F.linear(row, weight[e], None if bias is None else bias[e]) for row, e in zip(x, experts)])


def run_sorted(x, weight, bias):
    return torch.cat(sorted_linear(x.split(COUNTS), weight, bias))


def layer(**options) -> MoEFFN:
    torch.manual_seed(0)
    return MoEFFN(8, 16, torch.nn.SiLU(), num_experts=4, top_k=2, **options)


@pytest.mark.parametrize("bias", [True, False])
def test_sorted_rows_meet_their_expert(bias):
    tensors = problem(bias=bias)
    for tensor in tensors[: 2 + bias]:
        tensor.requires_grad_()
    torch.testing.assert_close(run_sorted(*tensors), by_definition(*tensors))
    assert torch.autograd.gradcheck(run_sorted, tensors, fast_mode=True)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = problem()
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i != frozen)
    run_sorted(*tensors).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [i == frozen for i in range(3)]


def test_autocast_multiplies_in_its_own_dtype_and_keeps_gradients_in_the_weights():
    x, weight, bias = problem(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_sorted(x, weight, bias)
        expected = by_definition(x, weight, bias)
    y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_groups_meet_their_expert_and_padding_none(bias):
    tensors = problem(torch.float32, bias, rows=10)
    x, weight, b = (None if t is None else t.requires_grad_() for t in tensors)
    y = grouped_linear(x, weight, b, torch.cat((EXPERTS, torch.tensor([4, 4]))))
    expected = by_definition(x, weight, b)
    torch.testing.assert_close(y[:8], expected)
    assert not y[8:].any()
    ours = torch.autograd.grad(y.pow(2).sum(), [t for t in tensors if t is not None])
    theirs = torch.autograd.grad(expected.pow(2).sum(), [t for t in tensors if t is not None])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@packs
@pytest.mark.parametrize("rows", [1, 8, max(PACKED_ROWS[torch.float32]) + 1])
def test_packed_weights_multiply_as_plain_ones(rows):
    x, weight, bias = problem(torch.float32, rows=rows)
    packed = PackedLinear(weight, torch.float32)
    for e in range(4):
        torch.testing.assert_close(packed(e, x, bias[e]), F.linear(x, weight[e], bias[e]))
        torch.testing.assert_close(packed(e, x, None), F.linear(x, weight[e]))


def test_the_layer_on_a_device_with_grouped_products_is_the_layer(monkeypatch):
    moe, x = layer(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(moe_ffn, "has_grouped_gemm", lambda device, dtype, grouped=grouped: grouped)
        for given in (None, mask):
            moe.zero_grad()
            frames = x.clone().requires_grad_()
            y = moe(frames, given)
            y.pow(2).sum().backward()
            results.append([y.detach(), frames.grad, *(p.grad.clone() for p in moe.parameters())])
    for ours, expected in zip(results[2] + results[3], results[0] + results[1]):
        torch.testing.assert_close(ours, expected)
    assert not results[3][0][~mask].any()


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "has"),
    [
        ("cuda", (8, 6), torch.bfloat16, False),
        ("cuda", (9, 0), torch.bfloat16, True),
        ("cuda", (9, 0), torch.float32, False),
        ("cuda", (10, 0), torch.bfloat16, True),
        ("cuda", (12, 0), torch.bfloat16, False),
        ("musa", (3, 1), torch.bfloat16, False),
        ("cpu", (9, 0), torch.bfloat16, False),
    ],
)
def test_grouped_products_are_for_gpus_whose_torch_makes_them_one_kernel(monkeypatch, kind, capability, dtype, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.has_grouped_gemm(SimpleNamespace(type=kind), dtype) is has


@packs
@torch.no_grad()
def test_inference_in_float32_is_the_definition_in_float64():
    moe, x = layer().eval(), torch.randn(1, 9, 8)
    y = moe(x)
    assert moe._packed
    with torch.enable_grad():  # the way that test_moe_ffn.py compares with the dense sum
        expected = copy.deepcopy(moe).double()(x.double())
    torch.testing.assert_close(y, expected.float())


@packs
@pytest.mark.parametrize(
    "change",
    [
        lambda moe: moe.train().eval(),
        lambda moe: moe.load_state_dict({k: 2 * v for k, v in moe.state_dict().items()}),
        lambda moe: moe.load_state_dict({k: 2 * v for k, v in moe.state_dict().items()}, assign=True),
        lambda moe: moe.double().float(),
        lambda moe: torch.nn.init.ones_(moe.w_2),
        lambda moe: pack_experts(moe, pack=False),
    ],
    ids=["training", "loading", "assigning", "moving", "a change in place", "the switch"],
)
@torch.no_grad()
def test_packed_weights_never_outlive_what_they_were_packed_from(change):
    moe, x = layer().eval(), torch.randn(1, 9, 8)
    moe(x)
    change(moe)
    y = moe(x)
    with torch.enable_grad():
        torch.testing.assert_close(y, moe(x).detach())


@torch.no_grad()
def test_a_layer_that_was_told_not_to_pack_keeps_one_copy():
    moe = layer(pack=False).eval()
    moe(torch.randn(1, 9, 8))
    assert moe._packed is None


@torch.no_grad()
def test_a_layer_that_packed_is_copied_and_pickled():
    moe, x = layer().eval(), torch.randn(1, 9, 8)
    y = moe(x)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        torch.testing.assert_close(other(x), y)
