"""What a run will need, before anything is started: memory of a GPU, updates, hours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from funasr_mooer.mooer.flops import flops_of
from funasr_mooer.mooer.llm import DTYPES
from funasr_mooer.mooer.outline import Outline
from funasr_mooer.train.stages import StageConf

GIB = 2**30
LOGITS_HELD = 3  # logits, normalised logits, gradient
RUNTIME_GIB, FRAGMENTS = 1.0, 0.05  # of the driver and libraries; share of memory that an allocator cannot use


@dataclass(frozen=True)
class Data:
    """What an epoch holds.

    Attributes:
        hours: of audio.
        frames: of features.
        positions: that the LLM reads, without padding.
        labels: tokens of the answers.
        batches: over all processes.
    """

    hours: float
    frames: float
    positions: float
    labels: float
    batches: int


@dataclass(frozen=True)
class Sharing:
    """How processes share a model.

    Attributes:
        gpus: processes.
        stage: 0 nothing is split; 1 optimiser states; 2 gradients too; 3 (and FSDP2) weights too.
        half: DeepSpeed's bfloat16: all weights are cast to it, and the optimiser keeps those that are trained in float32.
    """

    gpus: int = 1
    stage: int = 0
    half: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by what they are for."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """All of it, with what the runtime takes and what an allocator cannot use."""
        held = self.weights + self.gradients + self.optimiser + self.activations + self.logits
        return held * (1 + FRAGMENTS) + RUNTIME_GIB * GIB


def memory(model: Outline, stage: StageConf, sharing: Sharing, data: Data, budget: int, dtype: torch.dtype) -> Memory:
    """Peak memory of one GPU in a stage of training.

    Args:
        model: as the stage trains it.
        stage: its objective counts.
        sharing: of the model.
        data: for how much of a batch is labelled, and features per position.
        budget: positions of a batch.
        dtype: of the forward pass.
    """
    split = {level: sharing.gpus if sharing.stage >= level else 1 for level in (1, 2, 3)}
    params = [param for part in model.parts.values() for param in part]
    trained = sum(param.numel() for param in params if param.requires_grad)
    weights = sum(param.numel() * (2 if sharing.half else param.element_size()) for param in params)
    activations, notes = _activations(model, stage, data, budget, dtype)
    logits = 0.0
    if stage.objective != "adapter_ctc":
        logits = min(budget * data.labels / data.positions * model.llm.vocab_size, model.llm.max_logits)
    return Memory(
        weights=weights / split[3],
        gradients=trained * (2 if sharing.half else 4) / split[2],
        optimiser=trained * (12 if sharing.half else 8) / split[1],
        activations=activations,
        logits=logits * 4 * LOGITS_HELD,
        notes=notes,
    )


def _activations(
    model: Outline, stage: StageConf, data: Data, budget: int, dtype: torch.dtype
) -> tuple[float, list[str]]:
    """Bytes kept for the backward pass of one batch, and how they come about."""
    frames = budget * data.frames / data.positions
    kept, notes = 0.0, []
    if any(param.requires_grad for param in model.parts["encoder"]):
        each = model.encoder_bytes()
        kept += frames * each
        notes.append(f"encoder {each / 1e6:.2f} MB a frame")
    if stage.objective != "adapter_ctc":
        layer, count = model.layer_bytes(dtype), len(model.llm.layers)
        width = model.llm.hidden_size * dtype.itemsize
        each = count * width + layer if model.llm.gradient_checkpointing else count * layer
        kept += budget * each
        notes.append(
            f"{each / 1e6:.2f} MB a position" + (", layers recomputed" if model.llm.gradient_checkpointing else "")
        )
    return kept, notes


def updates(stage: StageConf, data: Data, gpus: int) -> int:
    """Updates of a whole stage."""
    per_epoch = -(-data.batches // (gpus * stage.accum))
    bounds = [stage.steps] if stage.steps else []
    return min([*bounds, *([stage.epochs * per_epoch] if stage.epochs else [])])


def hours(model: Outline, stage: StageConf, data: Data, gpus: int, flops_per_s: float) -> float:
    """Hours of a stage on GPUs that do ``flops_per_s`` each, what is recomputed included."""
    flops, batches = flops_of(model), updates(stage, data, gpus) * stage.accum * gpus
    audio = data.frames * model.encoder.frame_ms / model.adapter.granularity_ms
    if stage.objective == "adapter_ctc":
        work = flops.step(data.frames, audio, 0, 0)
    else:
        work = flops.step(data.frames, audio, data.positions, data.labels)
        work += flops.recomputed(data.positions) if model.llm.gradient_checkpointing else 0
    return work * batches / data.batches / (gpus * flops_per_s) / 3600


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of ``train_conf.dtype`` on a GPU."""
    return DTYPES["bfloat16"] if name == "auto" else DTYPES[name]
