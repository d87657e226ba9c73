"""Checkpoints that are there whole or not at all, and the state from which training goes on.

    EXP/checkpoints/step-200/    a model directory, plus train_state.json and what only resuming needs
    EXP/last, EXP/best           links to two of them

A checkpoint is written under another name, flushed to the disk and renamed. Whatever a kill leaves behind has a
name that starts with a dot, is never read, and is removed by the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from funasr_mooer.errors import CheckpointError
from funasr_mooer.train.engine import OPTIMIZER_FILE, Engine
from funasr_mooer.weights import first_line

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # of an experiment
STATE_FILE = "train_state.json"
TORCH_CANNOT_WRITE = ("inline_container", "iostream", "cannot be opened", "Parent directory")  # words of its errors
HIDDEN = "."
LARGER_IS_BETTER = ("acc", "bleu", "chrf")
RESUMABLE = 2  # checkpoints that keep their optimiser states
FULL = 1 << 20  # bytes; a disk with less room is full


@dataclass
class TrainState:
    """Where training stands: with the weights and the optimiser, all that the next update depends on.

    Attributes:
        stage: index of the present stage.
        stage_step: updates made in it.
        stage_epoch: epoch with which it began.
        step: updates made in the whole run.
        epoch: present pass over the data.
        epoch_batches: batches taken from this epoch by all processes together, so that their number may change.
        world: number of processes.
        seed: of the run.
        metrics: last validation, if this very state was validated.
        commit: of the code.
        versions: of the packages that compute.
    """

    stage: int = 0
    stage_step: int = 0
    stage_epoch: int = 0
    step: int = 0
    epoch: int = 0
    epoch_batches: int = 0
    world: int = 1
    seed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write ``directory/train_state.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> TrainState:
        """Read ``directory/train_state.json``.

        Raises:
            CheckpointError: it is absent or damaged.
        """
        try:
            return cls(**json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise CheckpointError(f"{directory / STATE_FILE}: cannot be read ({error}); remove {directory}") from error


class Checkpoints:
    """The checkpoints of one experiment.

    Args:
        exp: experiment directory.
        keep: how many of the best stay; the last two stay besides, and only these keep their optimiser states.
        metric: which validation metric ranks them.
    """

    def __init__(self, exp: Path, keep: int = 5, metric: str = "loss"):
        self.exp, self.folder, self.keep, self.metric = exp, exp / FOLDER, keep, metric

    def open(self) -> Path | None:
        """Remove what a kill left behind; returns the newest checkpoint from which training can go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover)
        self._link()
        return self.latest()

    def all(self) -> list[Path]:
        """All checkpoints, oldest first; copies by other names are none."""
        steps = {path: path.name.removeprefix("step-") for path in self.folder.glob("step-*")}
        return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))

    def latest(self) -> Path | None:
        """The newest checkpoint that holds optimiser states."""
        return next((p for p in reversed(self.all()) if (p / OPTIMIZER_FILE).is_file()), None)

    def ranked(self) -> list[Path]:
        """Validated checkpoints, best first; those of the last stage go before those of earlier ones."""
        states = {path: TrainState.read(path) for path in self.all()}
        sign = -1 if any(self.metric.startswith(name) for name in LARGER_IS_BETTER) else 1
        chosen = [path for path, state in states.items() if self.metric in state.metrics]
        return sorted(chosen, key=lambda p: (-states[p].stage, sign * states[p].metrics[self.metric], -states[p].step))

    def best(self) -> Path | None:
        """The best validated checkpoint; without any validation, the newest."""
        return next(iter([*self.ranked(), *reversed(self.all())]), None)

    def save(
        self, state: TrainState, engine: Engine, write_model: Callable[[Path], None], extra: dict[str, Any]
    ) -> Path:
        """Write the checkpoint ``step-<state.step>``; to be called on every process.

        Args:
            state: where training stands.
            engine: writes optimiser states.
            write_model: fills a directory with the model; called on the first process.
            extra: tensors and numbers that resuming needs besides.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are as they were.
        """
        final = self.folder / f"step-{state.step}"
        temporary = self.folder / f"{HIDDEN}{final.name}"
        if engine.is_main:
            with self._telling(final):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        engine.barrier()
        with self._telling(final):
            engine.save_state(temporary, extra)
        with engine.whole_parameters(), self._telling(final):
            if engine.is_main:
                write_model(temporary)
                state.write(temporary)
        engine.barrier()
        if engine.is_main:
            with self._telling(final):
                self._publish(temporary, final)
        engine.barrier()
        return final

    @contextlib.contextmanager
    def _telling(self, final: Path) -> Iterator[None]:
        """Turn a disk's refusal into one error that says what is still there."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_CANNOT_WRITE):
                raise  # of another kind: a process was lost while all of them gathered what is to be written
            reason = why_not_written(error, self.exp)
            shutil.rmtree(final.with_name(f"{HIDDEN}{final.name}"), ignore_errors=True)
            latest = self.latest()
            kept = f"{latest.name} is intact" if latest else "there is no earlier one"
            raise CheckpointError(
                f"{final}: cannot be written ({reason}); {kept}; make room on the disk and run the same command again"
            ) from error

    def _publish(self, temporary: Path, final: Path) -> None:
        """Flush, rename, link, and remove what is no longer kept."""
        for path in sorted(temporary.rglob("*"), reverse=True):
            _flush(path)
        _flush(temporary)
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        _flush(self.folder)
        self._prune()
        self._link()

    def _prune(self) -> None:
        newest = self.all()[-RESUMABLE:]
        kept = {*newest, *self.ranked()[: self.keep]}
        for path in self.all():
            if path not in kept:
                _remove(path)
            elif path not in newest:
                (path / OPTIMIZER_FILE).unlink(missing_ok=True)

    def _link(self) -> None:
        for name, target in (("last", next(reversed(self.all()), None)), ("best", self.best())):
            if target is not None:
                link(self.exp / name, target)


def why_not_written(error: Exception, folder: Path) -> str:
    """What a failed write says, in plain words where the disk is full: torch.save would say "unexpected pos"."""
    return os.strerror(errno.ENOSPC) if shutil.disk_usage(folder).free < FULL else first_line(error)


def link(path: Path, target: Path) -> None:
    """Make ``path`` a relative link to ``target``, in one step even if it was another link before.

    Raises:
        CheckpointError: something that is not a link is in the way.
    """
    if path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: is in the way of a link to {target.name}; move it elsewhere")
    temporary = path.with_name(f"{HIDDEN}{path.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of the packages that take part in the numbers."""
    found = {}
    for package in ("funasr_mooer", "funasr", "torch", "transformers", "peft", "accelerate", "deepspeed"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the code that runs, with ``+`` if files were changed; empty outside a repository."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves no half of it under its name."""
    hidden = path.with_name(f"{HIDDEN}old-{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
