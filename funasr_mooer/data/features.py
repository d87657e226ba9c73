"""Waveforms to encoder input: Kaldi fbank, low frame rate stacking (LFR) and CMVN, on any device."""

# Shapes: B utterances, N samples, T fbank frames of 10 ms, U stacked frames of 60 ms, M mel bins (80), F = lfr_m * M (560).

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.config import section
from funasr_mooer.data.cmvn import read_cmvn
from funasr_mooer.data.fbank import WINDOWS, Fbank
from funasr_mooer.errors import ConfigError


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
        frame, self.hop = (int(conf.fs * ms / 1000) for ms in (conf.frame_length, conf.frame_shift))  # samples
        self.kaldi = Fbank(conf.fs, frame, self.hop, conf.n_mels, conf.window)
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
        """Output frames for a number of samples: an int, or an integer array or tensor of them."""
        return -(-self.kaldi.num_frames(samples) // self.conf.lfr_n)

    def to(self, device: torch.device) -> Features:
        """The same frontend, computing on ``device``; a copy."""
        moved = copy.copy(self)
        moved.kaldi = copy.copy(self.kaldi).move_(device)
        moved.cmvn = None if self.cmvn is None else self.cmvn.to(device)
        return moved

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

    def padded(self, waves: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Padded samples (B, N) -> feats (B, frames, F), zero beyond each utterance: all at once, for an accelerator.

        Args:
            waves: int16, or float in [-1, 1), on the device of this frontend (see :meth:`to`); N is any width.
            lengths: (B,) samples of each, int64, there too.
            frames: U of the longest, or more.
        """
        B, N = waves.shape
        steps = self.kaldi.num_frames(lengths)  # (B,) T of each
        T = self.kaldi.num_frames(N)
        if T == 0 or frames == 0:
            return waves.new_zeros(B, frames, self.output_size(), dtype=torch.float32)
        fbank = torch.empty(B, T, self.conf.n_mels, device=waves.device)
        self.kaldi.write(self._scaled(waves), fbank)
        stack = torch.arange(self.conf.lfr_m, device=waves.device) - self.left
        places = torch.arange(frames, device=waves.device)[:, None] * self.conf.lfr_n + stack  # (U, lfr_m)
        places = places.flatten().minimum(steps[:, None] - 1).clamp(min=0)  # (B, U * lfr_m): the edges repeat
        rows = places + torch.arange(B, device=waves.device)[:, None] * T
        feats = self.normalise(fbank.view(B * T, -1)[rows].view(B, frames, -1))
        beyond = torch.arange(frames, device=waves.device) >= self.num_frames(lengths)[:, None]
        return feats.masked_fill_(beyond[..., None], 0)

    def fbank(self, waveform: Tensor | np.ndarray) -> Tensor:
        """(N,) float in [-1, 1), or int16, -> log mel energies (T, M)."""
        x = self._samples(waveform)
        out = torch.empty(self.kaldi.num_frames(len(x)), self.conf.n_mels)
        if len(out):
            self.kaldi.write(x[None], out[None])
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
        T = self.kaldi.num_frames(len(x))
        edged = torch.empty(self._edged(T, len(out)), self.conf.n_mels)
        self.kaldi.write(x[None], edged[None, self.left : self.left + T])
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
        if isinstance(waveform, Tensor):
            return self._scaled(waveform)
        # astype copies int16, which may be a read-only view of a file; torch wants memory it may write.
        x = torch.from_numpy(np.require(waveform, np.float32, "W"))
        return self._scaled(x, is_int=waveform.dtype == np.int16)

    def _scaled(self, x: Tensor, is_int: bool = False) -> Tensor:
        wanted = 1 if self.conf.upsacle_samples else 1 / 32768
        found = 1 if is_int or x.dtype == torch.int16 else 1 / 32768
        return x.float() if wanted == found else x.float() * (wanted / found)
