"""Masks by their definition, and draws at sizes where WeNet's code stops with an error."""

import pytest
import torch

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.masks import attention_bias, chunk_mask, draw_chunk, padding_mask, speech_mask


def test_a_frame_sees_its_chunk_and_so_many_before_it():
    assert chunk_mask(5, 2, 1).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_padding_mask_marks_speech():
    assert padding_mask(torch.tensor([2, 0, 3]), 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_a_cpu_is_spared_a_mask_of_speech_alone_and_an_accelerator_is_not_asked():
    lengths = torch.tensor([3, 3])
    assert speech_mask(lengths, 3) is None
    assert torch.equal(speech_mask(lengths, 4), padding_mask(lengths, 4))
    assert speech_mask(lengths.to("meta"), 3).shape == (2, 3)  # what is asked about its values, meta refuses


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dynamic_left", [True, False])
def test_tiny_batches_draw_a_usable_chunk(size, dynamic_left):
    for _ in range(20):
        chunk, left = draw_chunk(size, dynamic_left)
        assert chunk_mask(size, chunk, left).any(dim=1).all()


def test_rows_that_see_nothing_stay_finite():
    bias = attention_bias(torch.zeros(1, 2, 3).bool(), torch.float32)
    assert torch.isfinite((torch.randn(1, 1, 2, 3) + bias).softmax(-1)).all()


def test_chunks_of_zero_frames_are_an_error():
    with pytest.raises(ConfigError, match="chunk_size=0: a chunk holds at least 1 frame"):
        chunk_mask(4, 0)
