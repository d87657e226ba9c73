"""Where FunASR's flat config becomes typed sections and built parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from funasr_mooer import device as devices
from funasr_mooer import register
from funasr_mooer.border.parts import Parts, init_part
from funasr_mooer.config import construct, suggest
from funasr_mooer.errors import ConfigError
from funasr_mooer.model_dir import PLUGIN, read_model_dir
from funasr_mooer.modules.ctc import CTCHead

# The sections that describe a system; a model directory keeps them. FunASR adds dozens of keys of its own.
SECTIONS = (
    *("model", "model_conf", "frontend", "frontend_conf", "tokenizer", "tokenizer_conf"),
    *("encoder", "encoder_conf", "adapter", "adapter_conf", "llm", "llm_conf"),
    *("ctc_conf", "decoder", "decoder_conf"),
    *("prompt_conf", "decode_conf", "endpoint_conf", "dataset", "dataset_conf", "train_conf", "optim", "optim_conf"),
    *("scheduler", "scheduler_conf"),
)
# Of these, the ones that some models read and others do not; see Parts.own_sections.
OF_SOME_MODELS = (
    *("adapter", "adapter_conf", "llm", "llm_conf", "prompt_conf", "ctc_conf", "decoder", "decoder_conf"),
    *("decode_conf", "endpoint_conf"),
)


def build_model(config: Mapping[str, Any]) -> Parts:
    """Build the model that a config describes, on the CPU, in evaluation mode.

    Raises:
        ConfigError: an unknown class, key or value.
        CheckpointError: weights that the config names are missing or do not fit.
    """
    for key in config:
        if key not in (*SECTIONS, *PLUGIN):
            raise ConfigError(f"{key}: is no section of a config{suggest(key, SECTIONS)}")
    cls = registered("model_classes", config, "model")
    if not issubclass(cls, Parts):
        raise ConfigError(f"model: '{config['model']}' is FunASR's own; load it with funasr.AutoModel")
    return cls(**config).eval()


def load_model(directory: str | Path, device: str = "auto", overrides: Sequence[str] = ()) -> Parts:
    """The model of a model directory, on a device (``auto``, ``cpu``, ``cuda``, ``musa``), in evaluation mode."""
    return devices.place(build_model(read_model_dir(directory, overrides)), devices.resolve(device))


def sections(config: Mapping[str, Any], model: Parts) -> dict[str, Any]:
    """Our sections of FunASR's config, with the built tokenizer and frontend written as their names again.

    Raises:
        ConfigError: a section that is no mapping, or that this model does not read.
    """
    for key in OF_SOME_MODELS:
        if config.get(key) is not None and key not in model.own_sections:
            raise ConfigError(
                f"{key}: {config.get('model')} does not read it; remove it, or choose another 'model' "
                f"(besides what all read, this one reads {', '.join(model.own_sections) or 'no other'})"
            )
    found = {key: copy.deepcopy(config[key]) for key in SECTIONS if key in config and _is_plain(config[key])}
    for key, table in (("tokenizer", "tokenizer_classes"), ("frontend", "frontend_classes")):
        built = config.get(key)
        if built is not None and not isinstance(built, str):
            found[key] = register.name_of(table, type(built))
    for key, values in found.items():
        if key.endswith("_conf") and values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"{key}: expected a mapping of keys to values, found {values!r}")
        if isinstance(values, Mapping) and not isinstance(values.get("init"), (str, type(None))):
            raise ConfigError(f"{key}.init: expected a path, found {values['init']!r}; a number needs quotes")
    return found


def tokenizer(config: Mapping[str, Any], kind: str = "MooerTokenizer") -> Any:
    """The tokenizer that FunASR built, or the one that ``tokenizer_conf`` names; of the class registered as ``kind``."""
    cls, built = register.find("tokenizer_classes", kind), config.get("tokenizer")
    if isinstance(built, cls):
        return built
    if built not in (None, kind):
        raise ConfigError(f"tokenizer: {built}; this model needs tokenizer: {kind}")
    return construct(cls, config.get("tokenizer_conf"), "tokenizer_conf")


def registered(table: str, config: Mapping[str, Any], key: str) -> type:
    """The class that a config names under ``key``, out of one of FunASR's tables.

    Raises:
        ConfigError: nothing is named, or nothing of that name is registered.
    """
    name = str(config.get(key))
    cls = register.find(table, name)
    if cls is None:
        ours = [known for of, known in register.CLASSES if of == table]
        raise ConfigError(f"{key}: '{name}' is not registered{suggest(name, ours)}")
    return cls


def split_init(conf: Mapping[str, Any] | None) -> tuple[dict[str, Any], tuple[str | None, str | None]]:
    """A part's section without, and apart, the file that it starts from and that file's fingerprint."""
    conf = dict(conf or {})
    return conf, (conf.pop("init", None), conf.pop("fingerprint", None))


def encoder(config: dict[str, Any], input_size: int) -> torch.nn.Module:
    """Build the encoder of ``encoder_conf`` and load its weights; records their fingerprint in ``config``.

    Where ``init`` is a model directory, the encoder's class and sizes are taken from it too.
    """
    conf = dict(config.get("encoder_conf") or {})
    if conf.get("init") and (Path(conf["init"]) / "config.yaml").is_file():
        trained = read_model_dir(conf["init"])
        sizes = {key: v for key, v in trained["encoder_conf"].items() if key not in ("freeze", "init", "fingerprint")}
        init = trained["encoder_conf"].get("init") or str(Path(conf["init"]) / "encoder.safetensors")
        config.setdefault("encoder", trained["encoder"])
        config["encoder_conf"] = conf = {**sizes, **conf, "init": init}
    conf, init = split_init(conf)
    conf.pop("freeze", None)
    cls = registered("encoder_classes", config, "encoder")
    module = construct(cls, conf, "encoder_conf", input_size=input_size)
    found = init_part(module, *init, "encoder_conf", "encoder")
    if found:
        config["encoder_conf"]["fingerprint"] = found
    return module


def encoder_is_frozen(config: Mapping[str, Any]) -> bool:
    """Whether ``encoder_conf.freeze`` keeps the encoder as it is: the default once it starts from trained weights."""
    conf = config.get("encoder_conf") or {}
    freeze = conf.get("freeze", conf.get("init") is not None)
    if not isinstance(freeze, bool):
        raise ConfigError(f"encoder_conf.freeze: expected true or false, found {freeze!r}")
    return freeze


def llm(config: dict[str, Any]) -> torch.nn.Module:
    """Build the LLM of ``llm_conf``; records the fingerprint of its base weights in ``config``."""
    cls = registered("decoder_classes", config, "llm")
    module = construct(cls, config.get("llm_conf"), "llm_conf")
    config["llm_conf"]["fingerprint"] = module.fingerprint
    return module


def ctc_head(config: dict[str, Any], encoder_dim: int, tokenizer: Any) -> CTCHead:
    """Build the CTC head of ``ctc_conf`` over the tokenizer's vocabulary; blank is the pad token."""
    conf, init = split_init(config.get("ctc_conf"))
    head = construct(
        CTCHead,
        conf,
        "ctc_conf",
        encoder_dim=encoder_dim,
        vocab_size=len(tokenizer.get_vocab()),
        blank_id=tokenizer.pad_id,
    )
    init_part(head, *init, "ctc_conf", "ctc")
    return head


def _is_plain(value: Any) -> bool:
    """Whether a value is what a YAML file can hold."""
    return value is None or isinstance(value, (str, int, float, bool, list, tuple, Mapping))
