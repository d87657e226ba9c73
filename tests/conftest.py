"""Fixtures that find the reference numbers and the real speech that tests compare with."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, HERE.parent / ".." / "shared" / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set ${variable} to the folder of {default} material")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers of the original implementations ($FUNASR_MOOER_GOLDEN)."""
    return _folder("FUNASR_MOOER_GOLDEN", "golden")


@pytest.fixture(scope="session")
def speech_data() -> Path:
    """Real speech in Kaldi directories ($FUNASR_MOOER_DATA)."""
    return _folder("FUNASR_MOOER_DATA", "data")
