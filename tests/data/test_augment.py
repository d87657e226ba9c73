"""Augmentation is off by default, repeats exactly, and masks what it says."""

import dataclasses

import numpy as np
import pytest
import torch

from funasr_mooer.data.augment import Augment, AugmentConf, change_
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError

X = np.sin(np.arange(32000) * 0.2).astype(np.float32) * 0.2
ALL = AugmentConf(speed=[0.9, 1.0, 1.1], gain_db=6, noise_snr_db=[10, 20], freq_masks=2, time_masks=2)


def test_nothing_happens_by_default():
    augment = Augment(AugmentConf())
    feats = torch.randn(20, 560)
    kept = feats.clone()
    augment.mask_(feats, 0, 0)
    assert augment.waveform(X, 0, 0) is X
    assert torch.equal(feats, kept)


def test_the_same_utterance_and_epoch_give_the_same_and_others_do_not():
    a = Augment(ALL, seed=1).waveform(X, 3, 5)
    np.testing.assert_array_equal(a, Augment(ALL, seed=1).waveform(X, 3, 5))
    for seed, epoch, utterance in [(2, 3, 5), (1, 4, 5), (1, 3, 6)]:
        b = Augment(ALL, seed=seed).waveform(X, epoch, utterance)
        assert len(a) != len(b) or np.abs(a - b).max() > 1e-4


def test_speed_changes_length_and_pitch_together():
    fast = Augment(AugmentConf(speed=[1.1])).waveform(X, 0, 0)
    assert len(fast) == pytest.approx(len(X) / 1.1, abs=2)
    np.testing.assert_allclose(fast[500:600], 0.2 * np.sin(np.arange(500, 600) * 0.22), atol=5e-3)


def test_gain_and_noise_stay_inside_their_ranges():
    gains = [np.abs(Augment(AugmentConf(gain_db=6)).waveform(X, 0, i)).max() / 0.2 for i in range(50)]
    assert 0.5 < min(gains) < 0.7
    assert 1.5 < max(gains) < 2
    conf = AugmentConf(noise_snr_db=[10, 10], noise_probability=1)
    noise = Augment(conf).waveform(X, 0, 0) - X
    assert 10 * np.log10(np.mean(X**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.2)


def test_frequency_masks_hide_the_same_mel_bins_in_all_stacked_frames():
    feats = torch.ones(30, 560)
    Augment(AugmentConf(freq_masks=1, freq_mask_bins=20), seed=2).mask_(feats, 0, 0)
    hidden = feats.view(30, 7, 80) == 0
    assert 0 < hidden[0, 0].sum() <= 20
    assert (hidden == hidden[0, 0]).all()


def test_time_masks_hide_whole_frames_and_at_most_half():
    for i in range(30):
        feats = torch.ones(10, 560)
        Augment(AugmentConf(time_masks=2, time_mask_ms=3000)).mask_(feats, 0, i)
        frames = feats.sum(1)
        assert set(frames.tolist()) <= {0.0, 560.0}
        assert (frames == 0).sum() <= 5
    Augment(AugmentConf(time_masks=2)).mask_(torch.ones(0, 560), 0, 0)


def test_augmented_audio_still_gives_features():
    assert len(Features()(Augment(ALL).waveform((X * 32767).astype(np.int16), 0, 0))) > 25


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="between 0.5 and 2"):
        AugmentConf(speed=[9.0])
    with pytest.raises(ConfigError, match=r"give \[lowest, highest\]"):
        AugmentConf(noise_snr_db=[20, 10])
    with pytest.raises(ConfigError, match="use less than 80"):
        Augment(AugmentConf(freq_masks=1, freq_mask_bins=80))
    with pytest.raises(ConfigError, match="augment.trim_ms=-5 must be 0 or more"):
        AugmentConf(trim_ms=-5)


def numbered(frames, size=560):
    """Frame t holds t in every bin."""
    return torch.arange(float(frames))[:, None].repeat(1, size)


def test_spans_are_replaced_by_earlier_ones_of_the_same_utterance():
    augment, replaced = Augment(AugmentConf(sub_spans=2, sub_span_ms=300)), 0
    for i in range(40):
        feats = numbered(30)
        assert augment.change_(feats, 0, i) == 30
        frames, now = torch.arange(30), feats[:, 0].long()
        assert (feats == feats[:, :1]).all()
        assert (now <= frames).all()
        moved = frames[now != frames]
        assert len(moved) <= 2 * 5  # 300 ms are 5 frames of 60 ms
        replaced += len(moved)
        expected = numbered(30)
        for start, stop, back in augment.spans(30, 0, i):
            expected[start:stop] = numbered(30)[start - back : stop - back]
        torch.testing.assert_close(feats, expected)
    assert replaced > 40


def test_the_tail_is_cut_by_up_to_its_limit_and_never_half_of_the_whole():
    augment = Augment(AugmentConf(trim_ms=300))
    kept = [augment.change_(numbered(30), 0, i) for i in range(80)]
    assert set(kept) == {25, 26, 27, 28, 29}
    assert {augment.kept(3, 0, i) for i in range(40)} == {2, 3}
    assert [augment.kept(n, 0, 0) for n in (0, 1, 2)] == [0, 1, 2]
    shortest = augment.shortest(np.array([16000, 4000]))
    assert shortest.tolist() == [16000 - 4800, 2000]


def test_spans_and_tails_repeat_exactly_and_leave_the_masks_as_they_were():
    conf = dataclasses.replace(ALL, sub_spans=3, trim_ms=600)
    found = {}
    for key in [(1, 3, 5), (1, 3, 5), (2, 3, 5), (1, 4, 5), (1, 3, 6)]:
        seed, epoch, utterance = key
        augment = Augment(conf, seed=seed)
        drawn = (augment.spans(90, epoch, utterance), augment.kept(90, epoch, utterance))
        assert found.setdefault(key, drawn) == drawn
        assert augment.boxes(90, epoch, utterance) == Augment(ALL, seed=seed).boxes(90, epoch, utterance)
    assert len({str(spans) for spans, _ in found.values()}) == 4


def test_features_that_were_cut_already_get_the_same_changes():
    augment = Augment(AugmentConf(sub_spans=3, trim_ms=600))
    for i in range(40):
        whole, changes = numbered(30), augment.changes(30, 0, i)
        cut = whole[: changes.kept].clone()
        for feats in (whole, cut):
            change_(feats, changes, 80)
        torch.testing.assert_close(cut, whole[: changes.kept])
