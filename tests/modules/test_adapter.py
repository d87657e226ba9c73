"""The adapter: one embedding per granularity, nothing leaks, settings that cannot work say so."""

import pytest
import torch

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.adapter import LinearAdapter


def test_padding_never_leaks():
    adapter = LinearAdapter(encoder_dim=8, llm_dim=16)
    x, lengths = torch.randn(1, 10, 8), torch.tensor([7])
    noisy = x.index_fill(1, torch.arange(7, 10), 1e4)
    (a, n), (b, _) = adapter(x, lengths), adapter(noisy, lengths)
    torch.testing.assert_close(a[:, : n[0]], b[:, : n[0]])


@pytest.mark.parametrize(("frames", "embeddings"), [(0, 0), (1, 0), (2, 1), (7, 3), (8, 4)])
def test_the_last_odd_frame_is_dropped(frames, embeddings):
    adapter = LinearAdapter(encoder_dim=8, llm_dim=16)
    out, lengths = adapter(torch.randn(1, frames, 8), torch.tensor([frames]))
    assert out.shape == (1, embeddings, 16)
    assert lengths.tolist() == [embeddings]


def test_a_granularity_that_is_no_multiple_names_those_that_are():
    with pytest.raises(ConfigError, match=r"use one of \[60, 120, 180, 240\]"):
        LinearAdapter(encoder_dim=8, llm_dim=16, granularity_ms=100)


def test_granularity_of_faster_encoders():
    assert LinearAdapter(encoder_dim=8, llm_dim=16, frame_ms=40, granularity_ms=120).k == 3
