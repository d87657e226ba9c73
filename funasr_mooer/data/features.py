"""Waveforms to encoder input: Kaldi fbank, low frame rate stacking (LFR) and CMVN, in plain torch."""

# Shapes: N samples, T fbank frames of 10 ms, U stacked frames of 60 ms, M mel bins (80), F = lfr_m * M (560).

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.config import section
from funasr_mooer.errors import ConfigError, DataError

PREEMPHASIS = 0.97
LOWEST_HZ = 20.0  # of the mel filters; the highest is the Nyquist frequency
BLOCK = 512  # frames computed at once: their spectra stay in the cache, and an hour of audio needs no more memory
WINDOWS = {
    "hamming": lambda n: torch.hamming_window(n, periodic=False, dtype=torch.float64),
    "hanning": lambda n: torch.hann_window(n, periodic=False, dtype=torch.float64),
    "povey": lambda n: torch.hann_window(n, periodic=False, dtype=torch.float64) ** 0.85,
    "rectangular": lambda n: torch.ones(n, dtype=torch.float64),
}


@dataclasses.dataclass(frozen=True)
class FrontendConf:
    """FunASR's ``frontend_conf`` for ``WavFrontend``; the defaults are Paraformer's and MooER's."""

    fs: int = 16000  # Hz
    window: str = "hamming"
    n_mels: int = 80
    frame_length: float = 25  # ms
    frame_shift: float = 10  # ms
    lfr_m: int = 7  # frames stacked into one
    lfr_n: int = 6  # frames between two stacks
    dither: float = 0.0
    snip_edges: bool = True
    upsacle_samples: bool = True  # FunASR's spelling: [-1, 1) to 16-bit numbers first
    cmvn_file: str | None = None


