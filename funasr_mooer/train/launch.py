"""Start N processes of a command on this machine, and end them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from funasr_mooer.train.nodes import Nodes

GRACE_S = 60.0  # time to write a checkpoint after a signal
STOPPED = 130  # exit status of a run that was asked to stop, and saved


def launch(command: Sequence[str], nproc: int, nodes: Nodes | None = None) -> int:
    """Run ``command`` as ``nproc`` processes that find each other; returns the first failing exit status, or 0.

    When one fails the others are ended. SIGINT and SIGTERM are handed on once, and the processes may save first.
    If this process is killed, they end too.

    Args:
        command: program and arguments.
        nproc: processes on this host.
        nodes: of a run on several hosts: what the others do. When they fail, their connections break, and so do ours.
    """
    nodes = nodes or Nodes(nproc, 0, nproc, "127.0.0.1", free_port())
    environment = {**os.environ, "WORLD_SIZE": str(nodes.world), "LOCAL_WORLD_SIZE": str(nproc)}
    environment |= {"MASTER_ADDR": nodes.master_addr, "MASTER_PORT": str(nodes.master_port)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    processes = []
    previous = {}
    try:
        for local in range(nproc):
            ranks = {"RANK": str(nodes.first_rank + local), "LOCAL_RANK": str(local), "FUNASR_MOOER_PARENT_PIPE": "1"}
            # Own sessions: a Ctrl-C reaches only us, so each process is asked to stop once, not twice.
            processes.append(
                subprocess.Popen(command, env=environment | ranks, stdin=subprocess.PIPE, start_new_session=True)
            )
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda *_: _end(processes, signal.SIGTERM))
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(processes, signal.SIGKILL)
        for process in processes:
            process.stdin.close()
            process.wait()


def end_with_parent() -> None:
    """In a process started by :func:`launch`: end at once if the launcher is gone."""
    if os.environ.pop("FUNASR_MOOER_PARENT_PIPE", None):
        threading.Thread(target=_watch_stdin, daemon=True).start()


def launch_alone() -> None:
    """Make a process that nobody launched a group of one, for engines that always need a group."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for key, value in alone.items():
        os.environ.setdefault(key, str(value))
    os.environ.setdefault("MASTER_PORT", str(free_port()))


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    failed, deadline = 0, None
    while None in [process.poll() for process in processes]:
        failed = failed or next((p.returncode for p in processes if p.returncode), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
            if failed != STOPPED:  # else the others are about to end by themselves, at the same checkpoint
                _end(processes, signal.SIGKILL)
        if deadline is not None and time.monotonic() > deadline:
            _end(processes, signal.SIGKILL)
        time.sleep(0.05)
    failed = failed or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - failed if failed < 0 else failed


def _end(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _watch_stdin() -> None:
    os.read(0, 1)  # returns when the launcher's end of the pipe is closed; sys.stdin would lock the exit
    os._exit(1)
