"""Mean and variance of features: FunASR's ``am.mvn``, read, written and computed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.errors import ConfigError, DataError


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
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
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


def compute_cmvn(feats: Iterable[Tensor]) -> Tensor:
    """Shift and scale (2, F) that give features mean 0 and variance 1.

    Args:
        feats: (T, F) of each utterance, from a frontend without CMVN; a generator is fine, one is held at a time.

    Raises:
        DataError: not a single frame.
    """
    count, total, squares = 0, 0.0, 0.0
    for each in feats:
        x = each.double()
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    if count == 0:
        raise DataError("cmvn: no utterance is long enough for one frame")
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=1e-10).sqrt()
    return torch.stack([-mean, 1 / deviation]).float()
