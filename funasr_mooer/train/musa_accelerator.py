"""What DeepSpeed must know about MUSA, of which its releases know nothing: they take such a class by set_accelerator().

Imports DeepSpeed, so only :mod:`funasr_mooer.train.zero` imports this, when it is asked for.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from funasr_mooer import device as devices

# DeepSpeed's methods that torch.musa has under the same name ...
SAME = """is_available device_count current_device set_device device synchronize
    stream current_stream default_stream empty_cache
    memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_stats reset_peak_memory_stats
    manual_seed manual_seed_all initial_seed get_rng_state set_rng_state""".split()
# ... and those that older versions of torch called otherwise.
RENAMED = {
    "memory_cached": "memory_reserved",
    "max_memory_cached": "max_memory_reserved",
    "reset_max_memory_allocated": "reset_peak_memory_stats",
    "reset_max_memory_cached": "reset_peak_memory_stats",
}
TENSORS = {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}


def _forward_to_torch_musa(cls: type) -> type:
    """Give the class every method of ``SAME`` and ``RENAMED``, and the tensor types."""

    def method(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(self.torch_musa, name)(*args, **kwargs)

    for name in SAME:
        setattr(cls, name, method(name))
    for name, target in RENAMED.items():
        setattr(cls, name, method(target))
    for name, dtype in TENSORS.items():
        setattr(cls, name, functools.partial(torch.tensor, dtype=dtype, device="musa"))
    return abc.update_abstractmethods(cls)


@_forward_to_torch_musa
class MusaAccelerator(DeepSpeedAccelerator):
    """MUSA for DeepSpeed: ``deepspeed.accelerator.set_accelerator(MusaAccelerator())``.

    DeepSpeed's own compiled kernels are those of the CPU (Adam for offloaded states); on the device torch's are used.
    """

    def __init__(self):
        super().__init__()
        self._name, self._communication_backend_name, self._compile_backend = "musa", "mccl", "inductor"
        self.torch_musa = devices.backend("musa")
        self.host = CPU_Accelerator()

    # -- the device -------------------------------------------------------------------------------------------

    def device_name(self, device_index: int | None = None) -> str:
        return "musa" if device_index is None else f"musa:{device_index}"

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == "musa"

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    def visible_devices_envs(self) -> list[str]:
        return ["MUSA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: Sequence[int]) -> None:
        current_env["MUSA_VISIBLE_DEVICES"] = ",".join(map(str, local_accelerator_ids))

    def export_envs(self) -> list[str]:
        return ["MUSA", "MCCL", "LD_LIBRARY", "PATH"]

    # -- kernels run beside the host --------------------------------------------------------------------------

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return False

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    @property
    def Stream(self) -> type:
        return self.torch_musa.Stream

    @property
    def Event(self) -> type:
        return self.torch_musa.Event

    # -- memory, types, random numbers ------------------------------------------------------------------------

    def total_memory(self, device_index: int | None = None) -> int:
        index = self.current_device() if device_index is None else device_index
        return self.torch_musa.get_device_properties(index).total_memory

    def available_memory(self, device_index: int | None = None) -> int:
        return self.total_memory(device_index) - self.memory_allocated(device_index)

    def is_bf16_supported(self) -> bool:
        return devices.supports_bf16(torch.device("musa"))

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, *([torch.bfloat16] if self.is_bf16_supported() else [])]

    def random(self) -> Any:
        return torch.random

    def default_generator(self, device_index: int) -> torch.Generator:
        return self.torch_musa.default_generators[device_index]

    # -- what there is not: profiler ranges, triton, graphs ---------------------------------------------------

    def range_push(self, msg: str, domain: Any = None, category: Any = None) -> None:
        return None

    def range_pop(self, domain: Any = None) -> None:
        return None

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def is_triton_supported(self) -> bool:
        return False

    def create_graph(self) -> None:
        return None

    def capture_to_graph(
        self, graph: Any, pool: Any = None, stream: Any = None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def replay_graph(self, graph: Any) -> None:
        return None

    def get_compile_backend(self) -> str:
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        self._compile_backend = backend

    # -- compiled parts of DeepSpeed --------------------------------------------------------------------------

    def op_builder_dir(self) -> str:
        return self.host.op_builder_dir()

    def create_op_builder(self, class_name: str) -> Any:
        return self.host.create_op_builder(class_name)

    def get_op_builder(self, class_name: str) -> Any:
        return self.host.get_op_builder(class_name)

    def build_extension(self) -> Any:
        return self.host.build_extension()
