"""DeepSpeed (ZeRO) behind the engine's interface, by FunASR's keys ``use_deepspeed`` and ``deepspeed_config``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer import device as devices
from funasr_mooer.errors import ConfigError, DependencyError
from funasr_mooer.train.engine import MASTER, MOMENTS, Engine, check_fits
from funasr_mooer.train.launch import launch_alone

OURS = ("optimizer", "scheduler", "gradient_clipping", "train_batch_size", "gradient_accumulation_steps")


class ZeroEngine(Engine):
    """An :class:`Engine` that shards optimiser states, gradients (ZeRO-2) and parameters (ZeRO-3) with DeepSpeed.

    Optimiser, learning rate, clipping and accumulation come from our stages, so such keys in the JSON file are
    left out (and named in ``ignored``); its ``zero_optimization``, ``bf16`` and communication keys count.

    Args:
        name: device.
        dtype: of train_conf; None takes what the JSON file's ``bf16`` says.
        config_file: DeepSpeed's JSON file.
    """

    def __init__(self, name: str, dtype: torch.dtype | None, config_file: str | None):
        if config_file is None or not Path(config_file).is_file():
            raise ConfigError(f"train_conf.deepspeed_config: {config_file} is not a file; give DeepSpeed's JSON file")
        try:
            config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{config_file}: is not JSON ({error})") from error
        device = devices.resolve(name)
        self.deepspeed = _import_deepspeed(device)
        launch_alone()
        super().__init__(name, dtype)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(devices.collective_backend(self.device))
        self.ignored = [key for key in OURS if key in config]
        half = config.get("bf16", {}).get("enabled", False)
        half = (self.dtype == torch.bfloat16) if half == "auto" or (dtype and "bf16" not in config) else half
        self.dtype = torch.bfloat16 if half else torch.float32
        config = {key: value for key, value in config.items() if key not in OURS}
        config |= {"bf16": {**config.get("bf16", {}), "enabled": bool(half)}, "steps_per_print": 10**9}
        config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded states too are stepped by our AdamW
        self.config = config
        self.splits_parameters = config.get("zero_optimization", {}).get("stage", 0) == 3

    def start(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Begin a stage with a new DeepSpeed engine around the model."""
        config = {**self.config, "gradient_clipping": clip}
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.blank = optimizer.state_dict()  # DeepSpeed puts flat shares in their place
        self.model, self.optimizer, _, _ = self.deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.max_norm = clip

    def micro_step(self, inputs: Mapping[str, Any], scale: Tensor, last: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
        """See :meth:`Engine.micro_step`; DeepSpeed casts the weights, we the features."""
        self.model.set_gradient_accumulation_boundary(last)
        inputs = self.move(inputs)
        with devices.autocast(self.device, self.dtype):
            loss, stats, weight = self.model(**inputs)
        self.model.backward(loss * scale * self.world, scale_wrt_gas=False)
        return loss.detach(), stats, weight

    def gradient_norm(self) -> Tensor:
        """Norm of the last update's gradients: DeepSpeed computes (and clips) inside its step."""
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else float(norm), device=self.device)

    def step(self) -> None:
        """Change the weights and forget the gradients."""
        self.model.step()

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, stored parameters that ZeRO-3 has split are whole on every process."""
        if not self.splits_parameters:
            yield
            return
        parts = self.module.parts
        with self.deepspeed.zero.GatheredParameters([param for name in self.stored for param in parts[name]]):
            yield

    # -- the optimiser's state, whole: so that another number of processes, or another engine, can go on ----------

    def optimizer_state(self) -> dict[str, Any]:
        """See :meth:`Engine.optimizer_state`; one parameter after the other is put together from its shares."""
        if not self._has_shares():
            return super().optimizer_state()
        step = next(state["step"] for state in self._inner().state.values() if "step" in state)
        self._link_moments()
        states = {}
        for number, param in enumerate(self.params):
            whole = {key: self.deepspeed.utils.safe_get_full_optimizer_state(param, key) for key in MOMENTS}
            if self.dtype != torch.float32:
                whole[MASTER] = self.deepspeed.utils.safe_get_full_fp32_param(param)
            if self.is_main:
                states[number] = {"step": torch.tensor(float(step)), **{k: v.cpu() for k, v in whole.items()}}
        return {**self.blank, "state": states}

    def set_optimizer_state(self, state: dict[str, Any]) -> None:
        """See :meth:`Engine.set_optimizer_state`; every process takes its shares."""
        if not self._has_shares():
            super().set_optimizer_state(state)
            return
        shapes = iter([getattr(param, "ds_shape", param.shape) for param in self.params])
        check_fits(state, [[next(shapes) for _ in group["params"]] for group in self.blank["param_groups"]])
        step = max((own["step"] for own in state["state"].values()), default=torch.tensor(0.0))
        for flat in self._flat_shares():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner().state[flat] = {"step": step.clone(), **zeros}
        self._link_moments()
        for number, param in enumerate(self.params):
            for key, whole in state["state"].get(number, {}).items():
                if key != "step":
                    self._set(param, key, whole.to(self.device))

    def _set(self, param: nn.Parameter, key: str, whole: Tensor) -> None:
        """Hand a process its share of one moment, or of the float32 weights."""
        utils = self.deepspeed.utils
        if self.splits_parameters:  # DeepSpeed's own way to cut would stumble over the padding of the last share
            size = param.partition_numel()
            whole = nn.functional.pad(whole.flatten(), (0, size * self.world - whole.numel()))
            whole = whole.narrow(0, size * self.rank, size)
            to_moment, to_weights = utils.safe_set_local_optimizer_state, utils.safe_set_local_fp32_param
        else:
            to_moment, to_weights = utils.safe_set_full_optimizer_state, utils.safe_set_full_fp32_param
        if key == MASTER:
            to_weights(param, whole)
        else:
            to_moment(param, whole, key)

    def _has_shares(self) -> bool:
        """Whether DeepSpeed keeps the states in flat shares: ZeRO-0 in float32 does not."""
        return self.splits_parameters or hasattr(self.params[0], "_hp_mapping")

    def _inner(self) -> torch.optim.Optimizer:
        """torch's optimiser of the flat shares."""
        return self.optimizer.optimizer

    def _flat_shares(self) -> list[Tensor]:
        """The tensors that torch's optimiser steps; ZeRO-3 hands them to it only while it does."""
        if self.splits_parameters:
            return self.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self._inner().param_groups for flat in group["params"]]

    def _link_moments(self) -> None:
        """Tell ZeRO-1 and 2 where in the flat shares each parameter's moments are.

        They do so themselves in the first step, but only for groups that were stepped by then.
        """
        if self.splits_parameters:
            return
        zero = self.optimizer
        members_of = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
        for members, group in zip(members_of, self._inner().param_groups, strict=True):
            self.deepspeed.utils.lazy_init_hp_params_optimizer_state(members, group["params"][0], self._inner().state)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for ``device``, without the compilation that its CPU communication would start.

    On MUSA its first choice while it is imported is the CPU, and ours follows; a vendor's build that knows MUSA is left
    alone (``DS_ACCELERATOR=musa``).
    """
    if device.type in ("cpu", "musa"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise DependencyError(f"use_deepspeed needs deepspeed ({error}): pip install funasr-mooer[train]") from error
    if device.type in ("cpu", "musa"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "musa" and deepspeed.accelerator.get_accelerator()._name != "musa":
        from funasr_mooer.train.musa_accelerator import MusaAccelerator

        deepspeed.accelerator.set_accelerator(MusaAccelerator())
    return deepspeed
