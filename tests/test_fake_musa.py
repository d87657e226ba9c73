"""No path is for CUDA alone: the tests of test_musa.py pass on a simulated MUSA device.

They run in a process of their own, because the device, once there, is there for every test.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(environment, which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/test_musa.py"]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=570)


@pytest.mark.parametrize("which", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)])
def test_training_and_decoding_on_a_simulated_device_equal_the_cpu(fake_musa, which):
    done = run(fake_musa, which)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert "no MUSA device here" not in done.stdout
