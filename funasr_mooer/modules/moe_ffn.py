"""A feed-forward layer made of experts, of which each frame uses a few (U2++ MoE, arXiv 2404.16407)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError

# Shapes: N frames, D model size, H inner size, E experts, K experts per frame.
PARTS = {"w_1.weight": "w_1", "w_1.bias": "b_1", "w_2.weight": "w_2", "w_2.bias": "b_2"}  # WeNet's name: ours


class MoEFFN(nn.Module):
    """A router picks ``top_k`` of ``num_experts`` feed-forward layers per frame and sums them by weight.

    The weights are a softmax over the chosen experts' logits only, in float32, as in WeNet's MoEFFNLayer;
    there is no load-balancing loss, no capacity and no dropped frame. Expert weights are stacked, which
    keeps optimisers, DDP and ZeRO simple: an expert without frames has a zero gradient, never none.
    Checkpoints with WeNet's key per expert (``experts.3.w_1.weight``) load as they are;
    :func:`wenet_state_dict` writes them.

    Args:
        size: model size D.
        hidden: inner size H of one expert.
        act: activation inside the experts.
        num_experts: E.
        top_k: K.
        dropout: on the experts' inner values.
        bias: whether the experts' linear layers have one.

    Raises:
        ConfigError: ``top_k`` is less than 1 or more than ``num_experts``.
    """

    def __init__(
        self,
        size: int,
        hidden: int,
        act: nn.Module,
        num_experts: int = 8,
        top_k: int = 2,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"n_expert_activated={top_k} must lie between 1 and n_expert={num_experts}")
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(size, num_experts, bias=False)
        self.w_1 = nn.Parameter(torch.empty(num_experts, hidden, size))
        self.w_2 = nn.Parameter(torch.empty(num_experts, size, hidden))
        self.b_1 = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.b_2 = nn.Parameter(torch.empty(num_experts, size)) if bias else None
        self.activation = act
        self.dropout = nn.Dropout(dropout)
        for weight, fan_in in ((self.w_1, size), (self.b_1, size), (self.w_2, hidden), (self.b_2, hidden)):
            if weight is not None:  # nn.Linear's own range, so that every expert starts as a dense layer would
                nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        With ``mask`` (B, T), True on speech, padding is neither routed nor computed, and its output is zero.
        """
        if mask is None:
            return self._mix(x.reshape(-1, x.shape[-1])).view_as(x)
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), self._mix(x[mask]))

    def route(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> the chosen experts' numbers and weights, (N, K) each; weights sum to 1."""
        scores, chosen = self.gate(frames).topk(self.top_k, dim=-1)
        return chosen, scores.softmax(dim=-1, dtype=torch.float32).to(frames.dtype)

    def _mix(self, frames: Tensor) -> Tensor:
        chosen, weights = self.route(frames)
        order = chosen.flatten().argsort(stable=True)  # (N * K,): calls sorted by expert
        counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
        calls = frames.repeat_interleave(self.top_k, dim=0)  # (N * K, D): frame 0 K times, frame 1 K times, ...
        outputs = self._experts(_Permute.apply(calls, order), counts)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outputs = _Permute.apply(outputs, inverse).view(*chosen.shape, frames.shape[1])  # (N, K, D)
        return (outputs * weights.unsqueeze(-1)).sum(dim=1)

    def _experts(self, calls: Tensor, counts: list[int]) -> Tensor:
        """Each expert on its run of rows: ``counts[e]`` rows of the sorted ``calls`` (N * K, D)."""
        nothing = [None] * self.num_experts
        weights = zip(
            self.w_1.unbind(),
            nothing if self.b_1 is None else self.b_1.unbind(),
            self.w_2.unbind(),
            nothing if self.b_2 is None else self.b_2.unbind(),
        )
        outputs = []
        for rows, (w_1, b_1, w_2, b_2) in zip(calls.split(counts), weights):
            hidden = self.dropout(self.activation(F.linear(rows, w_1, b_1)))
            outputs.append(F.linear(hidden, w_2, b_2))  # an expert without rows runs too: its gradient is zero
        return torch.cat(outputs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for theirs, ours in PARTS.items():
            keys = [f"{prefix}experts.{i}.{theirs}" for i in range(self.num_experts)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + ours] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *args)


def wenet_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with the experts of every :class:`MoEFFN` apart, under WeNet's keys."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, MoEFFN):
            prefix = f"{name}." if name else ""
            for theirs, ours in PARTS.items():
                for i, weight in enumerate(state.pop(prefix + ours, ())):
                    state[f"{prefix}experts.{i}.{theirs}"] = weight
    return state


class _Permute(torch.autograd.Function):
    """Rows in another order; backward is the opposite order, without the sums of a general gather."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(0, order, grad), None
