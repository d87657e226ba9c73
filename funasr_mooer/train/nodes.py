"""Which processes there are on which hosts, from the command line, a hostfile, SLURM or another launcher.

Each host runs the same command and starts its own processes; the first host's address is where they meet. torchrun
and DeepSpeed's launcher, and SLURM with a task per device, have started the processes already and say so in the
environment.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from funasr_mooer.errors import ConfigError

PORT = 29500  # where processes of several hosts meet, if nothing else is said
LAUNCHED = ("RANK", "WORLD_SIZE")  # what torchrun, DeepSpeed's launcher and ours set


@dataclass(frozen=True)
class Nodes:
    """The processes of a run, as one of its hosts sees them.

    Attributes:
        world: processes on all hosts.
        first_rank: number of this host's first process.
        local: processes on this host.
        master_addr: name or address of the first host.
        master_port: where its first process listens.
    """

    world: int
    first_rank: int
    local: int
    master_addr: str
    master_port: int

    @classmethod
    def alike(cls, nnodes: int, node_rank: int | None, nproc: int, master_addr: str | None, port: int) -> Nodes:
        """``nnodes`` hosts with ``nproc`` processes each.

        Raises:
            ConfigError: numbers that do not fit, or several hosts and no address to meet at.
        """
        if node_rank is None and nnodes == 1:
            node_rank = 0
        if node_rank is None or not 0 <= node_rank < nnodes:
            raise ConfigError(f"--node-rank {node_rank}: give 0 to {nnodes - 1} with --nnodes {nnodes}")
        if nnodes > 1 and master_addr is None:
            raise ConfigError(f"--nnodes {nnodes}: give --master-addr, the first host's name or address, on every host")
        return cls(nnodes * nproc, node_rank * nproc, nproc, master_addr or "127.0.0.1", port)

    @classmethod
    def of_hostfile(cls, file: str | Path, node_rank: int | None, master_addr: str | None, port: int) -> Nodes:
        """The hosts of a file in DeepSpeed's format (``host slots=8`` per line), with one process per slot.

        Args:
            file: the hostfile.
            node_rank: this host's line, from 0; None looks for this host's name or address.
            master_addr: None takes the first host's name.
            port: where its first process listens.

        Raises:
            ConfigError: the file cannot be read, or does not name this host.
        """
        hosts = read_hostfile(file)
        if node_rank is None:
            mine = own_names()
            node_rank = next((number for number, (host, _) in enumerate(hosts) if host in mine), None)
            if node_rank is None:
                names = ", ".join(host for host, _ in hosts[:4])
                raise ConfigError(
                    f"{file}: names {names}, but not this host ({socket.gethostname()}); give --node-rank"
                )
        if not 0 <= node_rank < len(hosts):
            raise ConfigError(f"--node-rank {node_rank}: {file} has {len(hosts)} hosts")
        slots = [count for _, count in hosts]
        return cls(sum(slots), sum(slots[:node_rank]), slots[node_rank], master_addr or hosts[0][0], port)


def read_hostfile(file: str | Path) -> list[tuple[str, int]]:
    """Hosts and their slots, in the order of the file; text after ``#`` is a comment.

    Raises:
        ConfigError: it is absent, empty, names a host twice, or a line has another form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {file}: cannot be read ({error.strerror})") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9]\d*)", text)
        if found is None or found[1] in hosts:
            why = "a second time" if found else "is not of the form 'host slots=8'"
            raise ConfigError(f"{file}:{number}: '{text}' {why}")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{file}: names no host")
    return list(hosts.items())


def own_names() -> set[str]:
    """Names and addresses of this host."""
    name = socket.gethostname()
    names = {name, name.partition(".")[0], socket.getfqdn()}
    try:
        return names | {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except socket.gaierror:
        return names


def is_launched(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process was started as one of several, by our launcher or another one."""
    adopt_slurm(environment)
    return all(name in environment for name in LAUNCHED)


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Say what ``srun`` with several tasks has set as torch wants to hear it; nothing where another launcher spoke."""
    if any(name in environment for name in LAUNCHED) or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment:  # in a batch script, outside of srun
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
    environment.setdefault("MASTER_ADDR", first_host(nodelist))
    # Jobs that share a host should not meet at one port.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodelist: str) -> str:
    """First name of SLURM's short form: ``gpu[003-006,9],login1`` -> ``gpu003``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodelist)
    if found is None:
        raise ConfigError(f"SLURM_NODELIST: '{nodelist}' is not a list of hosts")
    return found[1] + (found[2] or "") + (found[3] or "")
