"""Loose inputs: what is heard does not depend on how samples are given, and what cannot be samples is refused."""

import numpy as np
import pytest
import torch

from funasr_mooer.border.inputs import read_inputs
from funasr_mooer.data.features import Features
from funasr_mooer.errors import DataError

PCM = (8000 * np.sin(np.arange(8000) * 0.1)).astype(np.int16)
WAVE = PCM / np.float32(32768)
FEATURES = Features()


def read(item, **config):
    return read_inputs([item], None, ["utt"], config, FEATURES, max_audio_s=30, silence_dbfs=-75)


@pytest.mark.parametrize(
    "item",
    [PCM, PCM.astype(np.int32) << 16, WAVE.astype(np.float64), WAVE.tolist(), torch.from_numpy(WAVE)[None]],
    ids=["int16", "int32", "float64", "list", "(1, N)"],
)
def test_samples_of_any_kind_are_one_wave(item):
    found = read(item)
    assert found.warnings == [""]
    torch.testing.assert_close(found.feats, FEATURES(WAVE)[None])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (PCM.tolist(), "utt: int64 samples have no known scale; give int16, or floats in"),
        ((PCM // 256 + 128).astype(np.uint8), "utt: uint8 samples"),
        (PCM.astype(np.float32), "utt: samples up to 7999; floats lie in"),
        (np.full(8000, np.nan, np.float32), "utt: holds NaN"),
        (np.zeros((2, 3, 4), np.float32), "utt: expected samples"),
        ({}, "utt: cannot take audio from a dict"),
    ],
)
def test_what_cannot_be_samples_is_refused(item, message):
    with pytest.raises(DataError, match=message):
        read(item)


@pytest.mark.parametrize("fs", [0, -5, "8k", 10**9])
def test_a_sample_rate_that_cannot_be_is_refused(fs):
    with pytest.raises(DataError, match=f"fs={fs}"):
        read(WAVE, fs=fs)
