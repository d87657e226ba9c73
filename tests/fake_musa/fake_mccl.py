"""A torch.distributed backend ``mccl`` for simulated MUSA devices: copies to CPU tensors and lets gloo do the work."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

# What torch.distributed calls, and what gloo calls it.
COLLECTIVES = """allreduce allreduce_coalesced broadcast reduce allgather _allgather_base allgather_coalesced
    reduce_scatter _reduce_scatter_base gather scatter alltoall alltoall_base barrier""".split()
RENAMED = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}


class Done(dist._Work):
    """The handle of a collective that has finished."""

    def __init__(self, result: Any):
        super().__init__()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future:
        return self.future


def through_gloo(name: str) -> Callable[..., Done]:
    """The collective ``name`` with every tensor replaced by a CPU copy, written back afterwards."""

    def collective(self: "Mccl", *args: Any, **options: Any) -> Done:
        copies = []

        def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
            copies.append((tensor, tensor.cpu()))
            return copies[-1][1]

        getattr(self.gloo, name)(*tree_map_only(torch.Tensor, on_cpu, args), **options).wait()
        for tensor, copy in copies:
            tensor.copy_(copy)
        return Done(args[0] if args else None)

    return collective


class Mccl(dist.ProcessGroup):
    """A process group of simulated devices."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "mccl"


for _name, _of_gloo in {**{name: name for name in COLLECTIVES}, **RENAMED}.items():
    setattr(Mccl, _name, through_gloo(_of_gloo))


def register() -> None:
    """Make ``init_process_group("mccl")`` possible."""
    dist.Backend.register_backend("mccl", Mccl, devices=["musa"])
