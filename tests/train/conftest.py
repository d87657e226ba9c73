"""Lets the tests of this folder import the toy, and spares them the curves, which take longer than a toy's training."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs in this process draw nothing; test_progress.py draws by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funasr_mooer.train.loop.draw_curves", lambda *_: None)
        yield
