"""A feed-forward layer made of experts, of which each frame uses a few (U2++ MoE, arXiv 2404.16407)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funasr_mooer.device import has_grouped_gemm, packs_weights
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.expert_linear import PackedLinear, compute_dtype, grouped_linear, sorted_linear

Linear = Callable[[int, Tensor, Tensor | None], Tensor]  # expert, rows, bias -> rows

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
        pack: keep a second copy of the experts' weights for inference on a CPU, blocked as oneDNN wants them:
            streams need two thirds of the time; training, and calls with many frames, make none.

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
        pack: bool = True,
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
        self.pack = pack
        self._packed: tuple[PackedLinear, PackedLinear] | None = None
        for weight, fan_in in ((self.w_1, size), (self.b_1, size), (self.w_2, hidden), (self.b_2, hidden)):
            if weight is not None:  # nn.Linear's own range, so that every expert starts as a dense layer would
                nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        With ``mask`` (B, T), True on speech, no expert gets or computes padding, whose output is zero.
        """
        mix = self._mix_on_device if self._grouped(x) else self._mix
        return mix(x.reshape(-1, x.shape[-1]), None if mask is None else mask.flatten()).view_as(x)

    def _grouped(self, x: Tensor) -> bool:
        """Whether the device multiplies all experts' rows in one kernel, which wants sizes that are multiples of 8."""
        return has_grouped_gemm(x.device, compute_dtype(x)) and not any(size % 8 for size in self.w_1.shape[1:])

    def route(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> the chosen experts' numbers and weights, (N, K) each; weights sum to 1."""
        scores, chosen = self.gate(frames).topk(self.top_k, dim=-1)
        return chosen, scores.softmax(dim=-1, dtype=torch.float32).to(frames.dtype)

    def _choose(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """:meth:`route`, where a frame that ``mask`` (N,) leaves out chooses "expert" E: sorted behind all others."""
        chosen, weights = self.route(frames)
        return chosen if mask is None else chosen.masked_fill(~mask.unsqueeze(1), self.num_experts), weights

    def _mix(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """(N, D) -> (N, D). The host waits once, for the number of rows of each expert, padding the last."""
        chosen, weights = self._choose(frames, mask)
        order = chosen.flatten().argsort(stable=True)  # (N * K,): calls sorted by expert
        counts = chosen.flatten().bincount(minlength=self.num_experts + 1).tolist()
        learns = torch.is_grad_enabled() and (frames.requires_grad or any(p.requires_grad for p in self.parameters()))
        return (self._learn if self.training or learns else self._infer)(frames, weights, order, counts)

    def _mix_on_device(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """As :meth:`_mix`, without the host ever waiting."""
        chosen, weights = self._choose(frames, mask)
        experts, order = chosen.flatten().sort(stable=True)
        calls = _Permute.apply(frames.repeat_interleave(self.top_k, dim=0), order)
        hidden = self.dropout(self.activation(grouped_linear(calls, self.w_1, self.b_1, experts)))
        outputs = grouped_linear(hidden, self.w_2, self.b_2, experts)
        return _weighted_sum(_Permute.apply(outputs, _inverse(order)), weights)

    def _learn(self, frames: Tensor, weights: Tensor, order: Tensor, counts: list[int]) -> Tensor:
        """All experts' first layers, then all their second ones: their gradients then come whole."""
        calls = frames.repeat_interleave(self.top_k, dim=0)  # (N * K, D): frame 0 K times, frame 1 K times, ...
        *calls, padding = _Permute.apply(calls, order).split(counts)
        hidden = [self.dropout(self.activation(rows)) for rows in sorted_linear(calls, self.w_1, self.b_1)]
        outputs = sorted_linear(hidden, self.w_2, self.b_2)
        outputs = torch.cat((*outputs, outputs[0].new_zeros(padding.shape)))
        return _weighted_sum(_Permute.apply(outputs, _inverse(order)), weights)

    def _infer(self, frames: Tensor, weights: Tensor, order: Tensor, counts: list[int]) -> Tensor:
        """Without gradients, expert by expert, so that what one computes is still in the processor's cache."""
        first, second = self._linears(compute_dtype(frames))
        nothing = [None] * self.num_experts
        b_1, b_2 = nothing if self.b_1 is None else self.b_1, nothing if self.b_2 is None else self.b_2
        weights = weights.flatten()[order].unsqueeze(1)  # (N * K, 1)
        mixed = torch.zeros_like(frames)
        calls = zip((order // self.top_k).split(counts)[:-1], weights.split(counts))
        for e, (rows, shares) in enumerate(calls):
            if len(rows):
                hidden = self.activation(first(e, frames.index_select(0, rows), b_1[e]))
                mixed.index_add_(0, rows, second(e, hidden, b_2[e]) * shares)
        return mixed

    def _linears(self, dtype: torch.dtype) -> tuple[Linear, Linear]:
        """The experts' two layers for inference, packed where that pays; see :class:`PackedLinear`."""
        weights = (self.w_1, self.w_2)
        if not self.pack or not packs_weights(self.w_1.device, dtype) or any(w.is_inference() for w in weights):
            return _plain(self.w_1), _plain(self.w_2)
        if self._packed is None or not all(packed.is_current(dtype) for packed in self._packed):
            self._packed = tuple(PackedLinear(weight, dtype) for weight in weights)
        return self._packed

    def train(self, mode: bool = True) -> MoEFFN:
        """As ``nn.Module.train``; training frees the packed weights."""
        self._packed = None if mode else self._packed
        return super().train(mode)

    def _apply(self, *args):  # .to(), .half(), ...: the weights change
        self._packed = None
        return super()._apply(*args)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_packed": None}  # blocked weights can neither be copied nor pickled

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for theirs, ours in PARTS.items():
            keys = [f"{prefix}experts.{i}.{theirs}" for i in range(self.num_experts)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + ours] = torch.stack([state_dict.pop(key) for key in keys])
        self._packed = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def pack_experts(model: nn.Module, pack: bool) -> None:
    """Switch packed weights on or off in every :class:`MoEFFN` of a model; off frees them."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.pack, module._packed = pack, None


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


def _plain(weight: Tensor) -> Linear:
    return lambda expert, rows, bias: F.linear(rows, weight[expert], bias)


def _weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """(N * K, D), (N, K) -> (N, D)."""
    N, K = weights.shape
    return torch.bmm(weights.view(N, 1, K).to(outputs.dtype), outputs.view(N, K, outputs.shape[1])).squeeze(1)


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order`` (R,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


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
