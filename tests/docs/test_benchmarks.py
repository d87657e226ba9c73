"""Benchmarks count what they say."""

import importlib
import random
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def resume(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("resume")


def test_runs_that_end_before_any_kill_are_not_counted_as_killed(resume, tmp_path, monkeypatch):
    in_time = iter([False, True, True, False, True])  # run 0: none; run 1: two kills; run 2: the last one
    monkeypatch.setattr(resume, "kill", lambda *_, **__: next(in_time))
    monkeypatch.setattr(resume, "run", lambda *_: None)
    monkeypatch.setattr(resume, "differences", lambda *_: [("weight", 0.5)])

    def start(argv, nproc, log):
        Path(argv[argv.index("--exp") + 1]).mkdir(parents=True, exist_ok=True)

    tally = resume.torment(tmp_path, "1-plain", [], start, kills=3, moments=random.Random(0))
    assert (tally.kills, tally.runs) == (3, 2)
    assert (tally.worst, len(tally.unequal)) == (0.5, 3)
