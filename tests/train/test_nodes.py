"""Which processes run where: from options, hostfiles and other launchers; and a run over two hosts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from funasr_mooer.bin import train
from funasr_mooer.errors import ConfigError
from funasr_mooer.train.nodes import Nodes, first_host, is_launched, read_hostfile


def test_hosts_alike_number_their_processes_one_after_the_other():
    assert Nodes.alike(2, 1, 8, "host0", 29500) == Nodes(16, 8, 8, "host0", 29500)
    assert Nodes.alike(1, None, 2, None, 29500).master_addr == "127.0.0.1"


def test_a_hostfile_gives_each_host_its_slots(tmp_path):
    (tmp_path / "hosts").write_text(f"# two machines\nhost0 slots=2\n\n{socket.gethostname()}  slots = 4 # this one\n")
    assert Nodes.of_hostfile(tmp_path / "hosts", None, None, 29501) == Nodes(6, 2, 4, "host0", 29501)
    assert Nodes.of_hostfile(tmp_path / "hosts", 0, "10.0.0.1", 1).master_addr == "10.0.0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host0 8\n", r"hosts:1: 'host0 8' is not of the form 'host slots=8'"),
        ("a slots=1\na slots=1\n", r"hosts:2: 'a slots=1' a second time"),
        ("# nothing\n", "names no host"),
        ("elsewhere slots=1\n", "names elsewhere, but not this host .*; give --node-rank"),
    ],
)
def test_a_hostfile_that_cannot_be_right_is_an_error_with_its_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Nodes.of_hostfile(tmp_path / "hosts", None, None, 29500)


def test_an_absent_hostfile_and_missing_options_say_what_to_give(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--hostfile .*absent: cannot be read"):
        read_hostfile(tmp_path / "absent")
    command = ["--config", "x.yaml", "--exp", "exp", "--train", "pack", "--nnodes", "2"]
    assert train.main([*command, "--master-addr", "host0"]) == 2
    assert "--node-rank None: give 0 to 1 with --nnodes 2" in capsys.readouterr().err
    assert train.main([*command, "--node-rank", "1"]) == 2
    assert "give --master-addr, the first host's name or address" in capsys.readouterr().err


def test_slurm_with_a_task_per_process_is_understood():
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "20123"}
    environment = {**slurm, "SLURM_STEP_NODELIST": "gpu[07-08]"}
    assert is_launched(environment)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20123"}
    assert expected.items() <= environment.items()


def test_slurm_is_left_alone_in_a_batch_script_and_under_another_launcher():
    assert not is_launched({"SLURM_NTASKS": "4"})
    assert not is_launched({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    assert is_launched(torchrun)
    assert torchrun["RANK"] == "0"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("rack2-[1,5]-ib", "rack2-1-ib"),
        ("n1,n[2-3]", "n1"),
    ],
)
def test_the_first_host_of_slurms_short_form(nodelist, host):
    assert first_host(nodelist) == host


def test_what_deepspeeds_launcher_adds_to_a_command_is_taken():
    args, overrides = train.parse(["--local_rank=1", "--config", "c", "--exp", "e", "--train", "p", "++seed=1"])
    assert (args.local_rank, overrides) == (1, ["++seed=1"])


# -- two hosts: network namespaces, joined by a cable ---------------------------------------------------------


@pytest.fixture
def two_hosts():
    """The names of two network namespaces, at 10.77.0.1 and 10.77.0.2 on an interface ``cable``."""
    names = [f"mooer{os.getpid()}{letter}" for letter in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("no command 'ip' to make network namespaces with")
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def training_command(tmp_path, monkeypatch):
    """Arguments of a run that the benchmark of resuming makes; --exp is left to the test."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from resume import prepare

    return prepare(tmp_path)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def assert_same_weights(one: Path, other: Path) -> None:
    files = sorted(one.rglob("*.safetensors"))
    assert files
    for file in files:
        mine, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.slow
def test_torchrun_and_deepspeed_train_what_our_own_launcher_does(tmp_path, training_command):
    launchers = {
        "ours": [sys.executable],
        "torchrun": ["torchrun", "--nproc-per-node", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2"],
    }
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name, launcher in launchers.items():
        module = ["--module" if name == "deepspeed" else "-m", "funasr_mooer.bin.train"]
        own = ["--nproc", "2"] if name == "ours" else []
        command = [*launcher, *module, *training_command, *own, "--exp", str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, timeout=400)
        assert_same_weights(tmp_path / "ours/last", tmp_path / name / "last")


@pytest.mark.slow
def test_two_hosts_train_as_two_processes_of_one_and_a_lost_host_ends_the_run(tmp_path, two_hosts, training_command):
    def start(host, rank, exp):
        place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1", "--exp", str(tmp_path / exp)]
        command = [sys.executable, "-m", "funasr_mooer.bin.train", *training_command, *place]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable"}
        return subprocess.Popen(["ip", "netns", "exec", host, *command], env=environment)

    one = [sys.executable, "-m", "funasr_mooer.bin.train", *training_command, "--nproc", "2"]
    subprocess.run([*one, "--exp", str(tmp_path / "one")], check=True)

    hosts = [start(host, rank, "two") for rank, host in enumerate(two_hosts)]
    first = tmp_path / "two/checkpoints/step-2"
    while not first.exists() and hosts[1].poll() is None:
        pass
    hosts[1].send_signal(signal.SIGKILL)  # "ip netns exec" has become the launcher
    assert hosts[0].wait(timeout=120) not in (0, None)
    hosts[1].wait()

    hosts = [start(host, rank, "two") for rank, host in enumerate(two_hosts)]
    assert [host.wait(timeout=200) for host in hosts] == [0, 0]
    assert_same_weights(tmp_path / "one/last", tmp_path / "two/last")
    assert json.loads((tmp_path / "two/last/train_state.json").read_text())["world"] == 2
