#!/usr/bin/env python3
"""Training is killed again and again and must end with the weights of a run that nothing disturbed.

    python benchmarks/resume.py --kills 25 [--json FILE]
    python benchmarks/resume.py --kills 3 --cases 1-plain --spawn

A tiny MooER is trained by ``funasr_mooer.bin.train`` in two stages, with batches of varying size, accumulation,
dropout, augmentation and validation. Its processes get SIGKILL at random moments, every other time while a checkpoint
is being written, and the same command is run again until it ends. Weights and optimiser states must then be equal
to the last bit; otherwise the exit status is 1. Cases are (processes)-(engine).

Processes are forked from a server that has imported everything, so that a start takes no time; with --spawn each
start is the whole command in a new interpreter, launcher and all.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from common.timing import write_json
from common.tiny import make_llm, make_pack, mooer_config
from safetensors.torch import load_file

from funasr_mooer.train.checkpoint import STATE_FILE, TrainState
from funasr_mooer.train.engine import OPTIMIZER_FILE
from funasr_mooer.train.launch import free_port

ZERO_2 = Path(__file__).resolve().parents[1] / "conf/deepspeed/zero2.json"
ENGINES = {
    "plain": [],
    "zero2": ["++train_conf.use_deepspeed=true", f"++train_conf.deepspeed_config={ZERO_2}"],
}
CASES = [f"{nproc}-{engine}" for engine in ENGINES for nproc in (1, 2)]
KILLS_PER_RUN = 5  # then a run may end, and the next one begins
PRELOAD = [
    "funasr_mooer.auto",
    "funasr_mooer.mooer.model",
    "funasr_mooer.train.loop",
    "accelerate",
    "deepspeed",
    "torch._dynamo",
    "tensorboard",
]


@dataclass
class Tally:
    """What one case came to.

    Attributes:
        kills: runs that got SIGKILL before their end.
        in_save: of these, while a checkpoint was being written.
        runs: runs that got them, up to five each; each ended in time and was compared.
        worst: largest difference of any weight or optimiser state from the undisturbed run.
        unequal: names of what differs.
    """

    kills: int = 0
    in_save: int = 0
    runs: int = 0
    worst: float = 0.0
    unequal: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, metavar="N", help="of each case")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, help="default: all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--spawn", action="store_true", help="start the whole command each time")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    failed = False
    if not args.spawn:
        server()
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        command = prepare(Path(folder))
        start = spawn if args.spawn else fork
        for case in args.cases:
            begin = time.monotonic()
            tally = torment(Path(folder) / case, case, command, start, args.kills, random.Random(f"{args.seed} {case}"))
            failed |= bool(tally.unequal)
            print(
                f"{case:10} {tally.kills} kills of {tally.runs} runs, {tally.in_save} while a checkpoint was written; "
                f"largest difference {tally.worst:g} {' '.join(tally.unequal[:3])} ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            name = f"resume_{case.replace('-', '_')}"
            figures |= {f"{name}_kills": tally.kills, f"{name}_kills_in_save": tally.in_save}
            figures |= {f"{name}_killed_runs": tally.runs, f"{name}_difference": tally.worst}
        figures |= across_cases(Path(folder), args.cases)
    if args.json:
        write_json(args.json, figures)
    print("FAILED: a killed run ended otherwise" if failed else "every killed run ended with the same bits")
    return int(failed)


def prepare(folder: Path) -> list[str]:
    """Make LLM, pack and config; returns the arguments of ``train`` but for --exp."""
    llm = make_llm(folder / "llm")
    pack = make_pack(folder, llm, utts=60)
    config = mooer_config(llm)
    config["dataset_conf"] = {
        "budget": 150,
        "num_workers": 0,  # the same batches either way; a worker takes seconds to start
        "augment": {"speed": [0.9, 1.0, 1.1], "gain_db": 6, "noise_snr_db": [5, 20], "freq_masks": 2, "time_masks": 2},
    }
    stage = {"accum": 2, "clip": 1.0, "schedule": {"type": "cosine", "warmup_steps": 3}}
    config["train_conf"] = {
        "stages": [
            {"name": "adapter", "train": ["adapter"], "steps": 6, "optim": {"lr": 0.01}},
            {"name": "all", "train": ["encoder", "adapter", "lora"], "steps": 14, "optim": {"lr": 0.003}, **stage},
        ],
        "validate_interval": 4,
        "validate_batches": 3,
        "save_checkpoint_interval": 2,
        "keep_nbest_models": 2,
        "dtype": "float32",
        "tensorboard": False,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "config.yaml"), "--train", str(pack), "--dev", str(pack), "--device", "cpu"]


# -- killing --------------------------------------------------------------------------------------------------


def torment(
    folder: Path, case: str, command: Sequence[str], start: Callable, kills: int, moments: random.Random
) -> Tally:
    """Run a case undisturbed, then with kills, and compare."""
    nproc, engine = int(case[0]), case[2:]
    argv = [*command, *ENGINES[engine]]
    begin = time.monotonic()
    run(start([*argv, "--exp", str(folder / "straight")], nproc, folder / "straight.log"), folder / "straight.log")
    seconds, tally = time.monotonic() - begin, Tally()
    while tally.kills < kills:
        exp, log, before = folder / f"run{tally.runs}", folder / f"run{tally.runs}.log", tally.kills
        for _ in range(min(KILLS_PER_RUN, kills - tally.kills)):
            processes = start([*argv, "--exp", str(exp)], nproc, log)
            if not kill(processes, exp, log, seconds, moments, in_save=bool(tally.kills % 2)):
                break
            tally.kills += 1
            tally.in_save += any((exp / "checkpoints").glob(".step-*"))
        run(start([*argv, "--exp", str(exp)], nproc, log), log)
        for name, difference in differences(folder / "straight/last", exp / "last"):
            tally.worst = max(tally.worst, difference)
            tally.unequal.append(f"{exp.name}:{name}")
        tally.runs += tally.kills > before  # one that ended before its first kill shows nothing
        shutil.rmtree(exp)
    return tally


def run(processes: Sequence[Any], log: Path) -> None:
    """Wait until a run has ended well; show what it said if it did not."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{log}: exit status {codes}\n{log.read_text()[-4000:]}")


