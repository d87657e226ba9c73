"""The only file that knows accelerators: CPU, CUDA, and MUSA (Moore Threads, through torch_musa)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random

import numpy as np
import torch

from funasr_mooer.errors import DeviceError

ACCELERATORS = ("musa", "cuda")  # in the order in which "auto" looks for them
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "musa": "mccl"}


def resolve(name: str | torch.device = "auto") -> torch.device:
    """The device to run on: ``auto`` takes MUSA, then CUDA, then the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda[:n]`` or ``musa[:n]``.

    Raises:
        DeviceError: the device was named and is not usable here.
    """
    if str(name) == "auto":
        kind = next((kind for kind in ACCELERATORS if is_available(kind)), "cpu")
        return torch.device(kind)
    kind = str(name).split(":")[0]
    if kind not in COLLECTIVES:
        raise DeviceError(f"device '{name}' is not known; use one of auto, cpu, cuda, musa")
    if kind != "cpu" and not is_available(kind):
        reason = (
            "torch_musa is not installed"
            if kind == "musa" and not _musa_installed()
            else f"torch sees no {kind} device"
        )
        raise DeviceError(f"device '{name}': {reason}; use --device cpu, or run funasr-mooer doctor")
    device = torch.device(name)
    if kind == "musa":
        keep_parameters_on_move()
    return device


def is_available(kind: str) -> bool:
    """Whether this process can use devices of ``kind`` (``cpu``, ``cuda`` or ``musa``)."""
    if kind == "cpu":
        return True
    if kind == "musa" and not _musa_installed():
        return False
    if kind == "musa":
        importlib.import_module("torch_musa")
    backend = getattr(torch, kind, None)
    return backend is not None and backend.is_available()


def describe(kind: str) -> list[str]:
    """One line per usable device of ``kind``: its name and memory; for ``cpu`` its cores."""
    if kind == "cpu":
        return [f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch"]
    backend = getattr(torch, kind)
    found = [backend.get_device_properties(index) for index in range(backend.device_count())]
    return [f"{item.name}, {item.total_memory / 2**30:.0f} GiB" for item in found]


def keep_parameters_on_move() -> None:
    """Let ``Module.to()`` keep Parameter objects, so optimisers and tied weights stay whole.

    On PrivateUse1 devices such as MUSA torch would otherwise replace each Parameter by a new one.
    """
    torch.__future__.set_swap_module_params_on_conversion(True)


def collective_backend(device: torch.device) -> str:
    """Name of the torch.distributed backend for tensors on ``device``."""
    return COLLECTIVES[device.type]


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using: always on MUSA and recent CUDA; on a CPU only with native support."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return True


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision on ``device``; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """State of every random generator that training draws from; see :func:`set_rng_state`."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    for kind in ACCELERATORS:
        if is_available(kind):
            state[kind] = getattr(torch, kind).get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Put back what :func:`rng_state` returned; states of devices that are absent here are ignored."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for kind in ACCELERATORS:
        if kind in state and is_available(kind):
            getattr(torch, kind).set_rng_state(state[kind])


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far, GiB: device memory, or this process's resident set on a CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return getattr(torch, device.type).max_memory_allocated(device) / 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    kinds = tuple({getattr(torch, "OutOfMemoryError", MemoryError), torch.cuda.OutOfMemoryError, MemoryError})
    text = str(error).lower()
    return isinstance(error, kinds) or "out of memory" in text or "can't allocate memory" in text


def _musa_installed() -> bool:
    return importlib.util.find_spec("torch_musa") is not None
