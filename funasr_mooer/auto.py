"""Building models: from a config, from a model directory, by name; and FunASR's AutoModel with our devices and errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import funasr

from funasr_mooer import device as devices
from funasr_mooer.border.build import build_model
from funasr_mooer.border.parts import Parts
from funasr_mooer.config import suggest
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.model_dir import read_model_dir
from funasr_mooer.mooer import release
from funasr_mooer.mooer.generate import DECODE_KEYS
from funasr_mooer.u2pp_moe.search import DECODE_KEYS as U2PP_DECODE_KEYS

# What may be given to generate() beside the decoding settings: ours, then FunASR's.
CALL_KEYS = (
    *DECODE_KEYS,
    *U2PP_DECODE_KEYS,
    *("task", "on_text", "return_token_ids", "fs", "data_type", "batch_size", "batch_size_s", "cache", "is_final"),
    "endpoint_conf",
    *("language", "hotword", "disable_pbar", "merge_vad", "merge_length_s", "batch_size_threshold_s", "use_itn"),
    *("sentence_timestamp", "output_timestamp", "return_raw_text", "progress_callback", "key", "output_dir"),
)


def load_model(directory: str | Path, device: str = "auto", overrides: Sequence[str] = ()) -> Parts:
    """The model of a model directory, on a device, in evaluation mode."""
    return devices.place(build_model(read_model_dir(directory, overrides)), devices.resolve(device))


class AutoModel(funasr.AutoModel):
    """FunASR's AutoModel with ``device="auto"``, the MooER releases by name, and errors that say what to do.

    Args:
        model: a model directory, a released model (``MooER-MTL-5K``), or a hub id.
        device: ``auto``, ``cpu``, ``cuda[:n]``, ``musa[:n]``.
        hub: ``ms`` (ModelScope) or ``hf`` (Hugging Face), for what is not on disk.
        overrides: FunASR's keyword arguments (``vad_model``, ``ncpu``, ...) and sections of the config.

    Raises:
        CheckpointError: the model is nowhere to be found; says which files to put where.
        DeviceError: the device is not usable here.
    """

    def __init__(self, model: str | Path, device: str = "auto", hub: str = "ms", **overrides: Any):
        folder = locate(str(model), hub)
        options = {"disable_update": True, "disable_pbar": True, **overrides}
        place = devices.resolve(device)
        with devices.keeping_parameters(place):
            super().__init__(model=str(folder), device=str(place), hub="ms", **options)

    def generate(self, input: Any, input_len: Any = None, **call: Any) -> list[dict[str, Any]]:
        """Decode audio: paths, arrays, bytes, a wav.scp, or a list of these.

        Args:
            input: the audio.
            input_len: lengths, where ``input`` is a padded tensor of features.
            call: ``task``, decoding settings (:class:`~funasr_mooer.mooer.generate.DecodeConf`), FunASR's options.

        Raises:
            ConfigError: a setting that neither we nor FunASR know.
        """
        for key in call:
            if key not in CALL_KEYS:
                raise ConfigError(f"generate({key}=...): unknown setting{suggest(key, CALL_KEYS)}")
        return super().generate(input, input_len=input_len, **call)


def locate(model: str, hub: str = "ms") -> Path:
    """The model directory behind a name: a folder as it is, a release converted once, a hub id downloaded.

    Raises:
        CheckpointError: not on disk, and not to be downloaded.
    """
    folder = Path(model).expanduser()
    if (folder / "config.yaml").is_file():
        return folder
    if folder.is_dir():
        return release.cached_model_dir(folder)
    if model in release.RELEASES:
        return release.cached_model_dir(release.fetch(model, hub))
    if os.sep not in model or model.startswith((".", os.sep)) or model.count("/") > 1:
        raise CheckpointError(
            f"{model}: no such model directory, and not a released model; known: {', '.join(release.RELEASES)}"
        )
    return release.download(model, hub)
