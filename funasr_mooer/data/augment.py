"""Training audio made more varied: speed, loudness, noise, masked features; the same again after a restart."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from funasr_mooer.data.audio import SAMPLE_RATE, resample, to_float
from funasr_mooer.errors import ConfigError

WAVEFORM, FEATURES = 0, 1  # streams of random numbers of one utterance


@dataclasses.dataclass(frozen=True)
class AugmentConf:
    """``dataset_conf.augment``; everything is off by default.

    Attributes:
        speed: factors, one drawn per utterance; [0.9, 1.0, 1.1] is usual. Pitch moves along.
        gain_db: loudness is changed by up to this much in either direction.
        noise_snr_db: [lowest, highest] signal-to-noise ratio of added white noise.
        noise_probability: fraction of utterances that get it.
        freq_masks: SpecAug masks over mel bins per utterance.
        freq_mask_bins: widest of them; fewer than the frontend's n_mels.
        time_masks: SpecAug masks over time per utterance; together they hide at most half of it.
        time_mask_ms: widest of them.
    """

    speed: list[float] = dataclasses.field(default_factory=list)
    gain_db: float = 0.0
    noise_snr_db: list[float] = dataclasses.field(default_factory=list)
    noise_probability: float = 0.5
    freq_masks: int = 0
    freq_mask_bins: int = 10
    time_masks: int = 0
    time_mask_ms: float = 300.0

    def __post_init__(self) -> None:
        if any(not 0.5 <= factor <= 2 for factor in self.speed):
            raise ConfigError(f"dataset_conf.augment.speed={self.speed}: factors lie between 0.5 and 2")
        if self.noise_snr_db and (len(self.noise_snr_db) != 2 or self.noise_snr_db[0] > self.noise_snr_db[1]):
            raise ConfigError(f"dataset_conf.augment.noise_snr_db={self.noise_snr_db}: give [lowest, highest]")


class Augment:
    """Applies an :class:`AugmentConf`; what happens to an utterance depends on (seed, epoch, utterance) only.

    Args:
        conf: what to do.
        seed: of the run.
        num_bins: mel bins of the frontend; a stacked frame holds several times as many.
        frame_ms: stride of the features that are masked.
    """

    def __init__(self, conf: AugmentConf, seed: int = 0, num_bins: int = 80, frame_ms: float = 60.0):
        if conf.freq_masks and conf.freq_mask_bins >= num_bins:
            raise ConfigError(f"dataset_conf.augment.freq_mask_bins={conf.freq_mask_bins}: use less than {num_bins}")
        self.conf, self.seed, self.num_bins = conf, seed, num_bins
        self.mask_frames = max(1, round(conf.time_mask_ms / frame_ms))
        self.changes_waveforms = bool(conf.speed or conf.gain_db or conf.noise_snr_db)
        self.masks = bool(conf.freq_masks or conf.time_masks)

    @property
    def rates(self) -> tuple[int, int]:
        """The slowest and the fastest speed, as the sample rate that audio is taken to have."""
        rates = [_rate(factor) for factor in self.conf.speed] or [SAMPLE_RATE]
        return min(rates), max(rates)

    def waveform(self, x: np.ndarray, epoch: int, utterance: int) -> np.ndarray:
        """(N,) int16 or float -> (N / speed,) float32 in [-1, 1), or ``x`` itself when nothing is on."""
        if not self.changes_waveforms:
            return x
        conf, rng = self.conf, np.random.default_rng((self.seed, epoch, utterance, WAVEFORM))
        x = to_float(x)
        if conf.speed:
            x = resample(x, _rate(conf.speed[rng.integers(len(conf.speed))]))
        if conf.gain_db:
            x = x * np.float32(10 ** (rng.uniform(-conf.gain_db, conf.gain_db) / 20))
        if conf.noise_snr_db and rng.random() < conf.noise_probability:
            level = np.sqrt(np.mean(x**2)) * 10 ** (-rng.uniform(*conf.noise_snr_db) / 20)
            x = x + np.float32(level) * rng.standard_normal(len(x), dtype=np.float32)
        return x

    def mask_(self, feats: Tensor, epoch: int, utterance: int) -> None:
        """SpecAug on normalised features (T, stack * num_bins), in place: masked values become 0, their mean.

        A frequency mask hides the same mel bins in each of the stacked frames.
        """
        if not self.masks or len(feats) == 0:
            return
        conf, rng = self.conf, np.random.default_rng((self.seed, epoch, utterance, FEATURES))
        bins = feats.view(len(feats), -1, self.num_bins)  # (T, stack, bins)
        for _ in range(conf.freq_masks):
            width = rng.integers(conf.freq_mask_bins + 1)
            start = rng.integers(self.num_bins - width + 1)
            bins[:, :, start : start + width] = 0
        for _ in range(conf.time_masks):
            width = rng.integers(min(self.mask_frames, len(feats) // (2 * conf.time_masks)) + 1)
            start = rng.integers(len(feats) - width + 1)
            feats[start : start + width] = 0


def _rate(factor: float) -> int:
    """A speed as a sample rate, in steps of 100 Hz, which keep the resampling filter small."""
    return round(SAMPLE_RATE * factor / 100) * 100
