"""How much arithmetic a training step of MooER is: from the sizes of its weights, for MFU and forecasts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from funasr_mooer.border.parts import Parts


@dataclass(frozen=True)
class Flops:
    """Floating point operations of forward and backward: 2 per weight and position, for each pass that needs it.

    A frozen weight costs a second pass where gradients flow through it, a trained one a third. What attention does
    between positions is left out: under 1 % at the lengths of utterances.

    Attributes:
        sizes: weights of ``encoder``, ``adapter``, ``layers`` and ``head`` of the LLM, and ``lora``.
        trained: the parts that are trained.
    """

    sizes: Mapping[str, int]
    trained: Collection[str]

    def step(self, frames: float, audio: float, positions: float, labels: float) -> float:
        """Operations of one forward and backward pass.

        Args:
            frames: that the encoder makes.
            audio: embeddings that the adapter makes.
            positions: that the LLM reads, audio included.
            labels: positions whose logits are computed.
        """
        read = {"encoder": frames, "adapter": audio, "layers": positions, "lora": positions, "head": labels}
        return sum(2 * size * read[name] * self._passes(name) for name, size in self.sizes.items())

    def recomputed(self, positions: float) -> float:
        """What gradient checkpointing of the LLM adds: its layers once more."""
        return 2 * (self.sizes["layers"] + self.sizes["lora"]) * positions

    def _passes(self, name: str) -> int:
        part = "llm" if name in ("layers", "head") else name
        below = {"encoder": ["encoder"], "adapter": ["encoder", "adapter"]}.get(
            name, ["encoder", "adapter", "lora", "llm"]
        )
        flows = any(other in self.trained for other in below)
        return 1 + flows + (part in self.trained)


def flops_of(model: nn.Module) -> Flops | None:
    """Of a model as it is trained now; None for one without an LLM."""
    if not isinstance(model, Parts) or not {"adapter", "llm"} <= model.parts.keys():
        return None
    parts = model.parts
    embedding, head = model.llm.embedding, model.llm.model.get_output_embeddings()
    tied = embedding.weight is head.weight
    sizes = {name: size(parts.get(name, ())) for name in ("encoder", "adapter", "lora")}
    sizes["head"] = size([head.weight])
    sizes["layers"] = size(parts["llm"]) - size([embedding.weight]) - (0 if tied else sizes["head"])
    trained = [name for name, params in parts.items() if any(param.requires_grad for param in params)]
    return Flops(sizes, trained)


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Weights in all; where ZeRO-3 has split a parameter, the whole of it counts."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
