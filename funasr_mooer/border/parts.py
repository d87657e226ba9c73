"""Models made of named parts (encoder, adapter, lora, ...) that are trained, saved and loaded one by one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from funasr_mooer import weights
from funasr_mooer.config import suggest
from funasr_mooer.errors import CheckpointError, ConfigError


class Parts(nn.Module):
    """Base of our models. A part is an attribute that is a module (``encoder``, ``adapter``, ``ctc``),
    or ``lora`` / ``llm``: the low-rank and the base weights inside ``self.llm``.

    Attributes:
        config: the sections that the model was built from; with :meth:`config_for` it makes a model directory.
    """

    part_names: Sequence[str] = ()  # the parts that this class may have, in reading order
    decode_keys: Sequence[str] = ()  # the decoding settings that it takes
    own_sections: Sequence[str] = ()  # the sections that it reads besides those that every model has

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part that this model has."""
        found = {}
        for name in self.part_names:
            if name in ("lora", "llm"):
                decoder = getattr(self, "llm", None)
                params = (
                    []
                    if decoder is None
                    else decoder.lora_parameters()
                    if name == "lora"
                    else decoder.base_parameters()
                )
            else:
                module = getattr(self, name, None)
                params = [] if module is None else list(module.parameters())
            if params:
                found[name] = params
        return found

    def train_parts(self, names: Sequence[str]) -> None:
        """Train these parts and freeze the others: no gradients, and evaluation mode even after ``train()``.

        Raises:
            ConfigError: a name that is not a part of this model.
        """
        parts = self.parts
        for name in names:
            if name not in parts:
                raise ConfigError(f"cannot train part '{name}'{suggest(name, parts)}")
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in names)
        self.train(self.training)

    def compile_layers(self) -> None:
        """Compile what torch.compile makes faster.

        Raises:
            ConfigError: this kind of model has nothing of the kind.
        """
        raise ConfigError(f"train_conf.compile: not for {type(self).__name__}, which has no LLM; remove it")

    def train(self, mode: bool = True) -> Parts:
        super().train(mode)
        modules = {"llm" if name == "lora" else name for name in self.parts}
        for module in (getattr(self, name) for name in modules):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def save_parts(self, directory: str | Path, names: Sequence[str]) -> None:
        """Write each part into ``directory``: ``<part>.safetensors``, and ``lora/`` or ``llm/`` as their libraries do."""
        directory = Path(directory)
        for name in names:
            if name == "lora":
                self.llm.save_lora(directory / "lora")
            elif name == "llm":
                self.llm.save_base(directory / "llm")
            else:
                weights.save_tensors(getattr(self, name).state_dict(), directory / f"{name}.safetensors")

    def load_parts(self, directory: str | Path, names: Sequence[str]) -> None:
        """Read what :meth:`save_parts` wrote.

        Raises:
            CheckpointError: a part's file is absent, or its tensors are not exactly those of the model.
        """
        directory = Path(directory)
        for name in names:
            if name == "lora":
                self.llm.load_lora(directory / "lora")
            elif name == "llm":
                self.llm.load_base(directory / "llm")
            else:
                file = directory / f"{name}.safetensors"
                weights.load_strict(getattr(self, name), weights.read_tensors(file), file)

    def config_for(self, names: Sequence[str]) -> dict[str, Any]:
        """The model's config with the ``init`` of each part in ``names`` pointing into the model directory."""
        config = copy.deepcopy(self.config)
        for name in names:
            if name == "lora":
                config["llm_conf"]["lora"]["init"] = "lora"
            elif name == "llm":
                config["llm_conf"]["init"] = "llm"
                config["llm_conf"].pop("fingerprint", None)
            else:
                section = config.setdefault(f"{name}_conf", {})
                section["init"] = f"{name}.safetensors"
                section.pop("fingerprint", None)
        return config


def init_part(module: nn.Module, init: str | None, expected: str | None, section: str, prefix: str) -> str | None:
    """Load a part's weights from the file that its section names; returns the file's fingerprint.

    Args:
        module: the part.
        init: a weight file or a model directory that holds ``<prefix>.safetensors``; None leaves the part random.
        expected: fingerprint recorded when the model was trained, or None.
        section: for messages (``encoder_conf``).
        prefix: name of the part.

    Raises:
        CheckpointError: the file does not exist, is another one, or does not fit the part.
    """
    if init is None:
        return None
    path = Path(init)
    if path.is_dir():
        path = path / f"{prefix}.safetensors"
    if not path.exists():
        raise CheckpointError(f"{section}.init: {path} does not exist; give its path with ++{section}.init=FILE")
    weights.check_fingerprint(path, expected, f"{section}.fingerprint")
    tensors = strip_prefixes(weights.read_tensors(path), prefix)
    weights.load_strict(module, tensors, path)
    return weights.fingerprint(path)


def strip_prefixes(tensors: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Names as the part itself has them, out of any layout that is known for it.

    A checkpoint of a whole model is cut down to the part; what belongs to other parts is left out.
    """
    for prefix in PREFIXES.get(part, (f"{part}.",)):
        chosen = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if chosen:
            tensors = chosen
            break
    return {name.replace(".module_fn.", "."): tensor for name, tensor in tensors.items()}


# Longest first. "module_fn" is what the original's gradient checkpointing inserts into block names.
PREFIXES = {
    "encoder": ("encoder.model.", "encoder."),
    "adapter": ("encoder_projector.", "adapter."),
    "ctc": ("ctc.",),
}
