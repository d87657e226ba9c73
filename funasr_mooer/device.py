"""The only file that knows accelerators: CPU, CUDA, and MUSA (Moore Threads, through torch_musa)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from funasr_mooer.errors import DeviceError

log = logging.getLogger(__name__)

ACCELERATORS = ("musa", "cuda")  # in the order in which "auto" looks for them
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "musa": "mccl"}
HUGE_PAGE = 2 << 20  # bytes, on x86 and on ARM with pages of 4 KiB
MADV_HUGEPAGE = 14  # of madvise(2)


def resolve(name: str | torch.device = "auto") -> torch.device:
    """The device to run on: ``auto`` takes MUSA, then CUDA, then the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda[:n]`` or ``musa[:n]``.

    Raises:
        DeviceError: the device was named and is not usable here.
    """
    if str(name) == "auto":
        name = next((kind for kind in ACCELERATORS if is_available(kind)), "cpu")
    kind = str(name).split(":")[0]
    if kind not in COLLECTIVES:
        raise DeviceError(f"device '{name}' is not known; use one of auto, cpu, cuda, musa")
    if kind != "cpu" and not is_available(kind):
        reason = (kind == "musa" and _import_torch_musa()) or f"torch sees no {kind} device"
        raise DeviceError(f"device '{name}': {reason}; use --device cpu, or run funasr-mooer doctor")
    return torch.device(name)


def is_available(kind: str) -> bool:
    """Whether this process can use devices of ``kind`` (``cpu``, ``cuda`` or ``musa``)."""
    if kind == "cpu":
        return True
    if kind == "musa" and _import_torch_musa():
        return False
    return hasattr(torch, kind) and backend(kind).is_available()


def describe(kind: str) -> list[str]:
    """One line per usable device of ``kind``: its name and memory; for ``cpu`` its cores."""
    if kind == "cpu":
        return [f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch"]
    found = [backend(kind).get_device_properties(index) for index in range(backend(kind).device_count())]
    return [f"{item.name}, {item.total_memory / 2**30:.0f} GiB" for item in found]


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module; its Parameters stay the same objects, so optimisers and tied weights stay whole."""
    with keeping_parameters(device):
        return module.to(device)


@contextlib.contextmanager
def keeping_parameters(device: torch.device) -> Iterator[None]:
    """Inside, ``Module.to(device)`` keeps Parameter objects; see :func:`place`.

    On PrivateUse1 devices such as MUSA torch would replace each by a new one. It cannot keep those that someone holds
    weak references to, as DeepSpeed does; therefore not for good.
    """
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps or device.type == "musa")
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def collective_backend(device: torch.device) -> str:
    """Name of the torch.distributed backend for tensors on ``device``."""
    return COLLECTIVES[device.type]


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using: where the device says so; on a CPU only with native support."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    module = backend(device.type)
    if hasattr(module, "is_bf16_supported"):
        return module.is_bf16_supported()
    return module.get_device_capability(device) > (2, 1)  # torch_musa: not the MTT S80 and older ones


def has_grouped_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups of rows, whose sizes the host need not know, in one fast kernel.

    That is CUDA of compute capability 9 and 10 in bfloat16. Elsewhere torch loops over the groups and waits for their sizes.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with weights in oneDNN's blocked layout are to be had: x86 CPUs, bfloat16 only where native."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supports_bf16(device))


def on_huge_pages(x: torch.Tensor) -> torch.Tensor:
    """``x``, new and not written yet; on a CPU under Linux its memory will come in pages of 2 MiB.

    Blocks above 32 MiB come fresh from the kernel each time, and taking them page by page of 4 KiB can cost more than
    what is computed into them. Where the kernel has no such pages, nothing changes.
    """
    size = x.numel() * x.element_size()
    real = type(x) is torch.Tensor and x.device.type == "cpu"  # not one that stands for another while torch compiles
    if real and size >= 2 * HUGE_PAGE and sys.platform == "linux":
        begin = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (x.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return x


def backend(kind: str) -> ModuleType:
    """torch's module for accelerators of ``kind``: ``torch.cuda`` or ``torch.musa``."""
    return getattr(torch, kind)


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


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far, GiB: device memory, or this process's resident set on a CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return backend(device.type).max_memory_allocated(device) / 2**30


class Card(NamedTuple):
    """What a data sheet says of an accelerator: dense bfloat16 TFLOP/s (float16 where it has no bfloat16), and GiB."""

    tflops: float
    gib: float


# By a word of the name that the driver gives, in the order in which they are tried; NVIDIA's and Moore Threads' data sheets.
CARDS = {
    "b200": Card(2250, 180),
    "h200": Card(989, 141),
    "h20": Card(148, 96),
    "h100 pcie": Card(756, 80),
    "h100": Card(989, 80),
    "h800": Card(989, 80),
    "a100": Card(312, 80),
    "a800": Card(312, 80),
    "l40s": Card(362, 48),
    "l40": Card(181, 48),
    "a10": Card(125, 24),
    "v100": Card(125, 32),
    "4090": Card(165, 24),
    "s4000": Card(100, 48),
}


def peak_tflops(device: torch.device) -> float | None:
    """Dense TFLOP/s of an accelerator by its name; None for a CPU and for what is not in :data:`CARDS`."""
    if device.type == "cpu":
        return None
    name = backend(device.type).get_device_properties(device).name.lower()
    return next((card.tflops for word, card in CARDS.items() if word in name), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    kinds = tuple({getattr(torch, "OutOfMemoryError", MemoryError), torch.cuda.OutOfMemoryError, MemoryError})
    text = str(error).lower()
    return isinstance(error, kinds) or "out of memory" in text or "can't allocate memory" in text


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.cache
def _import_torch_musa() -> str:
    """Make ``torch.musa`` known to torch; what is in the way, or an empty string."""
    if importlib.util.find_spec("torch_musa") is None:
        return "torch_musa is not installed"
    try:
        importlib.import_module("torch_musa")
    except (ImportError, OSError, RuntimeError) as error:  # without a driver, or beside another torch than its own
        reason = f"torch_musa is installed, but fails: {error}".splitlines()[0]
        log.warning("%s", reason)
        return reason
    return ""
