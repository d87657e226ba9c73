"""CTC: the loss by definition, alignments by exhaustive search, and what happens at the edges."""

import itertools

import pytest
import torch

from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.modules.ctc import CTCHead, align, ctc_loss, greedy


def collapse(path, blank=0):
    return [k for i, k in enumerate(path) if k != blank and (i == 0 or path[i - 1] != k)]


def paths_of(tokens, frames, vocab):
    return [path for path in itertools.product(range(vocab), repeat=frames) if collapse(path) == tokens]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [2, 2], [1, 2, 1]])
def test_alignment_is_the_best_of_all_paths(tokens):
    torch.manual_seed(len(tokens))
    log_probs = torch.randn(6, 3).log_softmax(-1)
    scores = {path: sum(float(log_probs[t, k]) for t, k in enumerate(path)) for path in paths_of(tokens, 6, 3)}
    best = max(scores, key=scores.get)
    spans = align(log_probs, tokens, blank_id=0)
    ours = [0] * 6
    for token, (start, end) in zip(tokens, spans):
        ours[start:end] = [token] * (end - start)
    assert tuple(ours) == best


def test_loss_is_the_likelihood_of_all_paths_per_token():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 5, 3).log_softmax(-1)
    targets, target_lengths = torch.tensor([[1, 2], [2, 9]]), torch.tensor([2, 1])  # 9 is padding
    lengths = torch.tensor([5, 3])
    total = 0.0
    for b, (n, tokens) in enumerate(zip(lengths, ([1, 2], [2]))):
        likelihoods = [sum(log_probs[b, t, k] for t, k in enumerate(p)) for p in paths_of(tokens, int(n), 3)]
        total -= float(torch.stack(likelihoods).logsumexp(0))
    loss = ctc_loss(log_probs, lengths, targets, target_lengths, blank_id=0)
    assert float(loss) == pytest.approx(total / 3, rel=1e-5)


def test_impossible_targets_cost_nothing_and_keep_gradients_finite():
    head = CTCHead(4, 5, blank_id=0)
    loss = head.loss(torch.randn(1, 2, 4), torch.tensor([2]), torch.tensor([[1, 1, 1]]), torch.tensor([3]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(head.ctc_lo.weight.grad).all()


def test_greedy_stops_at_the_length_and_says_where_tokens_start():
    best = torch.tensor([[0, 3, 3, 0, 3, 2, 2, 4]])
    path = greedy(torch.nn.functional.one_hot(best, 5).float(), torch.tensor([7]), blank_id=0)[0]
    assert path.tokens == [3, 3, 2]
    assert path.frames == [1, 4, 5]


def test_the_blank_can_be_any_token():
    best = torch.tensor([[2, 0, 2, 0, 0]])
    assert greedy(torch.nn.functional.one_hot(best, 3).float(), torch.tensor([5]), blank_id=2)[0].tokens == [0, 0]


def test_alignment_of_too_short_audio_is_an_error():
    with pytest.raises(DataError, match="need at least 3 encoder frames, the audio has 2"):
        align(torch.zeros(2, 3), [1, 1], blank_id=0)


def test_blank_outside_the_vocabulary_is_an_error():
    with pytest.raises(ConfigError, match="blank_id=7 is outside the vocabulary of 7"):
        CTCHead(4, 7, blank_id=7)


def test_long_transcripts_align_too():
    spans = align(torch.zeros(150, 3).log_softmax(dim=-1), [1, 2] * 50, 0)
    assert len(spans) == 100


def test_an_utterance_of_many_tokens_is_aligned():
    tokens = [1, 2] * 100
    log_probs = torch.eye(3)[tokens].log_softmax(dim=-1)
    assert align(log_probs, tokens, blank_id=0) == [(t, t + 1) for t in range(200)]
