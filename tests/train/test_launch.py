"""Several processes of one command: they start together and end together."""

import os
import signal
import subprocess
import sys
import time

from funasr_mooer.train.launch import launch


def script(tmp_path, body):
    file = tmp_path / "script.py"
    file.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
    return [sys.executable, str(file)]


def test_processes_know_their_ranks_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'OMP_NUM_THREADS'"
    body = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in ({names})))"
    assert launch(script(tmp_path, body), 2) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [f"2 {r} 127.0.0.1 {threads}" for r in (0, 1)]


def test_when_one_fails_the_others_end_and_its_status_is_returned(tmp_path):
    start = time.monotonic()
    assert launch(script(tmp_path, "sys.exit(3) if rank == 1 else time.sleep(60)"), 2) == 3
    assert launch(script(tmp_path, "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)"), 2) == 137
    assert time.monotonic() - start < 20


def test_a_signal_is_handed_on_once_and_the_processes_may_save(tmp_path):
    body = f"""
def save(*_):
    time.sleep(0.2)
    open(f'{tmp_path}/{{rank}}', 'a').write('saved ')
    os._exit(130)
signal.signal(signal.SIGTERM, save)
open(f'{tmp_path}/ready{{rank}}', 'w')
time.sleep(60)
"""
    program = (
        f"import sys; from funasr_mooer.train.launch import launch; sys.exit(launch({script(tmp_path, body)!r}, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=30) == 130
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["saved ", "saved "]


def test_when_the_launcher_is_killed_its_processes_end(tmp_path):
    body = f"""
from funasr_mooer.train.launch import end_with_parent
end_with_parent()
open(f'{tmp_path}/{{rank}}', 'w').write(str(os.getpid()))
os.rename(f'{tmp_path}/{{rank}}', f'{tmp_path}/ready{{rank}}')
time.sleep(60)
"""
    program = f"from funasr_mooer.train.launch import launch; launch({script(tmp_path, body)!r}, 2)"
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    pids = [int((tmp_path / f"ready{rank}").read_text()) for rank in (0, 1)]
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in _state(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.1)


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2]
    except FileNotFoundError:
        return "Z"
