"""Reading, checking and writing tensors: nothing is loaded half, nothing from a file is executed."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funasr_mooer.errors import CheckpointError

# What reading a damaged pickle or safetensors file raises: bits that fell over end up in any of its fields.
DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError),
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
HASHED_BYTES = 1 << 20  # of each end of a weight file


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, on the CPU.

    Pickles are read with ``weights_only=True``: a file that holds code is refused.

    Raises:
        CheckpointError: the file is absent, damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise CheckpointError(f"{path}: cannot be read as tensors ({first_line(error)})") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: does not hold a plain mapping of names to tensors")
    return dict(tensors)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors, each in its own memory (tied ones are written twice)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, str(path))


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy ``tensors`` into ``module``; every parameter and buffer must be there, with its shape.

    Raises:
        CheckpointError: lists what is missing, what is unexpected and what has another shape.
    """
    wanted = module.state_dict()
    shapes = [
        f"{name} {tuple(tensors[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    complain(source, missing=wanted.keys() - tensors.keys(), unexpected=tensors.keys() - wanted.keys(), other=shapes)
    module.load_state_dict(dict(tensors))


def complain(
    source: str | Path, missing: Iterable[str] = (), unexpected: Iterable[str] = (), other: Iterable[str] = ()
) -> None:
    """Raise a CheckpointError that names the first few tensors of each kind; nothing if there are none."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(other)}
    parts = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise CheckpointError(f"{source}: {'; '.join(parts)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def fingerprint(path: str | Path) -> str:
    """A short hash that names a weight file, or a folder's weight files and ``config.json``.

    Large files are hashed by name, size and both ends, so naming a 15 GB model takes milliseconds.

    Raises:
        CheckpointError: nothing there to hash.
    """
    path = Path(path)
    files = (
        [path] if path.is_file() else sorted({f for glob in ("config.json", *WEIGHT_FILES) for f in path.glob(glob)})
    )
    if not files:
        raise CheckpointError(f"{path}: holds no weights")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(HASHED_BYTES))
            if size > HASHED_BYTES:
                stream.seek(max(HASHED_BYTES, size - HASHED_BYTES), os.SEEK_SET)
                digest.update(stream.read(HASHED_BYTES))
    return digest.hexdigest()[:16]


def check_fingerprint(path: str | Path, expected: str | None, key: str) -> None:
    """Refuse weights that are not those a model was trained with.

    Raises:
        CheckpointError: ``expected`` is given and differs; names the config key that recorded it.
    """
    found = fingerprint(path)
    if expected is not None and found != expected:
        raise CheckpointError(
            f"{path}: its fingerprint is {found}, the model was trained on {expected}; "
            f"give the original weights, or remove {key} if the change is meant"
        )


def _first(names: list[str], count: int = 4) -> str:
    more = f" (and {len(names) - count} more)" if len(names) > count else ""
    return ", ".join(names[:count]) + more
