"""What is trained, in which order and how: the sections train_conf, optim_conf and scheduler_conf of a config."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from funasr_mooer.config import check_least, section, suggest
from funasr_mooer.errors import ConfigError
from funasr_mooer.train.schedule import ScheduleConf

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
METRICS = ("cer", "wer", "mer", "bleu")  # of a decoded sample
FLAT_KEYS = ("train", "objective")  # keys of the one-stage form that the stages replace


@dataclass(frozen=True)
class OptimConf:
    """AdamW.

    Attributes:
        lr: one rate for everything, or a mapping with a rate for each trained part (``{adapter: 3e-3, lora: 2e-3}``).
        weight_decay: for matrices; biases and norms never decay.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        lora_plus: how many times faster than A the matrices B of LoRA learn; LoRA+ (arXiv 2402.12354) proposes 16.
    """

    lr: Any = 1e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    lora_plus: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas={self.betas}: give two numbers, such as [0.9, 0.999]")

    def lr_of(self, part: str) -> float:
        """The full learning rate of one part.

        Raises:
            ConfigError: the mapping has no such part, or the rate is not a number from 0 on.
        """
        value = self.lr
        if isinstance(value, Mapping):
            if part not in value:
                raise ConfigError(f"optim.lr: no rate for part '{part}', which is trained{suggest(part, value)}")
            value = value[part]
        try:
            rate = float(value)
        except (TypeError, ValueError):
            rate = math.nan
        if not 0 <= rate < math.inf:
            raise ConfigError(f"optim.lr: expected a number from 0 on for part '{part}', found {value!r}")
        return rate


@dataclass(frozen=True)
class StageConf:
    """One stage of training, from fresh optimiser states, beginning with a new epoch.

    Attributes:
        name: for logs.
        train: parts that are trained; None trains what the model itself leaves trainable.
        objective: what the model optimises (``llm``, ``adapter_ctc``, ...); None keeps the model's own.
        steps: updates in this stage; with ``epochs`` too, whichever ends first.
        epochs: passes over the data in this stage.
        optim: AdamW settings.
        schedule: learning rate shape.
        accum: batches per process and update.
        clip: largest gradient norm; 0 does not clip.
    """

    name: str = "train"
    train: list[str] | None = None
    objective: str | None = None
    steps: int | None = None
    epochs: int | None = None
    optim: OptimConf = field(default_factory=OptimConf)
    schedule: ScheduleConf = field(default_factory=ScheduleConf)
    accum: int = 1
    clip: float = 0.0

    def __post_init__(self) -> None:
        if min((n for n in (self.steps, self.epochs) if n is not None), default=0) < 1:
            raise ConfigError(f"stage '{self.name}': give steps or epochs, more than 0")
        if self.accum < 1:
            raise ConfigError(f"stage '{self.name}': accum={self.accum} must be at least 1")
        if self.clip < 0:
            raise ConfigError(f"stage '{self.name}': clip={self.clip} must be at least 0, which does not clip")


@dataclass(frozen=True)
class TrainConf:
    """The section ``train_conf``; keys that FunASR has mean what they mean there.

    Attributes:
        stages: list of :class:`StageConf` mappings, run in order; empty for the one-stage form.
        max_epoch: passes over the data in the one-stage form.
        max_steps: updates in the one-stage form; None for no limit but ``max_epoch``.
        train: parts trained in the one-stage form.
        objective: objective of the one-stage form.
        accum_grad: batches per process and update, where a stage does not say.
        grad_clip: largest gradient norm, where a stage does not say; 0 does not clip.
        dtype: ``auto`` (bfloat16 where the device is good at it), ``float32`` or ``bfloat16``.
        seed: of everything random: weights, order of the data, dropout.
        log_interval: updates between two lines.
        validate_interval: updates between two validations; 0 validates at the end of each stage only.
        save_checkpoint_interval: updates between two checkpoints; None for ``validate_interval``.
        keep_nbest_models: checkpoints kept, best first; the last two are kept besides.
        avg_nbest_model: the final model is the mean of that many best checkpoints; 1 for the best itself.
        best_metric: ``auto`` (the error rate if validation decodes, else the loss) or the name of a validation metric.
        validate_batches: batches of the dev set per process and validation; None for all.
        decode_utts: dev utterances that each validation decodes and scores, for each task; 0 for none.
        decode_task: task with which they are decoded.
        decode_metric: how they are scored: ``cer``, ``wer``, ``mer`` (characters of Chinese, words of English) or ``bleu``;
            a list of them; or for several tasks a mapping, such as ``{asr: [cer, wer], ast: bleu}``.
        ema: decay of an exponential moving average of the trained weights; 0 for none.
        find_unused_parameters: for models that leave trained parameters out of some batches.
        tensorboard: write EXP/tensorboard if tensorboard is installed.
        wandb: tell Weights & Biases, too.
        peak_tflops: what the device can do in the dtype of the training, for MFU; None for the data sheet's, if it is known.
        compile: compile the layers of the LLM with torch.compile.
        use_deepspeed: train with DeepSpeed.
        deepspeed_config: its JSON file; an error without ``use_deepspeed``.
        use_fsdp: train with FSDP2, which splits parameters, gradients and optimiser states over the processes.
    """

    stages: list[dict] = field(default_factory=list)
    max_epoch: int = 1
    max_steps: int | None = None
    train: list[str] | None = None
    objective: str | None = None
    accum_grad: int = 1
    grad_clip: float = 0.0
    dtype: str = "auto"
    seed: int = 42
    log_interval: int = 100
    validate_interval: int = 1000
    save_checkpoint_interval: int | None = None
    keep_nbest_models: int = 5
    avg_nbest_model: int = 1
    best_metric: str = "auto"
    validate_batches: int | None = None
    decode_utts: int = 0
    decode_task: str = "asr"
    decode_metric: Any = "cer"
    ema: float = 0.0
    find_unused_parameters: bool = False
    tensorboard: bool = True
    wandb: bool = False
    peak_tflops: float | None = None
    compile: bool = False
    use_deepspeed: bool = False
    deepspeed_config: str | None = None
    use_fsdp: bool = False

    def __post_init__(self) -> None:
        if self.use_deepspeed and self.use_fsdp:
            raise ConfigError("train_conf: use_deepspeed and use_fsdp are two ways to split a model; choose one")
        if self.deepspeed_config is not None and not self.use_deepspeed:
            raise ConfigError(
                f"train_conf.deepspeed_config: {self.deepspeed_config} is not read without DeepSpeed; "
                "set train_conf.use_deepspeed: true, or remove it"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"train_conf.dtype: '{self.dtype}' is not known{suggest(self.dtype, DTYPES)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train_conf.ema={self.ema} must be in [0, 1); 0.999 is usual, 0 is off")
        for name in (name for names in self.decoding.values() for name in names):
            if name not in METRICS:
                raise ConfigError(f"train_conf.decode_metric: '{name}' is not known{suggest(name, METRICS)}")
        check_least(self, "train_conf", seed=0, log_interval=1, keep_nbest_models=1, avg_nbest_model=1)
        measured = [name for name, _, _ in metric_names(self.decoding)] if self.decode_utts else []
        if self.best_metric in METRICS and self.best_metric not in measured:
            raise ConfigError(
                f"train_conf.best_metric: '{self.best_metric}' is not measured; set train_conf.decode_utts and decode_metric"
            )
        if self.stages:
            flat = {f.name: f.default for f in fields(self) if f.name in FLAT_KEYS}
            given = [name for name, default in flat.items() if getattr(self, name) != default]
            if given:
                raise ConfigError(f"train_conf.{given[0]}: belongs to the one-stage form; write it inside each stage")

    @property
    def ranking(self) -> str:
        """The validation metric that tells which checkpoint is best."""
        if self.best_metric != "auto":
            return self.best_metric
        return metric_names(self.decoding)[0][0] if self.decode_utts else "loss"

    @property
    def decoding(self) -> dict[str, list[str]]:
        """Task -> metrics of the sample that validation decodes."""
        given = self.decode_metric
        tasks = dict(given) if isinstance(given, Mapping) else {self.decode_task: given}
        return {task: [metrics] if isinstance(metrics, str) else list(metrics) for task, metrics in tasks.items()}

    @property
    def save_interval(self) -> int:
        """Updates between two checkpoints; 0 for the end of each stage only."""
        interval = self.save_checkpoint_interval
        return self.validate_interval if interval is None else interval


def metric_names(decoding: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """(name, task, metric) for each figure of a decoded sample; the task is named where the metric alone would not do."""
    pairs = [(task, metric) for task, metrics in decoding.items() for metric in metrics]
    counts = Counter(metric for _, metric in pairs)
    return [(metric if counts[metric] == 1 else f"{task}_{metric}", task, metric) for task, metric in pairs]


def read_stages(config: Mapping[str, Any]) -> tuple[TrainConf, list[StageConf]]:
    """The typed training sections of a whole config.

    ``optim_conf`` and ``scheduler_conf`` (whose ``type`` may stand in FunASR's top-level key ``scheduler``) are
    the defaults of every stage.

    Raises:
        ConfigError: an unknown key or a value that cannot work, with its place.
    """
    conf = section(TrainConf, config.get("train_conf"), "train_conf")
    if str(config.get("optim", "adamw")).lower() != "adamw":
        raise ConfigError(f"optim: '{config['optim']}' is not supported; use adamw")
    optim = dict(config.get("optim_conf") or {})
    schedule = dict(config.get("scheduler_conf") or {})
    if "scheduler" in config:
        schedule.setdefault("type", config["scheduler"])
    flat = {"train": conf.train, "objective": conf.objective, "epochs": conf.max_epoch, "steps": conf.max_steps}
    stages = []
    for number, values in enumerate(conf.stages or [flat]):
        name = f"train_conf.stages[{number}]" if conf.stages else "train_conf"
        defaults = {"name": f"stage{number}" if conf.stages else "train"}
        defaults |= {"accum": conf.accum_grad, "clip": conf.grad_clip}
        values = {**defaults, **values}
        for key, default in (("optim", optim), ("schedule", schedule)):
            if isinstance(values.get(key, {}), Mapping):
                values[key] = {**default, **values.get(key, {})}
        stages.append(section(StageConf, values, name))
    return conf, stages


def trained_parts(model: nn.Module, stages: list[StageConf]) -> list[str]:
    """Parts that any stage trains, in the model's order: what a checkpoint must hold."""
    named = {part for stage in stages for part in stage.train or trainable_parts(model)}
    unknown = sorted(named - set(model.parts))
    if unknown:
        raise ConfigError(f"train_conf: the model has no part '{unknown[0]}'{suggest(unknown[0], model.parts)}")
    return [part for part in model.parts if part in named]


def trainable_parts(model: nn.Module) -> list[str]:
    """Parts that the model as built leaves trainable."""
    return [part for part, params in model.parts.items() if any(param.requires_grad for param in params)]


def build_optimizer(model: nn.Module, parts: list[str], optim: OptimConf) -> torch.optim.AdamW:
    """AdamW with groups per part (matrices, LoRA's B, what does not decay); ``group["full_lr"]`` holds each full rate."""
    groups, seen = [], set()
    faster = {id(p) for name, p in model.named_parameters() if ".lora_B." in name} if optim.lora_plus != 1 else set()
    for part in parts:
        params = [p for p in model.parts[part] if p.requires_grad and id(p) not in seen]
        seen.update(map(id, params))
        for decays, is_faster in ((True, False), (True, True), (False, False)):
            chosen = [p for p in params if _is_matrix(p) == decays and (id(p) in faster) == is_faster]
            if chosen:
                lr = optim.lr_of(part) * (optim.lora_plus if is_faster else 1)
                decay = optim.weight_decay if decays else 0.0
                name = f"{part}_B" if is_faster else part
                groups.append({"params": chosen, "part": name, "lr": lr, "full_lr": lr, "weight_decay": decay})
    if not groups:
        raise ConfigError(
            f"train_conf: nothing to train among the parts {', '.join(model.parts)}; name some in 'train'"
        )
    return torch.optim.AdamW(groups, betas=tuple(optim.betas), eps=optim.eps)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter has rows and columns; one that ZeRO-3 has split since an earlier stage is flat and empty."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1
