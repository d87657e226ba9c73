"""Cross-entropy over a large vocabulary without ever holding all logits."""

# Shapes: N labelled positions, D model size, V vocabulary, C positions of a chunk.

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cross_entropy(head: nn.Linear, hidden: Tensor, targets: Tensor, max_logits: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``head(hidden)``, in chunks where there are more than ``max_logits`` logits.

    Plain cross-entropy holds the (N, V) logits three times: as they are, normalised, and as gradients. In chunks it is
    (C, V), with the same result. A frozen head gets each chunk's gradient at once, while its logits are there (the idea
    of Liger-Kernel, arXiv 2410.10989), so nothing is computed twice; a head that is trained recomputes its logits.

    Args:
        head: D -> V.
        hidden: (N, D).
        targets: (N,) classes.
        max_logits: most logits that are held at once, a number of floats.

    Returns:
        the loss, 0-dim float32, and the number of positions where the target has the largest logit, 0-dim.
    """
    if len(targets) == 0:
        return hidden.sum().float() * 0, targets.new_zeros(())
    chunk = max(1, max_logits // head.out_features)
    score = functools.partial(_score, head)
    if torch.is_grad_enabled() and len(targets) > chunk:
        trained = any(parameter.requires_grad for parameter in head.parameters())
        whole = functools.partial(checkpoint, score, use_reentrant=False)
        score = whole if trained else functools.partial(_ScoreWithGradient.apply, head)
    scores = [score(h, t) for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    losses, hits = zip(*scores, strict=True)
    return torch.stack(losses).sum(), torch.stack(hits).sum()


def _score(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(C, D), (C,) -> summed loss and number of hits."""
    logits = head(hidden).float()  # (C, V)
    return F.cross_entropy(logits, targets, reduction="sum"), (logits.detach().argmax(-1) == targets).sum()


class _ScoreWithGradient(torch.autograd.Function):
    """:func:`_score` that keeps the gradient (C, D) in place of the logits (C, V)."""

    @staticmethod
    def forward(ctx: Any, head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss, hits = _score(head, leaf, targets)
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return loss.detach(), hits

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, of_hits: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * of_loss.to(gradient.dtype), None
