"""FSDP2 behind the engine's interface, by ``train_conf.use_fsdp``: each process holds a share of every parameter.

Accelerate 1.15 takes FSDP for accelerators only, so torch's ``fully_shard`` is called here, which runs on a CPU with
gloo too. The unit that is put together for a computation, and given up after it, is a block: an element of a
``ModuleList``, such as a layer of the LLM. What lies outside of blocks (embeddings, adapter) stays together
during a step.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from funasr_mooer import device as devices
from funasr_mooer.train.engine import Engine, check_fits
from funasr_mooer.train.launch import launch_alone


class FsdpEngine(Engine):
    """An :class:`Engine` that splits parameters, gradients and optimiser states with FSDP2.

    Args:
        name: device.
        dtype: of the forward pass, by autocast; shares keep the dtype of their parameters.
    """

    splits_parameters = True

    def __init__(self, name: str, dtype: torch.dtype | None):
        launch_alone()
        super().__init__(name, dtype)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(devices.collective_backend(self.device))
        self.mesh = init_device_mesh(self.device.type, (self.world,))

    def start(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Begin a stage; the first one splits the model, and puts the shares into the optimiser."""
        if isinstance(self.module, FSDPModule):
            self._pass_on_requires_grad()
        else:
            names = {id(param): name for name, param in self.module.named_parameters()}
            self._split()
            shares = dict(self.module.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [shares[names[id(param)]] for param in group["params"]]
        self.model, self.optimizer, self.max_norm = self.module, optimizer, clip or float("inf")

    def gradients_meet(self, now: bool) -> contextlib.AbstractContextManager:
        """See :meth:`Engine.gradients_meet`."""
        self.module.set_requires_gradient_sync(now)
        return contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """See :meth:`Engine.gradient_norm`."""
        norm = super().gradient_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, whole tensors stand in for the shares of the stored parts; one after the other is gathered."""
        for module in self._split_modules():
            module.reshard()  # the root stays together after a validation
        parts = self.module.parts
        stored = {id(param) for name in self.stored for param in parts[name]}
        shares = [
            (module, name, param)
            for module in self.module.modules()
            for name, param in module.named_parameters(recurse=False)
            if id(param) in stored
        ]
        for module, name, param in shares:
            module._parameters[name] = nn.Parameter(param.detach().full_tensor(), requires_grad=False)
        try:
            yield
        finally:
            for module, name, param in shares:
                module._parameters[name] = param

    def optimizer_state(self) -> dict[str, Any]:
        """See :meth:`Engine.optimizer_state`."""
        state = self.optimizer.state_dict()
        whole = {number: {key: _whole(value) for key, value in own.items()} for number, own in state["state"].items()}
        return {**state, "state": whole}

    def set_optimizer_state(self, state: dict[str, Any]) -> None:
        """See :meth:`Engine.set_optimizer_state`; every process takes its shares."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        check_fits(state, [[param.shape for param in group] for group in groups])
        for number, param in enumerate(itertools.chain(*groups)):
            own = state["state"].get(number, {})
            for key in {*own} - {"step"}:
                own[key] = distribute_tensor(own[key].to(self.device), self.mesh, param.placements)
        super().set_optimizer_state(state)

    def _split(self) -> None:
        """Wrap each block, then the model around them."""
        for block in blocks(self.module):
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.module, mesh=self.mesh)
        if hasattr(self.module, "decode"):
            register_fsdp_forward_method(self.module, "decode")

    def _pass_on_requires_grad(self) -> None:
        """Which parameters are trained was said to the shares; FSDP2 asks the whole tensors that it made of them."""
        trained = {name: param.requires_grad for name, param in self.module.named_parameters()}
        names = {id(module): name for name, module in self.module.named_modules()}
        for module in self._split_modules():
            prefix = names[id(module)]
            module.unshard()
            for name, param in module.named_parameters(prefix=prefix):
                param.requires_grad_(trained[name])
            module.reshard()

    def _split_modules(self) -> list[FSDPModule]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of the outermost ModuleLists: layers, by any name."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from blocks(child)


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
