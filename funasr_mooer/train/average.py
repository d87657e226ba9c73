"""The mean of several checkpoints, tensor by tensor: memory for one model, however many checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from funasr_mooer.errors import CheckpointError
from funasr_mooer.train.checkpoint import FOLDER, HIDDEN, STATE_FILE, why_not_written
from funasr_mooer.train.engine import OPTIMIZER_FILE


def average(checkpoints: Sequence[Path], out: Path) -> Path:
    """Write the model directory whose trained tensors are the means of those of ``checkpoints``.

    Configuration and other files are those of the first; nothing to resume from is taken along.

    Args:
        checkpoints: model directories of one experiment.
        out: an earlier average there is replaced when everything is written.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no checkpoints, or they do not hold the same tensors; ``out`` holds something else, or
            cannot be written.
    """
    if not checkpoints:
        raise CheckpointError(f"{out}: no checkpoints to average")
    if out.is_symlink() or (out.exists() and not _is_average(out)):
        raise CheckpointError(f"{out}: holds something else than an average, which stays; give a new folder")
    files = sorted(path.relative_to(checkpoints[0]) for path in checkpoints[0].rglob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{checkpoints[0]}: holds no *.safetensors")
    temporary = out.with_name(f"{HIDDEN}{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    skipped = shutil.ignore_patterns("*.safetensors", OPTIMIZER_FILE, STATE_FILE)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(checkpoints[0], temporary, ignore=skipped)
        for file in files:
            tensors, metadata = average_file([checkpoint / file for checkpoint in checkpoints])
            save_file(tensors, temporary / file, metadata)
        if out.exists():
            shutil.rmtree(out)
        os.rename(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = why_not_written(error, out.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{out}: cannot be written ({reason}); make room on the disk, or give another folder"
        ) from error
    return out


def average_file(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Means over files of the same tensors, and the first file's metadata; one tensor of each is read at a time.

    Numbers that are not floating point (counters) are the first file's.
    """
    try:
        opened = [safe_open(file, framework="pt") for file in files]
        names = set(opened[0].keys())
        for file, tensors in zip(files, opened, strict=True):
            if set(tensors.keys()) != names:
                other = sorted(names.symmetric_difference(tensors.keys()))
                raise CheckpointError(f"{file}: not the tensors of {files[0]}: {', '.join(other[:4])}")
        return {name: _mean(name, opened) for name in sorted(names)}, opened[0].metadata()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{files[0].name}: cannot be read from every checkpoint ({error})") from error


def _is_average(folder: Path) -> bool:
    """Whether a folder is empty, or a model directory that is neither an experiment nor one of its checkpoints."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    others = (STATE_FILE, OPTIMIZER_FILE, FOLDER)
    return (folder / "config.yaml").is_file() and not any((folder / name).exists() for name in others)


def _mean(name: str, opened: Sequence[safe_open]) -> Tensor:
    tensor = opened[0].get_tensor(name)
    if not tensor.is_floating_point():
        return tensor
    total = tensor.to(torch.float64)
    for other in opened[1:]:
        total += other.get_tensor(name)
    return (total / len(opened)).to(tensor.dtype)
