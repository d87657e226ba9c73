"""Stands in for the vendor's torch_musa in tests: importing it makes a device ``musa`` that computes on the CPU.

With this folder in PYTHONPATH, a program that asks for MUSA gets it. The C++ part is compiled at the first import
(half a minute) into ``build/fake_musa`` of the repository and found there afterwards.

Environment: FAKE_MUSA_DEVICES (how many devices, default 1), FAKE_MUSA_BYTES (memory of all together, default endless).
"""

import contextlib
import hashlib
import os
import tempfile
import types
from pathlib import Path

import fake_mccl
import torch

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "fake_musa"


def library() -> Path:
    """The compiled device, for this source and this torch.

    It is built aside and renamed, so one that is killed half-way leaves nothing that a later one would wait for.
    """
    source = HERE / "fake_musa.cpp"
    version = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = CACHE / f"fake_musa_{version}.so"
    if not built.is_file():
        from torch.utils import cpp_extension

        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            os.environ.setdefault("MAX_JOBS", "1")
            cpp_extension.load(
                "fake_musa", [str(source)], extra_cflags=["-O0", "-g0"], build_directory=aside, is_python_module=False
            )
            os.replace(Path(aside) / "fake_musa.so", built)
        return built  # it is loaded already
    torch.ops.load_library(built)
    return built


def device_module() -> types.ModuleType:
    """``torch.musa``: of the vendor's module, what torch, Accelerate, DeepSpeed and this project ask for."""
    musa, ops = types.ModuleType("torch.musa"), torch.ops.fake_musa

    def index(device: object = None) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return musa.current_device() if found is None else found

    class Device:
        """Context in which another device is the current one."""

        def __init__(self, device: object):
            self.index = index(device)

        def __enter__(self):
            self.previous = musa.current_device()
            musa.set_device(self.index)

        def __exit__(self, *_: object):
            musa.set_device(self.previous)

    generator = torch.default_generator
    musa.device = Device
    musa.is_available = lambda: musa.device_count() > 0
    musa.is_initialized = lambda: True
    musa.device_count = lambda: ops.device_count()
    musa.current_device = lambda: ops.current_device()
    musa.set_device = lambda device: ops.set_device(index(device))
    musa.get_device_name = lambda device=None: "simulated MUSA device"
    musa.get_device_properties = lambda device=None: types.SimpleNamespace(
        name=musa.get_device_name(device), total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    musa.synchronize = musa.empty_cache = lambda device=None: None

    musa.Stream = lambda device=None, **_: torch.Stream(f"musa:{index(device)}")
    musa.current_stream = musa.default_stream = lambda device=None: musa.Stream(device)
    musa.stream = lambda stream: contextlib.nullcontext()
    musa.Event = lambda **_: torch.Event("musa")

    musa.memory_allocated = musa.memory_reserved = lambda device=None: ops.bytes_held()
    musa.max_memory_allocated = musa.max_memory_reserved = lambda device=None: ops.bytes_peak()
    musa.reset_peak_memory_stats = lambda device=None: ops.reset_peak()
    musa.memory_stats = lambda device=None: {}

    musa._is_in_bad_fork = lambda: False
    musa.default_generators = [generator]
    musa.manual_seed = musa.manual_seed_all = generator.manual_seed
    musa.initial_seed = generator.initial_seed
    musa.get_rng_state = lambda device=None: generator.get_state()
    musa.set_rng_state = lambda state, device=None: generator.set_state(state)

    musa.is_bf16_supported = lambda: True
    musa.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return musa


library()
torch.utils.rename_privateuse1_backend("musa")
torch._register_device_module("musa", device_module())
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
torch.version.musa = "simulated"
fake_mccl.register()
