"""Model directories: what a model needs to be built again, readable by stock FunASR and relocatable.

``config.yaml`` holds the sections, ``configuration.json`` tells FunASR which of their paths lie in (or near) the
directory. Trained parts are inside; frozen ones (encoder, base LLM) are named by path and fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from funasr_mooer.border.parts import Parts
from funasr_mooer.config import load_config, override, save_config
from funasr_mooer.errors import CheckpointError

# Every place in a config that may name a file or folder.
PATH_KEYS = (
    ("frontend_conf", "cmvn_file"),
    ("tokenizer_conf", "init"),
    ("tokenizer_conf", "bpe_model"),
    ("encoder_conf", "init"),
    ("encoder_conf", "file"),
    ("ctc_conf", "init"),
    ("decoder_conf", "init"),
    ("decoder_conf", "file"),
    ("adapter_conf", "init"),
    ("llm_conf", "init"),
    ("llm_conf", "lora", "init"),
)
# FunASR imports the package that remote_code names: so a model directory works without importing us first.
PLUGIN = {"trust_remote_code": True, "remote_code": "funasr_mooer"}


def write_model_dir(model: Parts, directory: str | Path, names: Sequence[str]) -> None:
    """Write a model with these parts inside; every other part stays where its config says it is.

    Args:
        model: the model.
        directory: made if absent; files of the same names are replaced.
        names: the parts to store, usually those that were trained.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_parts(directory, names)
    config = {**model.config_for(names), **PLUGIN}
    cmvn = (config.get("frontend_conf") or {}).get("cmvn_file")
    if cmvn is not None:
        if Path(cmvn).resolve() != (directory / "am.mvn").resolve():
            shutil.copyfile(cmvn, directory / "am.mvn")
        config["frontend_conf"]["cmvn_file"] = "am.mvn"

    near: dict[str, Any] = {}
    for keys, path in _paths(config):
        inside = (directory / path).exists() and not Path(path).is_absolute()
        outside = os.path.abspath(path)  # links such as EXP/model stay links: what they point to may be replaced
        _put(near, keys, path if inside else os.path.relpath(outside, directory.resolve()))
        _put(config, keys, path if inside else outside)
    save_config(config, directory / "config.yaml")
    meta = {
        "framework": "pytorch",
        "task": "auto-speech-recognition",
        "model": {"type": "funasr"},
        "file_path_metas": {"config": "config.yaml", **near},
    }
    (directory / "configuration.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_model_dir(directory: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config of a model directory, its paths pointing to files that exist wherever the directory lies now.

    Args:
        directory: a folder with ``config.yaml`` and, beside it, ``configuration.json``.
        overrides: ``++section.key=value``.

    Raises:
        CheckpointError: not a model directory of ours.
    """
    directory = Path(directory)
    if not (directory / "config.yaml").is_file():
        raise CheckpointError(f"{directory}: is not a model directory (no config.yaml)")
    if (directory / "model.pt").is_file():
        raise CheckpointError(f"{directory}: FunASR's own trainer wrote it (model.pt); use funasr.AutoModel(model=...)")
    config = load_config(directory / "config.yaml")
    meta = directory / "configuration.json"
    if meta.is_file():
        try:
            near = json.loads(meta.read_text(encoding="utf-8")).get("file_path_metas", {})
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{meta}: is damaged ({error}); write or copy the model directory again") from None
        for keys, path in _paths(near):
            if (directory / path).exists():
                _put(config, keys, str(directory / path))
    config = override(config, overrides, str(directory))
    return {key: value for key, value in config.items() if key not in PLUGIN}


def _paths(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every path that a config names, with the keys that lead to it."""
    for keys in PATH_KEYS:
        value: Any = config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, str):
            yield keys, value


def _put(config: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        config = config.setdefault(key, {})
    config[keys[-1]] = value
