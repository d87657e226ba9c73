"""Features equal FunASR's WavFrontend and the numbers of the original MooER."""

import numpy as np
import pytest
import torch

from funasr_mooer.data.audio import read_audio
from funasr_mooer.data.cmvn import compute_cmvn, read_cmvn, write_cmvn
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError

UTTS = ["utt1_zh", "utt2_en", "utt3_mix"]


@pytest.fixture(scope="module")
def reference(golden):
    from safetensors.torch import load_file

    return load_file(golden / "mooer/golden/frontend.safetensors")


@pytest.fixture(scope="module")
def mooer(golden):
    return Features({"cmvn_file": str(golden / "mooer/release/paraformer_encoder/am.mvn")})


def noise(seconds, seed=0):
    return (np.random.default_rng(seed).standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32)


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("utt", UTTS)
def test_each_stage_equals_the_original(golden, reference, mooer, utt):
    x = read_audio(golden / f"mooer/wav/{utt}.wav")
    close(mooer.fbank(x), reference[f"{utt}.fbank"], 1e-3)
    close(mooer.lfr(reference[f"{utt}.fbank"]), reference[f"{utt}.lfr"], 0)
    close(mooer(x), reference[f"{utt}.cmvn"], 3e-4)


def test_resampled_stereo_equals_the_original(golden, reference, mooer):
    close(mooer(read_audio(golden / "mooer/wav/stereo_22k.wav")), reference["stereo_22k.cmvn"], 3e-4)


def test_stacking_repeats_the_edges_as_the_original(reference):
    toy = Features({"n_mels": 2})
    for T in range(1, 15):
        close(toy.lfr(torch.arange(2.0 * T).view(T, 2)), reference[f"lfr_toy.T{T}"], 0)


@pytest.mark.parametrize("seconds", [0.1, 0.5, 3.3, 30])
@pytest.mark.parametrize("lfr", [(7, 6), (1, 1), (5, 3)])
def test_features_equal_funasr(golden, seconds, lfr):
    frontend = pytest.importorskip("funasr.frontends.wav_frontend")
    conf = {"lfr_m": lfr[0], "lfr_n": lfr[1]}
    if lfr == (7, 6):
        conf["cmvn_file"] = str(golden / "mooer/release/paraformer_encoder/am.mvn")
    x = noise(seconds)
    theirs, lengths = frontend.WavFrontend(dither=0.0, **conf)(torch.from_numpy(x)[None], [len(x)])
    ours = Features(conf)
    close(ours(x), theirs[0], 1e-3 if lfr != (7, 6) else 3e-4)
    assert ours.num_frames(len(x)) == lengths[0]


@pytest.mark.parametrize("samples", [0, 1, 160, 399])
def test_audio_below_one_frame_gives_no_frames(samples):
    features = Features()
    assert features(noise(1)[:samples]).shape == (0, 560)
    assert features.num_frames(samples) == 0
    assert features.fbank(noise(1)[:samples]).shape == (0, 80)


def test_a_batch_equals_one_by_one_and_is_zero_beyond(mooer):
    waves = [noise(s, i) for i, s in enumerate([1.0, 0.01, 2.37, 0.1])]
    feats, lengths = mooer.batch(waves, multiple=16)
    assert feats.shape[1] % 16 == 0
    for row, length, x in zip(feats, lengths, waves):
        close(row[:length], mooer(x), 0)
        assert (row[length:] == 0).all()
    np.testing.assert_array_equal(mooer.num_frames(np.array([len(x) for x in waves])), lengths.numpy())
    assert mooer.batch([])[0].shape == (0, 0, 560)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_padded_waves_give_the_same_all_at_once_whatever_lies_beyond_them(mooer, kind):
    waves = [noise(s, i) for i, s in enumerate([1.0, 0.01, 2.37, 0.025, 0.0, 0.1, 3.3])]
    waves = [(x * 32768).astype(np.int16) if kind is np.int16 else x for x in waves]
    lengths = torch.tensor([len(x) for x in waves])
    feats, frames = mooer.batch(waves, multiple=8)
    for width in (int(lengths.max()), int(lengths.max()) + 777):
        padded = torch.from_numpy(np.stack([np.pad(x, (0, width - len(x)), constant_values=1) for x in waves]))
        found = mooer.padded(padded, lengths, feats.shape[1])
        close(found, feats, 1e-4)
        assert all((row[n:] == 0).all() for row, n in zip(found, frames.tolist()))
    assert mooer.padded(padded[1:2, :100], lengths[1:2], 0).shape == (1, 0, 560)


def test_int16_and_float_samples_give_the_same(mooer):
    pcm = (noise(1) * 32767).astype(np.int16)
    pcm.flags.writeable = False
    close(mooer(pcm), mooer(pcm / np.float32(32768)), 0)


def test_cmvn_statistics_are_computed_written_and_read(tmp_path):
    waves = [noise(2, i) for i in range(3)]
    plain = Features()
    write_cmvn(compute_cmvn(map(plain, waves)), tmp_path / "am.mvn")
    feats = torch.cat([Features({"cmvn_file": str(tmp_path / "am.mvn")})(x) for x in waves])
    close(feats.mean(0), torch.zeros(560), 1e-3)
    close(feats.std(0, correction=0), torch.ones(560), 1e-3)
    theirs = pytest.importorskip("funasr.frontends.wav_frontend").load_cmvn(tmp_path / "am.mvn")
    close(read_cmvn(tmp_path / "am.mvn"), theirs, 0)


def test_the_doors_of_the_frontend(tmp_path):
    with pytest.raises(ConfigError, match="use one of hamming"):
        Features({"window": "kaiser"})
    with pytest.raises(ConfigError, match="dither: 0.0"):
        Features({"dither": 1.0})
    with pytest.raises(ConfigError, match="no such file"):
        Features({"cmvn_file": str(tmp_path / "none.mvn")})
    (tmp_path / "bad.mvn").write_text("hello")
    with pytest.raises(DataError, match="AddShift"):
        Features({"cmvn_file": str(tmp_path / "bad.mvn")})
    write_cmvn(torch.ones(2, 80), tmp_path / "small.mvn")
    with pytest.raises(ConfigError, match="holds 80 values; lfr_m \\* n_mels is 560"):
        Features({"cmvn_file": str(tmp_path / "small.mvn")})
    with pytest.raises(DataError, match="no utterance"):
        compute_cmvn([Features()(noise(0.01))])
