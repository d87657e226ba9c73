"""One linear layer per expert on rows sorted by expert: a loop to train with, packed weights, one kernel for GPUs.

:class:`~funasr_mooer.modules.moe_ffn.MoEFFN` chooses among them; each equals ``F.linear`` on every expert's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funasr_mooer.device import on_huge_pages

# Shapes: R rows sorted by expert, E experts, I and O size of a row before and after, D model size, H inner size.

# Blocked weights pay up to about this many rows, where rows get wider and where they get narrower (float32: on AVX2).
# bfloat16 is reordered at every plain call, so always.
PACKED_ROWS = {torch.float32: (400, 48), torch.bfloat16: (1 << 30, 1 << 30)}


def sorted_linear(rows: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Each expert's rows (R_e, I), weight (E, O, I), bias (E, O) -> each expert's (R_e, O); differentiable.

    The gradients of all experts' weights are written where they belong, without a copy to stack them; that of an
    expert without rows is zero. In autocast's dtype where autocast is on, as ``F.linear`` would be.
    """
    dtype = compute_dtype(rows[0])
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(rows[0].device.type, enabled=False):
        return _SortedLinear.apply(weight.to(dtype), bias, *(x.to(dtype) for x in rows))


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """(R, I), (E, O, I), (E, O), (R,) -> (R, O): row i by ``experts[i]``, which ascend; differentiable.

    One grouped matrix product, whose groups the device alone knows: the host does not wait. Rows of "expert" E are
    padding: zero, and without influence on any gradient.
    """
    dtype, numbers = compute_dtype(rows), torch.arange(len(weight), device=rows.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    padding = (experts == len(weight)).unsqueeze(1)  # the kernel leaves these rows, and their gradients, undefined
    with torch.autocast(rows.device.type, enabled=False):
        rows, weight = rows.to(dtype).masked_fill(padding, 0), weight.to(dtype)
        outputs = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        if bias is not None:
            outputs = outputs + (experts.unsqueeze(1) == numbers).to(dtype) @ bias.to(dtype)
        return outputs.masked_fill(padding, 0)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, would multiply ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class PackedLinear:
    """``F.linear`` by one of several weights, for inference on a CPU: blocked as oneDNN wants it, once and for all calls.

    A plain product of few rows spends most of its time on reordering the weight. Here that is done when a weight is
    first used for few rows, and costs a second copy of it. Calls with many rows go by the plain weight.

    Args:
        weight: (E, O, I).
        dtype: of the products; float32 or bfloat16.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight, self.dtype = weight, dtype
        wider = weight.shape[1] > weight.shape[2]
        self.most_rows = PACKED_ROWS[dtype][0 if wider else 1]
        self._made_of = self._state()
        self._blocks: dict[int, Tensor] = {}

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether the weight is what it was when blocks were made of it, and products are wanted in ``dtype``."""
        return self.dtype == dtype and self._made_of == self._state()

    def __call__(self, expert: int, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Rows (R, I) and bias (O,) -> (R, O) by ``weight[expert]``."""
        if len(rows) > self.most_rows:
            return F.linear(rows, self.weight[expert], bias)
        if expert not in self._blocks:
            self._blocks[expert] = torch.ops.mkldnn._reorder_linear_weight(self.weight[expert].detach().to(self.dtype))
        bias = None if bias is None else bias.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(
            rows.to(self.dtype), self._blocks[expert], bias, attr="none", scalars=[], algorithm=""
        )

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version


class _SortedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *rows)
        return tuple(F.linear(x, weight[e], None if bias is None else bias[e]) for e, x in enumerate(rows))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rows = ctx.saved_tensors
        wants_weight, wants_bias, *wants_rows = ctx.needs_input_grad
        d_weight = on_huge_pages(torch.empty_like(weight)) if wants_weight else None
        d_rows = [g @ weight[e] if wanted else None for e, (g, wanted) in enumerate(zip(grads, wants_rows))]
        if wants_weight:
            for x, g, d in zip(rows, grads, d_weight):
                torch.mm(g.t(), x, out=d)  # zero where there is no row
        d_bias = torch.stack([g.sum(0) for g in grads]) if wants_bias else None
        return d_weight, d_bias, *d_rows
