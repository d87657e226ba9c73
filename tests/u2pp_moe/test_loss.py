"""The attention decoder's teaching and loss, by their definitions."""

import torch
import torch.nn.functional as F

from funasr_mooer.modules.splice import IGNORE_INDEX as X
from funasr_mooer.u2pp_moe.loss import accuracy, smoothed_loss, teaching

SOS, EOS = 7, 8


def test_a_decoder_reads_what_came_before_and_says_what_comes_next():
    tokens, lengths = torch.tensor([[1, 2, 3], [4, -1, -1]]), torch.tensor([3, 1])
    taught = teaching(tokens, lengths, SOS, EOS)
    assert taught.inputs.tolist() == [[SOS, 1, 2, 3], [SOS, 4, EOS, EOS]]
    assert taught.targets.tolist() == [[1, 2, 3, EOS], [4, EOS, X, X]]
    assert taught.lengths.tolist() == [4, 2]
    backwards = teaching(tokens, lengths, SOS, EOS, backwards=True)
    assert backwards.inputs.tolist() == [[SOS, 3, 2, 1], [SOS, 4, EOS, EOS]]
    assert backwards.targets.tolist() == [[3, 2, 1, EOS], [4, EOS, X, X]]


def test_the_loss_is_the_divergence_from_smoothed_labels():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 9), torch.tensor([[1, 2, 3, 8], [4, 8, X, X]])
    for smoothing in (0.0, 0.1, 0.5):
        real = targets != X
        labels = torch.full((6, 9), smoothing / 8)
        labels.scatter_(1, targets[real][:, None], 1 - smoothing)
        expected = F.kl_div(logits[real].log_softmax(-1), labels, reduction="sum")
        torch.testing.assert_close(smoothed_loss(logits, targets, smoothing), expected)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=X)
    torch.testing.assert_close(smoothed_loss(logits, targets, 0.0), cross_entropy)


def test_accuracy_counts_labelled_places_only():
    logits = F.one_hot(torch.tensor([[1, 2, 0], [3, 0, 0]]), 4).float()
    assert float(accuracy(logits, torch.tensor([[1, 3, X], [3, X, X]]))) == torch.tensor(2 / 3)
