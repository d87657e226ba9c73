"""Processes, devices and gradients: Hugging Face Accelerate on CPU, CUDA and MUSA, one process or many.

The loop sees one interface. A loss is scaled before its backward pass so that the sum over batches and processes
is the mean over all labelled tokens; since DDP and DeepSpeed average gradients over processes, the engine
multiplies by their number.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer import device as devices
from funasr_mooer import weights
from funasr_mooer.errors import CheckpointError
from funasr_mooer.train.stages import DTYPES, TrainConf

OPTIMIZER_FILE = "optimizer.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, each of the shape of its parameter
MASTER = "master"  # beside them, where the model itself has less precision than the optimiser


class Engine:
    """One process of a training run.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: where the model is.
        dtype: of the forward pass; parameters keep their own.
        splits_parameters: whether a process holds only a share of each parameter, so that all must make the same calls.
        module: the model itself.
        optimizer: of the current stage.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``musa``.
        dtype: None for bfloat16 where the device is good at it.
        find_unused_parameters: let DDP look for trained parameters without gradient in each batch.
    """

    splits_parameters = False

    def __init__(self, name: str = "auto", dtype: torch.dtype | None = None, find_unused_parameters: bool = False):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        device = devices.resolve(name)
        if device.index is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
        # Without cpu=True, processes on a CPU would each train alone, silently.
        self.accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[handler])
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.dtype = dtype or (torch.bfloat16 if devices.supports_bf16(self.device) else torch.float32)
        self.module: nn.Module | None = None
        self.model: nn.Module | None = None  # the module, wrapped for the processes
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def place(self, module: nn.Module, stored: Sequence[str] = ()) -> nn.Module:
        """Move the model to the device, before any optimiser sees its parameters; ``stored`` parts go to checkpoints."""
        self.module, self.stored = devices.place(module, self.device), stored
        return self.module

    def start(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Begin a stage: wrap the model for the parameters that now require gradients."""
        self.accelerator.free_memory()
        self.model = self.accelerator.prepare_model(self.module)
        self.optimizer, self.max_norm = optimizer, clip or float("inf")

    def micro_step(self, inputs: Mapping[str, Any], scale: Tensor, last: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Forward and backward of one batch; gradients meet between processes at the last of an update.

        Args:
            inputs: arguments of the model, tensors or not.
            scale: what this batch's mean loss counts in the loss of the update, 0-dim.
            last: whether it is the last batch of the update.

        Returns:
            the loss, the statistics and the weight, as the model returned them, detached.
        """
        with self.gradients_meet(last):
            with devices.autocast(self.device, self.dtype):
                loss, stats, weight = self.model(**self.move(inputs))
            (loss * scale * self.world).backward()
        return loss.detach(), stats, weight

    def gradients_meet(self, now: bool) -> contextlib.AbstractContextManager:
        """Inside, a backward pass adds up the gradients of all processes, or leaves that to a later one."""
        return contextlib.nullcontext() if now else self.accelerator.no_sync(self.model)

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients, 0-dim; those above the stage's ``clip`` are scaled down to it."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(params, self.max_norm)

    def step(self) -> None:
        """Change the weights and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def move(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors of a batch on the device."""
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, on every process."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process (any picklable object), on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for the other processes.

        Not torch's barrier: given a CPU and a machine with MUSA, it would ask gloo for MUSA.
        """
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, every process holds the parameters of the parts that are stored whole (here they always are)."""
        yield

    def save_state(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write what only resuming needs into ``directory``; called on every process.

        Whatever engine and however many processes wrote it, any other engine on any number can go on from it.
        """
        state = self.optimizer_state()
        if self.is_main:
            torch.save({"optimizer": state, **extra}, directory / OPTIMIZER_FILE)

    def load_state(self, directory: Path) -> dict[str, Any]:
        """Put back the optimiser; returns the ``extra`` of :meth:`save_state`.

        Raises:
            CheckpointError: the file is damaged or belongs to other parameters.
        """
        file = directory / OPTIMIZER_FILE
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            mine = [group["full_lr"] for group in self.optimizer.param_groups]
            self.set_optimizer_state(state.pop("optimizer"))
        except weights.DAMAGED as error:
            text = weights.first_line(error)
            raise CheckpointError(f"{file}: does not fit this run ({text}); were stages or parts changed?") from error
        for group, rate in zip(self.optimizer.param_groups, mine, strict=True):
            group["full_lr"] = rate  # a rate changed in the config counts from here on
        return state

    def optimizer_state(self) -> dict[str, Any]:
        """What torch's ``Optimizer.state_dict`` holds, with whole tensors; complete on the first process at least."""
        return self.optimizer.state_dict()

    def set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over an :meth:`optimizer_state`.

        Raises:
            ValueError: it belongs to other parameters.
        """
        groups = [group["params"] for group in self.optimizer.param_groups]
        check_fits(state, [[param.shape for param in group] for group in groups])
        for number, param in enumerate(itertools.chain(*groups)):
            own = state["state"].get(number, {})
            if MASTER in own:  # the parameter itself in float32: ZeRO trained in bfloat16
                param.data.copy_(own.pop(MASTER))
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Leave the process group.

        DDP's reducer goes first. If it went last it would take gloo's threads with it while it holds the interpreter,
        for which one of them may still be waiting: a run that has finished would never end.
        """
        self.model = None
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def check_fits(state: Mapping[str, Any], shapes: Sequence[Sequence[torch.Size]]) -> None:
    """Whether a saved state belongs to parameters of these shapes, group by group; torch itself looks at numbers only.

    Raises:
        ValueError: it does not.
    """
    saved = [len(group["params"]) for group in state["param_groups"]]
    if saved != [len(group) for group in shapes]:
        raise ValueError(f"groups of {saved} parameters were saved, {[len(group) for group in shapes]} are trained")
    for number, shape in enumerate(itertools.chain(*shapes)):
        moment = state["state"].get(number, {}).get(MOMENTS[0])
        if moment is not None and moment.shape != shape:
            raise ValueError(f"parameter {number} has the shape {tuple(shape)}, the saved one {tuple(moment.shape)}")


def build_engine(device: str, conf: TrainConf) -> Engine:
    """The engine that a config asks for: plain or DDP, DeepSpeed, or FSDP2."""
    dtype = DTYPES[conf.dtype]
    if conf.use_deepspeed:
        from funasr_mooer.train.zero import ZeroEngine

        return ZeroEngine(device, dtype, conf.deepspeed_config)
    if conf.use_fsdp:
        from funasr_mooer.train.fsdp import FsdpEngine

        return FsdpEngine(device, dtype)
    return Engine(device, dtype, conf.find_unused_parameters)
