"""Sound that comes in pieces of any size -> features, as soon as they are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.data.audio import LOUDEST
from funasr_mooer.data.features import Features
from funasr_mooer.errors import DataError

# Shapes: N samples, T feature frames, F feature size.
BYTES = (bytes, bytearray, memoryview)
Piece = np.ndarray | Tensor | bytes | bytearray | memoryview | None


class FeatureStream:
    """Features of a signal that comes in pieces: the same frames as of the whole signal.

    Args:
        features: the model's frontend.
    """

    def __init__(self, features: Features):
        self.features = features
        self.half_sample = b""  # of 16-bit PCM bytes that were cut in the middle of one
        self.samples = np.zeros(0, np.float32)  # from the start of the first frame that is not computed yet
        self.fbank = torch.zeros(0, features.conf.n_mels)  # from the first frame of the next stack, edge included
        self.frames = 0  # fbank frames so far
        self.stacks = 0  # output frames so far

    def check(self, piece: Piece) -> None:
        """Refuse what :meth:`push` cannot take; nothing changes.

        Raises:
            DataError: neither samples (N,), their bytes, nor features (T, F); or they are no numbers.
        """
        if isinstance(piece, BYTES):
            return
        piece = _array(piece)
        if piece.ndim == 2 and piece.shape[1] != self.features.output_size():
            raise DataError(
                f"a piece of features has size {piece.shape[1]}, the model takes {self.features.output_size()}"
            )

    def push(self, piece: Piece, final: bool = False) -> Tensor:
        """Samples (N,), their bytes, or features (T, F), all of them checked -> new features (T', F)."""
        piece = _array(self._whole_samples(bytes(piece)) if isinstance(piece, BYTES) else piece)
        if piece.ndim == 2:
            return torch.from_numpy(piece)
        self._extend_fbank(piece)
        conf = self.features.conf
        stacks = max((len(self.fbank) - conf.lfr_m) // conf.lfr_n + 1, 0)
        if final and self.frames:
            stacks = -(-self.frames // conf.lfr_n) - self.stacks
            missing = (stacks - 1) * conf.lfr_n + conf.lfr_m - len(self.fbank)
            self.fbank = torch.cat((self.fbank, self.fbank[-1:].expand(max(missing, 0), -1)))
        if stacks <= 0:
            return torch.zeros(0, self.features.output_size())
        feats = self.fbank.unfold(0, conf.lfr_m, conf.lfr_n)[:stacks].transpose(1, 2).flatten(1)  # (T', F)
        self.fbank, self.stacks = self.fbank[stacks * conf.lfr_n :], self.stacks + stacks
        return self.features.normalise(feats)

    def _extend_fbank(self, piece: np.ndarray) -> None:
        """Take samples (N,), and compute the frames that they complete."""
        self.samples = np.concatenate((self.samples, piece))
        new = self.features.fbank(self.samples)
        if len(new):
            self.samples = self.samples[len(new) * self.features.hop :]
            edge = new[:1].expand(self.features.left if self.frames == 0 else 0, -1)
            self.fbank, self.frames = torch.cat((self.fbank, edge, new)), self.frames + len(new)

    def _whole_samples(self, piece: bytes) -> np.ndarray:
        piece = self.half_sample + piece
        whole = len(piece) // 2 * 2
        self.half_sample = piece[whole:]
        return np.frombuffer(piece[:whole], "<i2")


def _array(piece: np.ndarray | Tensor | None) -> np.ndarray:
    """(N,) or (T, F) float32 in [-1, 1)."""
    if piece is None:
        return np.zeros(0, np.float32)
    piece = np.asarray(piece.detach().cpu() if isinstance(piece, Tensor) else piece)
    if piece.ndim not in (1, 2) or not np.issubdtype(piece.dtype, np.number):
        raise DataError(f"expected samples (N,) or features (T, F), found an array {piece.dtype} {piece.shape}")
    if piece.dtype == np.int16:
        return piece.astype(np.float32) / 32768
    if not np.issubdtype(piece.dtype, np.floating):
        raise DataError(f"expected int16 or float samples, found {piece.dtype}")
    if not np.isfinite(piece).all():
        raise DataError("a piece of audio holds NaN or infinite samples")
    if piece.ndim == 1 and len(piece) and np.abs(piece).max() > LOUDEST:
        raise DataError(f"samples up to {np.abs(piece).max():g}; floats lie in [-1, 1), 16-bit numbers are int16")
    return piece.astype(np.float32)