class Features:
    """The frontend of every encoder here: equals FunASR's ``WavFrontend`` with ``dither: 0``.

    Audio too short for one 25 ms frame gives zero frames, never an error.

    Args:
        conf: a :class:`FrontendConf` or the mapping found under ``frontend_conf``.
        cmvn: (2, F) shift and scale, in place of reading ``cmvn_file``.

    Raises:
        ConfigError: an unknown window, dither, or statistics of another size.
    """

    def __init__(self, conf: FrontendConf | Mapping[str, Any] | None = None, cmvn: Tensor | None = None):
        if not isinstance(conf, FrontendConf):
            conf = section(FrontendConf, conf, "frontend_conf")
        if conf.window not in WINDOWS:
            raise ConfigError(f"frontend_conf.window={conf.window}; use one of {', '.join(WINDOWS)}")
        if conf.dither != 0:
            raise ConfigError(
                f"frontend_conf.dither={conf.dither}: features here repeat exactly; "
                "set dither: 0.0, and dataset_conf.augment.noise_snr_db for noise in training"
            )
        if not conf.snip_edges:
            raise ConfigError("frontend_conf.snip_edges=false is not supported; set it to true")
        self.conf = conf
        self.frame = int(conf.fs * conf.frame_length / 1000)  # samples
        self.hop = int(conf.fs * conf.frame_shift / 1000)
        self.fft = 1 << (self.frame - 1).bit_length()
        self.window = WINDOWS[conf.window](self.frame).float()
        self.mel = mel_filters(conf.n_mels, self.fft, conf.fs)  # (fft / 2 + 1, M)
        self.left = (conf.lfr_m - 1) // 2  # copies of the first frame before it
        if cmvn is None and conf.cmvn_file is not None:
            cmvn = read_cmvn(conf.cmvn_file)
        self.cmvn = None if cmvn is None else torch.as_tensor(cmvn, dtype=torch.float32)
        if self.cmvn is not None and self.cmvn.shape != (2, self.output_size()):
            raise ConfigError(
                f"frontend_conf.cmvn_file={conf.cmvn_file} holds {self.cmvn.shape[1]} values; "
                f"lfr_m * n_mels is {self.output_size()}"
            )

    @property
    def frame_ms(self) -> float:
        """Stride of the output, ms."""
        return self.conf.frame_shift * self.conf.lfr_n

    def output_size(self) -> int:
        """F, the size of one output frame."""
        return self.conf.n_mels * self.conf.lfr_m

    def num_frames(self, samples):
        """Output frames for a number of samples: an int, or an integer numpy array of them."""
        frames = (samples - self.frame) // self.hop + 1
        frames = np.maximum(frames, 0) if isinstance(frames, np.ndarray) else max(frames, 0)
        return -(-frames // self.conf.lfr_n)

    def __call__(self, waveform: Tensor | np.ndarray) -> Tensor:
        """(N,) float in [-1, 1), or int16, -> (U, F) float32."""
        feats, _ = self.batch([waveform])
        return feats[0]

    def batch(self, waveforms: Sequence[Tensor | np.ndarray], multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Waveforms (N_i,) -> feats (B, U, F), zero beyond each length, and lengths (B,) int64.

        Each utterance is computed alone, so that padding costs nothing, and written into its row once.

        Args:
            waveforms: float in [-1, 1), or int16.
            multiple: U is rounded up to a multiple of this.
        """
        lengths = torch.tensor([self.num_frames(len(x)) for x in waveforms], dtype=torch.int64)
        longest = int(lengths.max()) if len(waveforms) else 0
        longest = -(-longest // multiple) * multiple
        feats = torch.empty(len(waveforms), longest, self.output_size())
        for row, waveform, length in zip(feats, waveforms, lengths.tolist()):
            row[length:] = 0
            if length:
                self._write(waveform, row[:length])
        return feats, lengths

    def fbank(self, waveform: Tensor | np.ndarray) -> Tensor:
        """(N,) float in [-1, 1), or int16, -> log mel energies (T, M)."""
        x = self._samples(waveform)
        frames = max((len(x) - self.frame) // self.hop + 1, 0)
        out = torch.empty(frames, self.conf.n_mels)
        if frames:
            self._fbank(x, out)
        return out

    def lfr(self, fbank: Tensor) -> Tensor:
        """(T, M) -> (U, F): stacks of ``lfr_m`` frames, one every ``lfr_n``; the edges repeat."""
        T, M = fbank.shape
        stacks = -(-T // self.conf.lfr_n)
        edged = fbank.new_empty(self._edged(T, stacks), M)
        edged[self.left : self.left + T] = fbank
        return self._stack(edged, T, stacks).clone() if T else fbank.new_empty(0, M * self.conf.lfr_m)

    def normalise(self, feats: Tensor) -> Tensor:
        """CMVN of (..., F); a copy."""
        return feats.clone() if self.cmvn is None else (feats + self.cmvn[0]) * self.cmvn[1]

    def _write(self, waveform: Tensor | np.ndarray, out: Tensor) -> None:
        """Features of one utterance into ``out`` (U, F)."""
        x = self._samples(waveform)
        T = (len(x) - self.frame) // self.hop + 1
        edged = torch.empty(self._edged(T, len(out)), self.conf.n_mels)
        self._fbank(x, edged[self.left : self.left + T])
        stacks = self._stack(edged, T, len(out))
        if self.cmvn is None:
            out.copy_(stacks)
        else:
            torch.add(stacks, self.cmvn[0], out=out).mul_(self.cmvn[1])

    def _edged(self, T: int, stacks: int) -> int:
        """Frames that ``stacks`` stacks read, edges included."""
        return max(self.left + T, (stacks - 1) * self.conf.lfr_n + self.conf.lfr_m)

    def _stack(self, edged: Tensor, T: int, stacks: int) -> Tensor:
        """A strided view (U, F) of frames whose rows ``left .. left + T`` are set; sets the edges."""
        M = edged.shape[1]
        edged[: self.left] = edged[self.left]
        edged[self.left + T :] = edged[self.left + T - 1]
        return edged.as_strided((stacks, self.conf.lfr_m * M), (self.conf.lfr_n * M, 1))

    def _samples(self, waveform: Tensor | np.ndarray) -> Tensor:
        """(N,) float32 in the units of 16-bit numbers (unless ``upsacle_samples`` is off)."""
        is_int = waveform.dtype in (np.int16, torch.int16)
        if isinstance(waveform, np.ndarray):
            # astype copies int16, which may be a read-only view of a file; torch wants memory it may write.
            waveform = torch.from_numpy(np.require(waveform, np.float32, "W"))
        x = waveform.float()
        wanted, found = (1 if flag else 1 / 32768 for flag in (self.conf.upsacle_samples, is_int))
        return x if wanted == found else x * (wanted / found)

    def _fbank(self, x: Tensor, out: Tensor) -> None:
        """Log mel energies of samples (N,) into ``out`` (T, M)."""
        T = out.shape[0]
        # Kaldi removes each frame's mean m, then subtracts 0.97 of the sample before, at the frame's first sample of
        # itself. As all of this is linear, emphasis is computed once for the whole signal and 0.03 m taken off per frame.
        emphasised = torch.empty_like(x)
        torch.sub(x[1:], x[:-1], alpha=PREEMPHASIS, out=emphasised[1:])
        means = x.unfold(0, self.frame, self.hop).mean(dim=1)  # (T,)
        frames = emphasised.unfold(0, self.frame, self.hop)  # (T, frame), a view
        first = x[: (T - 1) * self.hop + 1 : self.hop] * ((1 - PREEMPHASIS) * self.window[0])
        buffer = torch.zeros(min(T, BLOCK), self.fft)
        for t in range(0, T, BLOCK):
            rows = slice(t, min(t + BLOCK, T))
            block = buffer[: rows.stop - t]
            windowed = block[:, : self.frame]
            torch.mul(frames[rows], self.window, out=windowed)
            windowed[:, 0] = first[rows]
            windowed.sub_(torch.outer(means[rows] * (1 - PREEMPHASIS), self.window))
            spectrum = torch.view_as_real(torch.fft.rfft(block))  # (t, fft / 2 + 1, 2)
            energy = spectrum.square_().sum(dim=-1) @ self.mel
            torch.log(energy.clamp_(min=torch.finfo(torch.float32).eps), out=out[rows])


def mel_filters(bins: int, fft: int, sample_rate: int) -> Tensor:
    """Kaldi's triangular filters (fft / 2 + 1, bins) from 20 Hz to the Nyquist frequency, linear in mel."""

    def to_mel(hz):
        return 1127.0 * np.log1p(np.asarray(hz, dtype=np.float64) / 700.0)

    edges = np.linspace(to_mel(LOWEST_HZ), to_mel(sample_rate / 2), bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    mel = to_mel(np.arange(fft // 2 + 1) * sample_rate / fft)[:, None]
    weights = np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    weights[-1] = 0  # Kaldi leaves out the bin at the Nyquist frequency
    return torch.from_numpy(np.maximum(weights, 0)).float()


def read_cmvn(path: str | os.PathLike) -> Tensor:
    """FunASR's ``am.mvn`` as (2, F) float32: row 0 is added, then row 1 multiplied.

    Raises:
        ConfigError: no such file.
        DataError: not in that format.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"frontend_conf.cmvn_file={path}: no such file")
    rows, wanted = {}, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if words[:1] in (["<AddShift>"], ["<Rescale>"]):
            wanted = words[0]
        elif words[:1] == ["<LearnRateCoef>"] and wanted:
            try:
                rows[wanted] = torch.tensor([float(word) for word in words[words.index("[") + 1 : words.index("]")]])
            except ValueError:
                raise DataError(f"{path}:{number}: expected '<LearnRateCoef> 0 [ numbers ]'") from None
            wanted = None
    if len(rows) != 2 or rows["<AddShift>"].shape != rows["<Rescale>"].shape:
        raise DataError(
            f"{path}: not an am.mvn: it needs <AddShift> and <Rescale> of one size, each followed by its numbers"
        )
    return torch.stack([rows["<AddShift>"], rows["<Rescale>"]])


def write_cmvn(cmvn: Tensor, path: str | os.PathLike) -> None:
    """Write (2, F) in FunASR's ``am.mvn`` format, whole or not at all."""
    F = cmvn.shape[1]
    shift, scale = (" ".join(np.format_float_positional(np.float32(v), unique=True) for v in row) for row in cmvn)
    text = (
        f"<Nnet>\n<Splice> {F} {F}\n[ 0 ]\n<AddShift> {F} {F}\n<LearnRateCoef> 0 [ {shift} ]\n"
        f"<Rescale> {F} {F}\n<LearnRateCoef> 0 [ {scale} ]\n</Nnet>\n"
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def compute_cmvn(waveforms: Iterable[Tensor | np.ndarray], features: Features) -> Tensor:
    """Shift and scale (2, F) that give the stacked features of ``waveforms`` mean 0 and variance 1.

    Args:
        waveforms: (N,) each; a generator is fine, one is held at a time.
        features: its own CMVN, if any, is left out.

    Raises:
        DataError: not a single frame.
    """
    features = Features(dataclasses.replace(features.conf, cmvn_file=None))
    count, total, squares = 0, 0.0, 0.0
    for waveform in waveforms:
        feats = features(waveform).double()
        count, total, squares = count + len(feats), total + feats.sum(0), squares + feats.square().sum(0)
    if count == 0:
        raise DataError("cmvn: no utterance is long enough for one frame")
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=1e-10).sqrt()
    return torch.stack([-mean, 1 / deviation]).float()
