"""What the benchmarks share: alternating repetitions, CPU and wall time, ratios, a JSON file that explains itself."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from funasr_mooer.device import supports_bf16
from funasr_mooer.score.report import git_commit, write_atomic


@dataclass
class Times:
    """Seconds per repetition of one candidate; repetition i of all candidates ran side by side."""

    cpu: list[float] = field(default_factory=list)  # of this process, all its threads
    wall: list[float] = field(default_factory=list)

    @property
    def cpu_s(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)

    @property
    def wall_s(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall)

    def cpu_ratio(self, other: Times) -> float:
        """Median over repetitions of our CPU time by the other's: under 1 is faster than ``other``."""
        return statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True))

    def wall_ratio(self, other: Times) -> float:
        """Median over repetitions of our wall time by the other's: under 1 is faster than ``other``."""
        return statistics.median(a / b for a, b in zip(self.wall, other.wall, strict=True))


def alternate(
    runs: Mapping[str, Callable[[], object]], repetitions: int = 5, seconds: float = 0.0, warm_up: int = 1
) -> dict[str, Times]:
    """Time candidates in turn (a, b, c, a, b, c, ...), so that a change of the machine's speed meets them all.

    Args:
        runs: name -> what to time.
        repetitions: rounds at least.
        seconds: go on with further rounds until this many wall seconds have passed.
        warm_up: rounds before, not counted.
    """
    times = {name: Times() for name in runs}
    for _ in range(warm_up):
        for run in runs.values():
            run()
    start, rounds = time.perf_counter(), 0
    while rounds < repetitions or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
        rounds += 1
    return times


def machine() -> str:
    """One line: processor, its cores, whether it has bfloat16, and the torch that runs on it."""
    bf16 = "native bf16" if supports_bf16(torch.device("cpu")) else "no native bf16"
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    return f"{_processor()}, {os.cpu_count()} cores, {capability}, {bf16}, torch {torch.__version__}"


def write_json(path: Path, figures: Mapping[str, float]) -> None:
    """Write flat figures, and beside them the command, the commit and the machine that they came from."""
    command = shlex.join(["python", *sys.argv])
    origin = {"command": command, "commit": git_commit(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    write_atomic(path, json.dumps(origin | dict(figures), indent=2) + "\n")


def _processor() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
