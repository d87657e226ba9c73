"""Training audio made more varied: speed, loudness, noise, features masked, replaced, cut; the same after a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from funasr_mooer.data.audio import SAMPLE_RATE, resample, to_float
from funasr_mooer.errors import ConfigError

WAVEFORM, FEATURES, SPANS, TAIL = 0, 1, 2, 3  # streams of random numbers of one utterance

Box = tuple[int, int, int, int]  # what a mask hides: stacked frames [start, stop), mel bins [low, high)
Span = tuple[int, int, int]  # what is replaced: stacked frames [start, stop), by those so many frames earlier


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
        sub_spans: SpecSub (U2++, arXiv 2106.05642): spans per utterance that are replaced by earlier ones of it.
        sub_span_ms: longest of them.
        trim_ms: SpecTrim (WeNet): up to this much of the end is cut off, where that is less than half; 0 for nothing.
    """

    speed: list[float] = dataclasses.field(default_factory=list)
    gain_db: float = 0.0
    noise_snr_db: list[float] = dataclasses.field(default_factory=list)
    noise_probability: float = 0.5
    freq_masks: int = 0
    freq_mask_bins: int = 10
    time_masks: int = 0
    time_mask_ms: float = 300.0
    sub_spans: int = 0
    sub_span_ms: float = 300.0
    trim_ms: float = 0.0

    def __post_init__(self) -> None:
        if any(not 0.5 <= factor <= 2 for factor in self.speed):
            raise ConfigError(f"dataset_conf.augment.speed={self.speed}: factors lie between 0.5 and 2")
        if self.noise_snr_db and (len(self.noise_snr_db) != 2 or self.noise_snr_db[0] > self.noise_snr_db[1]):
            raise ConfigError(f"dataset_conf.augment.noise_snr_db={self.noise_snr_db}: give [lowest, highest]")
        for name in ("sub_spans", "sub_span_ms", "trim_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"dataset_conf.augment.{name}={getattr(self, name)} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is done to the features of one utterance: hidden boxes, replaced spans, and how many frames are kept."""

    boxes: list[Box]
    spans: list[Span]
    kept: int


class Augment:
    """Applies an :class:`AugmentConf`; what happens to an utterance depends on (seed, epoch, utterance) only.

    Args:
        conf: what to do.
        seed: of the run.
        num_bins: mel bins of the frontend; a stacked frame holds several times as many.
        frame_ms: stride of the features that are changed.
    """

    def __init__(self, conf: AugmentConf, seed: int = 0, num_bins: int = 80, frame_ms: float = 60.0):
        if conf.freq_masks and conf.freq_mask_bins >= num_bins:
            raise ConfigError(f"dataset_conf.augment.freq_mask_bins={conf.freq_mask_bins}: use less than {num_bins}")
        self.conf, self.seed, self.num_bins = conf, seed, num_bins
        self.mask_frames = max(1, round(conf.time_mask_ms / frame_ms))
        self.span_frames = max(1, round(conf.sub_span_ms / frame_ms))
        self.tail_frames = round(conf.trim_ms / frame_ms)
        self.changes_waveforms = bool(conf.speed or conf.gain_db or conf.noise_snr_db)
        self.changes_lengths = bool(conf.speed or self.tail_frames)
        self.masks = bool(conf.freq_masks or conf.time_masks)
        self.changes_features = self.masks or bool(conf.sub_spans or self.tail_frames)

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

    def changes(self, frames: int, epoch: int, utterance: int) -> Changes:
        """What SpecAug, SpecSub and SpecTrim do to an utterance of so many stacked frames."""
        given = (frames, epoch, utterance)
        return Changes(self.boxes(*given), self.spans(*given), self.kept(*given))

    def change_(self, feats: Tensor, epoch: int, utterance: int) -> int:
        """Make these changes to normalised features (T, stack * num_bins), in place.

        Returns:
            frames that stay; those behind them are zero.
        """
        changes = self.changes(len(feats), epoch, utterance)
        change_(feats, changes, self.num_bins)
        return changes.kept

    def boxes(self, frames: int, epoch: int, utterance: int) -> list[Box]:
        """What SpecAug hides of an utterance of so many stacked frames."""
        if not self.masks or frames == 0:
            return []
        conf, rng = self.conf, np.random.default_rng((self.seed, epoch, utterance, FEATURES))
        found = []
        for _ in range(conf.freq_masks):
            width = int(rng.integers(conf.freq_mask_bins + 1))
            start = int(rng.integers(self.num_bins - width + 1))
            found.append((0, frames, start, start + width))
        for _ in range(conf.time_masks):
            width = int(rng.integers(min(self.mask_frames, frames // (2 * conf.time_masks)) + 1))
            start = int(rng.integers(frames - width + 1))
            found.append((start, start + width, 0, self.num_bins))
        return found

    def mask_(self, feats: Tensor, epoch: int, utterance: int) -> None:
        """Hide these boxes of normalised features (T, stack * num_bins), in place."""
        hide_(feats, self.boxes(len(feats), epoch, utterance), self.num_bins)

    def spans(self, frames: int, epoch: int, utterance: int) -> list[Span]:
        """What SpecSub replaces in an utterance of so many stacked frames, and from how much earlier it takes it."""
        if not self.conf.sub_spans or frames == 0:
            return []
        rng, found = np.random.default_rng((self.seed, epoch, utterance, SPANS)), []
        for _ in range(self.conf.sub_spans):
            start, width = int(rng.integers(frames)), int(rng.integers(1, self.span_frames + 1))
            found.append((start, min(start + width, frames), int(rng.integers(start + 1))))
        return found

    def kept(self, frames: int, epoch: int, utterance: int) -> int:
        """How many of so many stacked frames SpecTrim leaves: more than half of them."""
        if self.tail_frames == 0:
            return frames
        width = int(np.random.default_rng((self.seed, epoch, utterance, TAIL)).integers(1, self.tail_frames + 1))
        return frames - width if 2 * width < frames else frames

    def shortest(self, samples: np.ndarray) -> np.ndarray:
        """At least so many samples are left, (n,), of utterances of ``samples`` (n,)."""
        fast = samples * SAMPLE_RATE // self.rates[1]
        tail = int(self.conf.trim_ms * SAMPLE_RATE / 1000)
        return fast - np.minimum(tail, fast // 2)


def change_(feats: Tensor, changes: Changes, num_bins: int) -> None:
    """Make changes to normalised features (T, stack * num_bins), in place; what is not kept becomes zero."""
    hide_(feats, changes.boxes, num_bins)
    replace_(feats, changes.spans)
    feats[changes.kept :] = 0


def hide_(feats: Tensor, boxes: Sequence[Box], num_bins: int) -> None:
    """Set boxes of normalised features (T, stack * num_bins) to 0, their mean, in place.

    A box hides the same mel bins in each of the stacked frames.
    """
    if not boxes:
        return
    bins = feats.view(len(feats), -1, num_bins)  # (T, stack, bins)
    for start, stop, low, high in boxes:
        bins[start:stop, :, low:high] = 0


def replace_(feats: Tensor, spans: Sequence[Span]) -> None:
    """Replace spans of features (T, F) by what stood earlier in them, in place; T may be less than was planned for."""
    original = feats.clone() if spans else feats
    for start, stop, back in spans:
        end = min(stop, len(feats))
        if start < end:
            feats[start:end] = original[start - back : end - back]


def _rate(factor: float) -> int:
    """A speed as a sample rate, in steps of 100 Hz, which keep the resampling filter small."""
    return round(SAMPLE_RATE * factor / 100) * 100
