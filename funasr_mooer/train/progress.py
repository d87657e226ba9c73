"""What a person sees of a run: lines and a bar, EXP/metrics.jsonl, TensorBoard, and curves at the end."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from funasr_mooer.train.boards import open_boards

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """One utterance of a decoded sample."""

    task: str
    utt_id: str
    ref: str
    hyp: str


class Progress:
    """The reporter of one run; on processes other than the first it stays silent.

    Args:
        exp: experiment directory.
        total: updates of the whole run; None if that is not known.
        step: update from which this process goes on; later metrics of an earlier attempt are dropped.
        active: False on processes other than the first.
        tensorboard: also write EXP/tensorboard.
        wandb: also tell Weights & Biases.

    Raises:
        DependencyError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        exp: Path,
        total: int | None,
        step: int = 0,
        active: bool = True,
        tensorboard: bool = True,
        wandb: bool = False,
    ):
        self.exp, self.total, self.active = exp, total, active
        self.metrics = exp / "metrics.jsonl"
        self.first_step, self.started = step, time.monotonic()
        self.boards, self.bar, self.stream = [], None, None
        if not active:
            return
        rewind(self.metrics, step)
        self.stream = open(self.metrics, "a", encoding="utf-8")
        self.boards = open_boards(exp, step, tensorboard, wandb)
        self.bar = _open_bar(total, step) if sys.stderr.isatty() else None

    def parts(self, model: nn.Module, trained: Sequence[str]) -> None:
        """One line: how large each part of the model is, and whether it is trained in this stage."""
        if self.active:
            log.info("parts        %s", describe_parts(model, trained))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One line for the updates since the last one.

        Args:
            step: updates made so far.
            values: ``loss``, ``audio_s_per_s``, ``tokens_per_s``, ``data_wait`` and ``padding`` (shares), ``gib``, ``lr``
                or ``lr/<part>``, ``mfu`` (a share) where it is known, and whatever the model measured (``acc``).
        """
        if not self.active:
            return
        self._write("train", step, values)
        shown = [f"step {step}/{self.total}" if self.total else f"step {step}"]
        shown += [
            f"{name} {values[name]:.3f}"
            for name in sorted(values, key="loss".__ne__)
            if name.startswith(("loss", "acc"))
        ]
        rates = {name.removeprefix("lr/"): rate for name, rate in values.items() if name.startswith("lr")}
        shown += [
            "lr " + ", ".join(f"{rate:.3g}" if name == "lr" else f"{name} {rate:.3g}" for name, rate in rates.items())
        ]
        shown += [f"{values['audio_s_per_s']:.0f} audio-s/s", f"{values['tokens_per_s']:.0f} tokens/s"]
        shown += [f"MFU {100 * values['mfu']:.0f} %"] if "mfu" in values else []
        shown += [f"data wait {100 * values['data_wait']:.0f} %"]
        shown += [f"padding {100 * values['padding']:.0f} %", f"{values['gib']:.1f} GiB"]
        left = self.seconds_left(step)
        log.info(" | ".join(shown + ([f"left {show_time(left)}"] if left is not None else [])))

    def figures(self, step: int, shown: Mapping[str, float], details: Mapping[str, float]) -> None:
        """One line with what the model tells of itself, such as ``expert_entropy``; the details on the boards alone."""
        if not self.active or not shown:
            return
        self._write("model", step, shown)
        for board in self.boards:
            board.scalars(step, details)
        words = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in shown.items()]
        log.info("%-12s %s", "model", " | ".join(words))

    def tick(self, step: int, loss: float) -> None:
        """Move the bar, if there is one."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, description=f"loss {loss:.3f}")

    def valid(self, step: int, values: Mapping[str, float]) -> None:
        """One line with what was measured on the dev set."""
        if self.active:
            self._write("valid", step, values)
            log.info("valid        %s", " | ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def sample(self, step: int, texts: Sequence[Decoded], shown: int = 3) -> None:
        """A few references and answers of a decoded sample, spread over it; all of them on the boards.

        Args:
            step: updates made so far.
            texts: of the whole sample.
            shown: how many go to the log.
        """
        if not self.active:
            return
        for text in texts[:: max(1, -(-len(texts) // shown))]:
            log.info("%-12s %s | ref: %s | hyp: %s", "sample", text.task, text.ref, text.hyp)
        rows = [f"| {text.task} | {text.utt_id} | {text.ref} | {text.hyp} |" for text in texts]
        for board in self.boards:
            board.text(step, "valid/sample", "\n".join(["| task | utt | ref | hyp |", "|---|---|---|---|", *rows]))

    def line(self, name: str, text: str) -> None:
        """One line for an event."""
        if self.active:
            log.info("%-12s %s", name, text)

    def seconds_left(self, step: int) -> float | None:
        """Time to the end of the run at the pace since this process started, validation and saving included."""
        done = step - self.first_step
        if self.total is None or done <= 0:
            return None
        return (time.monotonic() - self.started) / done * max(0, self.total - step)

    def close(self) -> None:
        """End the bar and close the files."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.stop()
        for board in self.boards:
            board.close()
        self.stream.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.stream.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.stream.flush()
        for board in self.boards:
            board.scalars(step, {f"{kind}/{name}": value for name, value in values.items()})


def describe_parts(model: nn.Module, trained: Sequence[str]) -> str:
    """``encoder 158 M frozen | adapter 9.4 M trained | ... (2.1 % of 7.9 B trained)``."""
    counts = {part: sum(p.numel() for p in params) for part, params in model.parts.items()}
    words = [f"{part} {show_count(n)} {'trained' if part in trained else 'frozen'}" for part, n in counts.items()]
    total = max(1, sum(counts.values()))
    share = sum(counts[part] for part in trained) / total
    return " | ".join(words) + f" | {100 * share:.1f} % of {show_count(total)} trained"


def show_count(number: float) -> str:
    """A number of parameters: 312, 4.1 k, 158 M, 7.6 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def show_time(seconds: float) -> str:
    """A duration: 9 h 40 m, 3 m 20 s, 12 s."""
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) % 3600 // 60, int(seconds) % 60
    return f"{hours} h {minutes} m" if hours else f"{minutes} m {seconds} s" if minutes else f"{seconds} s"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one cut short by a kill is left out."""
    records = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:
            log.info("%s: a line cut short is left out", path)
    return records


def rewind(path: Path, step: int) -> None:
    """Drop the metrics after ``step``, which a resumed run will measure again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def draw_curves(metrics: Path, png: Path) -> None:
    """Loss, learning rate and error rates over updates, as an image; said and left out without matplotlib."""
    records = read_metrics(metrics)
    names = [n for n in ("loss", "acc", "cer", "wer", "bleu", "lr") if any(_value(r, n) is not None for r in records)]
    if not names:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("curves       not drawn: pip install funasr-mooer[train] brings matplotlib")
        return
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for kind in ("train", "valid"):
            points = [
                (r["step"], _value(r, name)) for r in records if r["kind"] == kind and _value(r, name) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=kind, marker="o" if len(points) < 30 else None)
        axes.set(title=name, xlabel="step")
        axes.legend()
    figure.savefig(png, dpi=100)


def _value(record: Mapping[str, Any], name: str) -> float | None:
    if name == "lr":
        return max((value for key, value in record.items() if key.startswith("lr")), default=None)
    return record.get(name)


def _open_bar(total: int | None, step: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("starting", total=total, completed=step)
    bar.start()
    return bar