def kill(processes: Sequence[Any], exp: Path, log: Path, seconds: float, moments: random.Random, in_save: bool) -> bool:
    """SIGKILL to all processes of a run, at a random moment; False if it ended before."""
    until = time.monotonic() + moments.uniform(0, 0.8 * seconds)
    _wait_until(lambda: time.monotonic() > until, processes)
    if in_save:
        _wait_until(lambda: any((exp / "checkpoints").glob(".step-*")), processes)
        time.sleep(moments.uniform(0, 0.03))
    ended = all(process.poll() is not None for process in processes)
    for process in moments.sample(processes, len(processes)):
        process.kill()
        time.sleep(moments.uniform(0, 0.1))  # the others notice, or do not
    codes = [process.wait() for process in processes]
    if not ended and any(code not in (0, 1, -signal.SIGKILL) for code in codes):
        raise SystemExit(f"{exp}: exit status {codes}\n{log.read_text()[-4000:]}")
    return not ended and any(codes)


def _wait_until(reached: Callable[[], bool], processes: Sequence[Any]) -> None:
    while not reached() and any(process.poll() is None for process in processes):
        time.sleep(0.001)


# -- starting -------------------------------------------------------------------------------------------------


class Forked:
    """A forked process with the interface of :class:`subprocess.Popen`."""

    def __init__(self, process: multiprocessing.Process):
        self.process = process
        process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """What processes are forked from, once it has imported everything: no run is timed together with that."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOAD])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def fork(argv: Sequence[str], nproc: int, log: Path) -> list[Forked]:
    """Start the processes of a run as its launcher would, from :func:`server`."""
    shared = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), **shared} if nproc > 1 else {} for r in range(nproc)]
    log.parent.mkdir(exist_ok=True)
    return [Forked(server().Process(target=train, args=(argv, environment, log))) for environment in ranks]


def train(argv: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """One process of a run: the command itself."""
    gc.freeze()  # what was imported before the fork is shared; looking for garbage in it would copy it
    from funasr_mooer.bin.train import main as train_main

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(train_main(argv))


def spawn(argv: Sequence[str], nproc: int, log: Path) -> list[subprocess.Popen]:
    """Start the command; a kill meets its launcher, and the processes end with it."""
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "funasr_mooer.bin.train", *argv, "--nproc", str(nproc)]
    with open(log, "a") as file:
        return [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)]


# -- comparing ------------------------------------------------------------------------------------------------


def differences(left: Path, right: Path) -> Iterator[tuple[str, float]]:
    """Names and sizes of all differences between two checkpoints: weights, optimiser states, position."""
    mine, theirs = dict(contents(left)), dict(contents(right))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape:
            yield name, float("inf")
        elif not torch.equal(mine[name], theirs[name]):
            yield name, float((mine[name].double() - theirs[name].double()).abs().max())
    if position(left) != position(right):
        yield STATE_FILE, float("inf")


def contents(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint by name."""
    for file in sorted(checkpoint.rglob("*.safetensors")):
        yield from ((f"{file.stem}.{name}", tensor) for name, tensor in load_file(file).items())
    state = torch.load(checkpoint / OPTIMIZER_FILE, weights_only=True)["optimizer"]["state"]
    for number, moments in state.items():
        yield from ((f"optimizer.{number}.{name}", torch.as_tensor(value)) for name, value in moments.items())


def position(checkpoint: Path) -> tuple:
    """Where training stands, and what the last validation found."""
    state = TrainState.read(checkpoint)
    return state.stage, state.step, state.epoch, state.epoch_batches, state.metrics


def across_cases(folder: Path, cases: Sequence[str]) -> dict[str, float]:
    """Largest difference of a weight between ZeRO-2 and plain training on as many processes."""
    found = {}
    for nproc in (1, 2):
        pair = [folder / f"{nproc}-{engine}/straight/last" for engine in ("plain", "zero2")]
        if all(path.parent.parent.name in cases for path in pair):
            plain, zero = (dict(contents(path)) for path in pair)
            weights = [name for name in plain if not name.startswith("optimizer.")]
            worst = max(float((plain[name] - zero[name]).abs().max()) for name in weights)
            print(f"{nproc} process(es): weights of ZeRO-2 and plain training differ by {worst:g} at most")
            found[f"resume_{nproc}_zero2_vs_plain"] = worst
    return found


if __name__ == "__main__":
    sys.exit(main())
