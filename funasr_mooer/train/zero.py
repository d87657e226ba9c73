"""DeepSpeed (ZeRO) behind the engine's interface, by FunASR's keys ``use_deepspeed`` and ``deepspeed_config``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funasr_mooer import device as devices
from funasr_mooer.errors import CheckpointError, ConfigError, DependencyError
from funasr_mooer.train.engine import Engine
from funasr_mooer.train.launch import free_port

TAG = "deepspeed"
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
        for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(key, str(value))
        os.environ.setdefault("MASTER_PORT", str(free_port()))
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
        self.config = config
        self.stage = config.get("zero_optimization", {}).get("stage", 0)

    def start(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Begin a stage with a new DeepSpeed engine around the model."""
        config = {**self.config, "gradient_clipping": clip}
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
        """Inside, trained parameters that ZeRO-3 has split are whole on every process."""
        if self.stage < 3:
            yield
            return
        with self.deepspeed.zero.GatheredParameters([p for p in self.module.parameters() if p.requires_grad]):
            yield

    def save_state(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Each process writes its share of the optimiser states into ``directory/deepspeed``."""
        self.model.save_checkpoint(
            str(directory), tag=TAG, client_state=dict(extra), save_latest=False, exclude_frozen_parameters=True
        )

    def load_state(self, directory: Path) -> dict[str, Any]:
        """Put back weights and optimiser states.

        Raises:
            CheckpointError: written with another number of processes, or damaged.
        """
        try:
            path, extra = self.model.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            text = str(error).splitlines()[0]
            raise CheckpointError(
                f"{directory / TAG}: cannot be resumed with {self.world} processes ({text})"
            ) from error
        if path is None:
            raise CheckpointError(f"{directory / TAG}: holds no DeepSpeed state")
        return extra


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
