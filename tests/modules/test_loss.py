"""Cross-entropy in chunks equals cross-entropy, with and without gradients for the head."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funasr_mooer.modules.loss import cross_entropy

N, D, V = 13, 3, 50


class Box:
    """A tensor that a graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


def problem(trained):
    torch.manual_seed(0)
    head, hidden = nn.Linear(D, V), torch.randn(N, D, requires_grad=True)
    return head.requires_grad_(trained), hidden, torch.randint(0, V, (N,))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("positions", [1, 4, N, 100])
def test_chunks_give_the_loss_and_gradients_of_the_whole(trained, positions):
    head, hidden, targets = problem(trained)
    loss, hits = cross_entropy(head, hidden, targets, positions * V)
    (3 * loss).backward()
    found = [hidden.grad, *[p.grad for p in head.parameters() if trained]]

    head, hidden, targets = problem(trained)
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert hits == (logits.argmax(-1) == targets).sum()
    for a, b in zip(found, [hidden.grad, *[p.grad for p in head.parameters() if trained]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_no_logits_are_kept_for_the_backward_pass(trained):
    head, hidden, targets = problem(trained)
    kept = weakref.WeakSet()

    def keep(tensor):
        box = Box(tensor)
        kept.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        loss, _ = cross_entropy(head, hidden, targets, 4 * V)
    assert max(box.tensor.numel() for box in kept) < V
    loss.backward()


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    head, hidden, _ = problem(False)
    loss, hits = cross_entropy(head, hidden[:0], torch.zeros(0, dtype=torch.long), 4 * V)
    loss.backward()
    assert (loss, hits) == (0, 0)
    assert not hidden.grad.any()
