"""Audio embeddings take the place of placeholders; rows a reader can check by eye."""

import pytest
import torch

from funasr_mooer.modules.splice import AUDIO_ID, IGNORE_INDEX, splice_audio

A, P, X = AUDIO_ID, 0, IGNORE_INDEX  # audio placeholder, padding, ignored label


def splice(ids, audio, lengths, labels=None, side="right"):
    """Splice with the ids themselves as one-number embeddings."""
    ids = torch.tensor(ids)
    labels = None if labels is None else torch.tensor(labels)
    out = splice_audio(
        ids, ids != P, ids[..., None].float(), torch.tensor(audio)[..., None], torch.tensor(lengths), labels, side
    )
    return out.inputs_embeds[..., 0].tolist(), out.attention_mask.int().tolist(), out.labels


def test_each_placeholder_becomes_its_audio():
    embeds, mask, labels = splice(
        [[A, 5, 6, 7], [A, 5, 8, P]], [[0.1, 0.2, 9.9], [0.3, 0.4, 0.5]], [2, 3], [[X, X, 6, 7], [X, X, 8, X]]
    )
    assert embeds == [pytest.approx([0.1, 0.2, 5, 6, 7]), pytest.approx([0.3, 0.4, 0.5, 5, 8])]
    assert mask == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [[X, X, X, 6, 7], [X, X, X, X, 8]]


def test_shorter_rows_are_padded_on_the_right_for_training():
    embeds, mask, labels = splice([[A, 5], [A, 5]], [[0.1, 0.2, 0.3], [0.4, 9, 9]], [3, 1], [[X, 5], [X, 5]])
    assert embeds == [pytest.approx([0.1, 0.2, 0.3, 5]), pytest.approx([0.4, 5, 0, 0])]
    assert mask == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert labels.tolist() == [[X, X, X, 5], [X, 5, X, X]]


def test_shorter_rows_are_padded_on_the_left_for_generation():
    embeds, mask, _ = splice([[A, 5], [A, 5]], [[0.1, 0.2, 0.3], [0.4, 9, 9]], [3, 1], side="left")
    assert embeds == [pytest.approx([0.1, 0.2, 0.3, 5]), pytest.approx([0, 0, 0.4, 5])]
    assert mask == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_row_may_hold_several_audios_anywhere():
    embeds, _, _ = splice([[7, A, 8, A, 9], [7, A, P, P, P]], [[0.1, 0.2], [0.3, 0.0], [0.5, 0.6]], [2, 1, 2])
    assert embeds[0] == pytest.approx([7, 0.1, 0.2, 8, 0.3, 9])
    assert embeds[1] == pytest.approx([7, 0.5, 0.6, 0, 0, 0])


def test_audio_of_no_length_leaves_the_prompt_alone():
    embeds, mask, _ = splice([[A, 5, 6]], [[9.0]], [0])
    assert embeds == [[5, 6]]
    assert mask == [[1, 1]]


def test_another_number_of_audios_is_refused():
    with pytest.raises(ValueError, match="2 audio placeholders in the prompts for 1 audios"):
        splice([[A, A, 5]], [[0.1]], [1])


def test_positions_of_a_packed_row_know_their_utterance():
    ids = torch.tensor([[A, 5, 6, A, 7, P]])
    numbers, embeds = torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.zeros(1, 6, 1)
    out = splice_audio(ids, ids != P, embeds, torch.ones(2, 3, 1), torch.tensor([2, 3]), segments=numbers)
    assert out.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]
    assert out.inputs_embeds[..., 0].tolist() == [[1, 1, 0, 0, 1, 1, 1, 0]]


def test_gradients_reach_the_audio_and_nothing_is_changed_in_place():
    ids = torch.tensor([[A, 5]])
    embeds, audio = torch.ones(1, 2, 3), torch.ones(1, 4, 3, requires_grad=True)
    out = splice_audio(ids, torch.ones_like(ids), embeds, audio, torch.tensor([2]))
    out.inputs_embeds.sum().backward()
    assert audio.grad[0, :, 0].tolist() == [1, 1, 0, 0]
    assert ids.tolist() == [[A, 5]]
    assert embeds.eq(1).all()
