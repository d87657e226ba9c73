"""Weight files: whole, or one error that names the file."""

import contextlib
import random
import warnings

import pytest
import safetensors.torch
import torch

from funasr_mooer.errors import CheckpointError
from funasr_mooer.weights import read_tensors

TENSORS = {"a": torch.arange(20.0), "b": torch.ones(3)}


def write(path, legacy):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


@pytest.mark.parametrize(("name", "legacy"), [("a.pt", False), ("a.pth", True), ("a.safetensors", False)])
def test_whatever_bit_falls_over_a_file_is_read_or_refused(tmp_path, name, legacy):
    whole, draw = write(tmp_path / name, legacy), random.Random(0)
    torch.testing.assert_close(read_tensors(tmp_path / name), TENSORS)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        (tmp_path / name).write_bytes(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])])
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore")  # torch's, of pickle protocols
            read_tensors(tmp_path / name)


def test_code_in_a_file_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"a": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        read_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
