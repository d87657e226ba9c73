"""The training loop: stages of epochs of updates, with what happens between two updates.

The state to resume from is the weights, the optimiser and a few numbers (:class:`TrainState`): data follow from
(seed, epoch, step), and everything random in an update from (seed, update, process).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from funasr_mooer import device as devices
from funasr_mooer.errors import CheckpointError, ConfigError, DataError
from funasr_mooer.mooer.flops import flops_of
from funasr_mooer.train.average import average
from funasr_mooer.train.checkpoint import Checkpoints, TrainState, commit, link, versions
from funasr_mooer.train.ema import Ema
from funasr_mooer.train.engine import OPTIMIZER_FILE, Engine
from funasr_mooer.train.figures import Batch, Loader, Sums
from funasr_mooer.train.progress import Progress, draw_curves
from funasr_mooer.train.schedule import factor
from funasr_mooer.train.stages import StageConf, TrainConf, build_optimizer, trainable_parts, trained_parts
from funasr_mooer.train.update import Updater
from funasr_mooer.train.validate import DecodeSample, validate

log = logging.getLogger(__name__)

WriteModel = Callable[[nn.Module, Path, Sequence[str]], None]


class Trainer:
    """Runs the stages of a config, from wherever the experiment stands.

    Args:
        model: honours the model contract: ``forward``, ``parts``, ``train_parts``, ``load_parts``. With a
            ``take_figures(total)`` it tells at each log line what it counted; ``total`` adds up over processes.
        loader: training data.
        engine: processes and device.
        conf: train_conf.
        stages: what to train, in order.
        exp: experiment directory.
        write_model: fills a directory with the model, given the parts to store.
        dev: validation data.
        decode: decodes a sample of the dev set in each validation.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        engine: Engine,
        conf: TrainConf,
        stages: list[StageConf],
        exp: Path,
        write_model: WriteModel,
        dev: Loader | None = None,
        decode: DecodeSample | None = None,
    ):
        self.stored = trained_parts(model, stages)
        self.model, self.loader, self.engine = engine.place(model, self.stored), loader, engine
        self.conf, self.stages = conf, stages
        self.exp, self.write_model, self.dev, self.decode = exp, write_model, dev, decode
        if conf.ema and engine.splits_parameters:
            raise ConfigError("train_conf.ema: ZeRO-3 and FSDP2 split what it averages; use ZeRO-2 or ema: 0")
        self.default_parts = trainable_parts(model)
        self.checkpoints = Checkpoints(exp, conf.keep_nbest_models, conf.ranking)
        self.state = TrainState(seed=conf.seed, world=engine.world, commit=commit(), versions=versions())
        self.updater = Updater(model, engine, conf.seed)
        self.asked = threading.Event()  # this process got a signal
        self.stopping = False  # all processes agreed to stop
        self.ema: Ema | None = None
        self.saved_step: int | None = None
        self.sums, self.clock, self.wait_s = Sums(), time.monotonic(), 0.0

    def run(self) -> bool:
        """Train to the end, or until a signal; False if it was stopped (after saving).

        Raises:
            TrainingError: the loss is not a number any more, or memory ran out.
            DataError: the loader met more unreadable data than it may.
            CheckpointError: a checkpoint cannot be written, or does not belong to this run.
        """
        resume = self._resume()
        state, totals = self.state, self._total_steps()
        self.progress = Progress(
            self.exp, sum(totals), state.step, self.engine.is_main, self.conf.tensorboard, self.conf.wandb
        )
        if resume is not None:
            place = f"stage {self.stages[state.stage].name}, epoch {state.epoch}, batch {state.epoch_batches}"
            self.progress.line("resume", f"{resume}: {place}")
        try:
            with stop_on_signals(self.asked):
                for number in range(state.stage, len(self.stages)):
                    self._run_stage(number, totals[number], resume)
                    resume = None
                    if self.stopping:
                        self.progress.line("stopped", f"at step {state.step}; the same command goes on from there")
                        return False
        finally:
            self.progress.close()
        if self.engine.is_main:
            self._finish()
        self.engine.barrier()
        return True

    # -- stages and epochs ------------------------------------------------------------------------------------

    def _run_stage(self, number: int, total: int, resume: Path | None) -> None:
        state, stage = self.state, self.stages[number]
        if state.stage != number:
            begin = state.epoch + (1 if state.epoch_batches else 0)
            state.stage, state.stage_step = number, 0
            state.stage_epoch, state.epoch, state.epoch_batches = begin, begin, 0
        if resume is not None and self._is_done(stage):
            return
        self._begin(stage, resume)
        self.progress.line("stage", f"{stage.name}: {total} updates of {self.engine.world} x {stage.accum} batches")
        while not self._is_done(stage) and not self.stopping:
            self._run_epoch(stage, total)
        unsaved, judged = self.saved_step != state.step, bool(state.metrics) or self.stopping or self.dev is None
        if unsaved or not judged:
            self._save(validated=not judged)
        if self.ema is not None and not self.stopping:
            self.ema.adopt()  # as a resumed run would find them: the checkpoint holds the averages

    def _begin(self, stage: StageConf, resume: Path | None) -> None:
        """Parts, objective and optimiser of a stage; the optimiser as it was, when resuming."""
        parts = stage.train or self.default_parts
        self.model.train_parts(parts)
        self.model.train()
        if stage.objective is not None:
            set_objective(self.model, stage.objective)
        optimizer = build_optimizer(self.model, parts, stage.optim)
        if self.conf.ema:
            self.ema = Ema([p for group in optimizer.param_groups for p in group["params"]], self.conf.ema)
        self.updater.flops = flops_of(self.model)
        self.engine.start(optimizer, stage.clip)
        if resume is not None:
            extra = self.engine.load_state(resume)
            if self.ema is not None and "ema" in extra:
                self.ema.load(extra["ema"])
        self.progress.parts(self.model, parts)
        self.sums, self.clock = Sums(), time.monotonic()

    def _is_done(self, stage: StageConf) -> bool:
        state = self.state
        by_steps = stage.steps is not None and state.stage_step >= stage.steps
        return by_steps or (stage.epochs is not None and state.epoch - state.stage_epoch >= stage.epochs)

    def _run_epoch(self, stage: StageConf, total: int) -> None:
        """The rest of an epoch, or of the stage; an epoch is over when all its batches came, and only then."""
        state, world = self.state, self.engine.world
        if self.loader.steps(state.epoch, 1) == 0:
            raise DataError(f"epoch {state.epoch} has no batch; give more data")
        left = -(-(self.loader.steps(state.epoch, 1) - state.epoch_batches) // world)
        place = {"rank": self.engine.rank, "world": world, "start_batch": state.epoch_batches}
        batches = iter(self.loader.epoch(state.epoch, **place))
        while left > 0:
            group = self._fetch(batches, min(stage.accum, left))
            left -= len(group)
            rate = factor(stage.schedule, state.stage_step + 1, total)
            sums, self.stopping = self.updater.make(state.step, group, rate, self.wait_s, self.asked.is_set())
            self._count(sums, len(group) * world)
            if self._is_done(stage) or self.stopping:
                return
        state.epoch, state.epoch_batches = state.epoch + 1, 0

    def _fetch(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The batches of one update."""
        start = time.monotonic()
        group = list(itertools.islice(batches, count))
        if len(group) < count:
            raise DataError(f"epoch {self.state.epoch}: the data ended early, {count - len(group)} batches are missing")
        self.wait_s = time.monotonic() - start
        return group

    # -- between updates --------------------------------------------------------------------------------------

    def _count(self, sums: Sums, batches: int) -> None:
        """Take note of an update, then log, validate and save where that is due."""
        state, conf = self.state, self.conf
        state.step, state.stage_step, state.epoch_batches = (
            state.step + 1,
            state.stage_step + 1,
            state.epoch_batches + batches,
        )
        state.metrics = {}
        self.sums.add(sums)
        if self.ema is not None:
            self.ema.update()
        self.progress.tick(state.step, sums.stats["loss"] / max(1.0, sums.weight))
        if state.step == 1 or state.step % conf.log_interval == 0:
            self._log()
        if self.stopping:
            return  # saved where the stage ends, without a validation
        validated = bool(conf.validate_interval) and state.step % conf.validate_interval == 0
        ends = self._is_done(self.stages[state.stage])
        if conf.save_interval and state.step % conf.save_interval == 0 and not ends:
            self._save(validated)
        elif validated:
            with self._averaged():
                self._validate()

    def _log(self) -> None:
        values = self.sums.report(time.monotonic() - self.clock)
        rates = {group["part"]: group["lr"] for group in self.engine.optimizer.param_groups}
        one = len(set(rates.values())) == 1
        values |= {"lr": min(rates.values())} if one else {f"lr/{part}": rate for part, rate in rates.items()}
        peak = self.conf.peak_tflops or devices.peak_tflops(self.engine.device)
        if peak and values["tflops"]:
            values["mfu"] = values["tflops"] / (peak * self.engine.world)
        values |= {"gib": devices.peak_memory_gib(self.engine.device), "epoch": self.state.epoch}
        self.progress.step(self.state.step, values)
        if hasattr(self.model, "take_figures"):  # on every process: they are summed
            self.progress.figures(self.state.step, *self.model.take_figures(self.engine.sum))
        self.sums, self.clock = Sums(), time.monotonic()

    def _save(self, validated: bool) -> None:
        """Write a checkpoint, after a validation if one is due."""
        extra = {} if self.ema is None else {"ema": self.ema.state()}
        with self._averaged():
            if validated:
                self._validate()
            start = time.monotonic()
            path = self.checkpoints.save(self.state, self.engine, self._write, extra)
            self.clock += time.monotonic() - start
        self.saved_step = self.state.step
        if self.engine.is_main:
            best = validated and self.checkpoints.best() == path
            self.progress.line("saved", f"{path}{' (the best so far)' if best else ''}")

    def _write(self, directory: Path) -> None:
        self.write_model(self.model, directory, self.stored)

    def _validate(self) -> None:
        start = time.monotonic()
        state, limit = self.state, self.conf.validate_batches
        state.metrics, texts = validate(self.model, self.engine, self.dev, self.decode, limit, state.step)
        if state.metrics:
            self.progress.valid(state.step, state.metrics)
        self.progress.sample(state.step, texts)
        self.clock += time.monotonic() - start

    def _averaged(self) -> contextlib.AbstractContextManager:
        """Inside, the model has the averaged weights, if there is an average."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    # -- start and end ----------------------------------------------------------------------------------------

    def _resume(self) -> Path | None:
        """Load the newest checkpoint's weights and position; returns it, or None for a fresh start."""
        if self.engine.is_main:
            self.exp.mkdir(parents=True, exist_ok=True)
            self.checkpoints.open()
        self.engine.barrier()
        path = self.checkpoints.latest()
        if len(set(self.engine.gather(path and path.name))) > 1:
            raise CheckpointError(
                f"{self.exp}: not all processes see the same checkpoints; --exp must be on a file system that all hosts share"
            )
        if path is None:
            if self.checkpoints.all():
                raise CheckpointError(
                    f"{self.checkpoints.folder}: none holds {OPTIMIZER_FILE}, so no run can go on from there; start another --exp"
                )
            return None
        state = TrainState.read(path)
        if state.seed != self.conf.seed:
            raise ConfigError(
                f"{path} was trained with seed {state.seed}, train_conf.seed is {self.conf.seed}; "
                "keep the seed, or start another --exp"
            )
        if state.stage >= len(self.stages):
            raise CheckpointError(
                f"{path} is in stage {state.stage} (from 0), the config has {len(self.stages)} stages"
            )
        state.commit, state.versions, state.world = self.state.commit, self.state.versions, self.engine.world
        self.model.load_parts(path, self.stored)
        self.state, self.saved_step = state, state.step
        return path

    def _total_steps(self) -> list[int]:
        """Updates of each stage; of those counted in epochs, estimated from the first epoch."""
        totals = []
        for stage in self.stages:
            bounds = [stage.steps] if stage.steps else []
            if stage.epochs:
                bounds.append(stage.epochs * math.ceil(self.loader.steps(0, self.engine.world) / stage.accum))
            totals.append(min(bounds))
        return totals

    def _finish(self) -> None:
        """Draw the curves, and make ``EXP/model`` a link to the best checkpoint, or to the mean of the best ones."""
        draw_curves(self.exp / "metrics.jsonl", self.exp / "curves.png")
        ranked = self.checkpoints.ranked()[: self.conf.avg_nbest_model]
        final = average(ranked, self.exp / "averaged") if len(ranked) > 1 else self.checkpoints.best()
        link(self.exp / "model", final)
        what = f"mean of {', '.join(path.name for path in ranked)}" if len(ranked) > 1 else final.name
        log.info("%-12s %s (%s)", "model", self.exp / "model", what)


def set_objective(model: nn.Module, name: str) -> None:
    """Choose what the model optimises, with the model's own check if it has one."""
    if hasattr(model, "set_objective"):
        model.set_objective(name)
    else:
        model.objective = name


@contextlib.contextmanager
def stop_on_signals(asked: threading.Event) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM sets ``asked``; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
