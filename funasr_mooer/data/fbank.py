"""Kaldi's log mel energies (fbank) of one signal or of a padded batch, on any device, in plain torch."""

# Shapes: B signals, N samples, T frames of 25 ms every 10 ms, M mel bins (80).

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PREEMPHASIS = 0.97
LOWEST_HZ = 20.0  # of the mel filters; the highest is the Nyquist frequency
CPU_FRAMES = 256  # computed at once on a CPU: all that is known of them stays in its cache
DEVICE_FRAMES = 1 << 16  # on an accelerator: 130 MB of spectra
WINDOWS = {
    "hamming": lambda n: torch.hamming_window(n, periodic=False, dtype=torch.float64),
    "hanning": lambda n: torch.hann_window(n, periodic=False, dtype=torch.float64),
    "povey": lambda n: torch.hann_window(n, periodic=False, dtype=torch.float64) ** 0.85,
    "rectangular": lambda n: torch.ones(n, dtype=torch.float64),
}


class Fbank:
    """Kaldi's ``compute-fbank-feats`` with dither 0, energy floor 0 and ``snip_edges``.

    Args:
        sample_rate: Hz.
        frame: samples of a window.
        hop: samples from one window to the next.
        bins: mel bins, M.
        window: one of ``WINDOWS``.
    """

    def __init__(self, sample_rate: int, frame: int, hop: int, bins: int, window: str):
        self.frame, self.hop, self.bins = frame, hop, bins
        self.fft = 1 << (frame - 1).bit_length()
        self.window = WINDOWS[window](frame).float()
        self.mel = mel_filters(bins, self.fft, sample_rate)  # (fft / 2 + 1, M)

    def move_(self, device: torch.device) -> Fbank:
        """Compute on ``device`` from now on."""
        self.window, self.mel = self.window.to(device), self.mel.to(device)
        return self

    def num_frames(self, samples):
        """T for a number of samples: an int, or an integer array or tensor of them."""
        frames = (samples - self.frame) // self.hop + 1
        return max(frames, 0) if isinstance(frames, int) else frames.clip(min=0)

    def write(self, x: Tensor, out: Tensor) -> None:
        """Log mel energies of samples (B, N), in units of 16-bit numbers, into ``out`` (B, T, M); T is at least 1."""
        B, T, _ = out.shape
        # Kaldi removes each frame's mean m, then subtracts 0.97 of the sample before, at the frame's first sample of
        # itself. As all of this is linear, emphasis is computed once for the whole signal and 0.03 m taken off per frame.
        emphasised = torch.empty_like(x)
        torch.sub(x[:, 1:], x[:, :-1], alpha=PREEMPHASIS, out=emphasised[:, 1:])
        means = x.unfold(1, self.frame, self.hop).mean(dim=2, keepdim=True)  # (B, T, 1)
        frames = emphasised.unfold(1, self.frame, self.hop)  # (B, T, frame), a view
        first = x[:, : (T - 1) * self.hop + 1 : self.hop] * ((1 - PREEMPHASIS) * self.window[0])
        size = min(T, max(1, (CPU_FRAMES if x.device.type == "cpu" else DEVICE_FRAMES) // B))
        padded = x.new_zeros(B, size, self.fft)
        spectra = x.new_empty(B, size, self.fft // 2 + 1, dtype=torch.complex64)
        powers = x.new_empty(B, size, self.fft // 2 + 1)
        for start in range(0, T, size):
            block = slice(start, min(start + size, T))
            count = block.stop - start
            windowed = padded[:, :count, : self.frame]
            torch.mul(frames[:, block], self.window, out=windowed)
            windowed[..., 0] = first[:, block]
            windowed.addcmul_(means[:, block], self.window, value=PREEMPHASIS - 1)
            spectrum, power = spectra[:, :count], powers[:, :count]
            torch.fft.rfft(padded[:, :count], out=spectrum)
            torch.mul(spectrum.real, spectrum.real, out=power)
            power.addcmul_(spectrum.imag, spectrum.imag)
            energy = power @ self.mel  # (B, count, M)
            torch.log(energy.clamp_(min=torch.finfo(torch.float32).eps), out=out[:, block])


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
