"""Which experts the frames of training batches go to: counted on the device, read when the log is written."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from funasr_mooer.modules.moe_ffn import MoEFFN

# Shapes: B utterances, T frames, D model size, E experts, K experts per frame, G languages.
TOPIC = "experts"


class RoutingStats:
    """Counts how often each expert of each :class:`MoEFFN` is chosen.

    Only what runs inside :meth:`counting` counts. Around a forward pass alone, that leaves out what gradient
    checkpointing computes again in the backward pass. Nothing waits for the device until :meth:`take`.

    Args:
        model: its layers are found by their type.
    """

    def __init__(self, model: nn.Module):
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}
        self.languages: Sequence[str] = ("",)
        self.counts: dict[str, Tensor] = {}  # layer -> (G * E,) int64

    @contextlib.contextmanager
    def counting(self, languages: Tensor | None = None) -> Iterator[None]:
        """Inside, frames are counted.

        Args:
            languages: of each utterance, (B,), as an index into ``self.languages``; None counts them all as the first.
        """
        hooks = [
            layer.register_forward_hook(functools.partial(self._count, name, languages))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _count(self, name: str, languages: Tensor | None, layer: MoEFFN, inputs: tuple, output: Tensor) -> None:
        x, mask = (*inputs, None)[:2]  # (B, T, D), (B, T)
        chosen, _ = layer.route(x)  # (B, T, K)
        weight = torch.ones_like(chosen) if mask is None else mask.unsqueeze(-1).expand_as(chosen).to(chosen.dtype)
        if languages is not None:
            chosen = chosen + layer.num_experts * languages[:, None, None]
        if name not in self.counts:
            self.counts[name] = chosen.new_zeros(len(self.languages) * layer.num_experts)
        self.counts[name].scatter_add_(0, chosen.flatten(), weight.flatten())

    def take(self, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Choices since the last call, (G, E) int64 on the CPU for each layer that ran.

        Args:
            total: adds a tensor up over all processes; called once, on every process.
        """
        ran = {name: layer for name, layer in self.layers.items() if name in self.counts}
        if not ran:
            return {}
        sizes = [len(self.languages) * layer.num_experts for layer in ran.values()]
        parts = total(torch.cat([self.counts[name] for name in ran])).cpu().split(sizes)
        self.counts = {}
        return {name: part.view(-1, layer.num_experts) for (name, layer), part in zip(ran.items(), parts)}

    def report(self, total: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """What :meth:`take` found, as figures for one line of a log and, apart, for every layer and language.

        Entropies are parts of the largest possible one: 1 is every expert alike, 0 is one expert for all.

        Returns:
            ``expert_entropy``, the mean over layers, and ``expert_max``, the largest share of an expert in any layer;
            and per layer ``experts/LAYER/entropy``, ``max``, ``min`` and ``share_E``, per language between the two.
        """
        line, details, entropies, largest = {}, {}, [], []
        for layer, counts in self.take(total).items():
            shares, entropy = _shares(counts.sum(0))
            entropies.append(entropy)
            largest.append(max(shares))
            details |= _figures(f"{TOPIC}/{layer}", shares, entropy)
            for language, row in zip(self.languages, counts):
                if language and row.any():
                    details |= _figures(f"{TOPIC}/{layer}/{language}", *_shares(row))
        if entropies:
            line = {"expert_entropy": sum(entropies) / len(entropies), "expert_max": max(largest)}
        return line, details


def _shares(counts: Tensor) -> tuple[list[float], float]:
    """Each expert's share, and the entropy of them as a part of the largest possible one; of counts (E,)."""
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return shares, entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


def _figures(name: str, shares: Sequence[float], entropy: float) -> dict[str, float]:
    figures = {"entropy": entropy, "max": max(shares), "min": min(shares)}
    figures |= {f"share_{expert}": share for expert, share in enumerate(shares)}
    return {f"{name}/{figure}": value for figure, value in figures.items()}
