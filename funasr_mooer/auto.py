"""FunASR's AutoModel with our devices, the released models by name, and errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import funasr
from funasr.auto.auto_model import prepare_data_iterator

from funasr_mooer import device as devices
from funasr_mooer import register
from funasr_mooer.border.build import SECTIONS
from funasr_mooer.border.parts import Parts
from funasr_mooer.config import read_yaml, suggest
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.mooer import release

# What may be given to generate() beside the model's own decoding settings: ours, then FunASR's.
CALL_KEYS = (
    *("task", "on_text", "return_token_ids", "fs", "data_type", "batch_size", "batch_size_s", "cache", "is_final"),
    "endpoint_conf",
    *("language", "hotword", "hotwords", "use_itn", "merge_vad", "merge_length_s", "batch_size_threshold_s"),
    *("sentence_timestamp", "output_timestamp", "return_raw_text", "progress_callback", "disable_pbar"),
    *("key", "output_dir"),
)
# What FunASR reads when it builds a model, beside the sections of the config.
BUILD_KEYS = (
    *("vad_model", "vad_model_revision", "vad_kwargs", "punc_model", "punc_model_revision", "punc_kwargs"),
    *("spk_model", "spk_model_revision", "spk_kwargs", "spk_mode", "return_spk_res", "return_spk_center"),
    *("model_revision", "model_path", "check_latest", "is_training", "trust_remote_code", "remote_code"),
    *("init_param", "ignore_init_mismatch", "scope_map", "excludes", "oss_bucket", "fp16", "bf16"),
    *("ncpu", "ngpu", "seed", "log_level", "disable_log", "disable_update", "token_lists", "seg_dicts", "en_post_proc"),
)


class AutoModel(funasr.AutoModel):
    """FunASR's AutoModel with ``device="auto"``, the MooER releases by name, and errors that say what to do.

    Args:
        model: a model directory, a released model (``MooER-MTL-5K``), or a hub id.
        device: ``auto``, ``cpu``, ``cuda[:n]``, ``musa[:n]``.
        hub: ``ms`` (ModelScope) or ``hf`` (Hugging Face), for what is not on disk.
        overrides: FunASR's keyword arguments (``vad_model``, ``ncpu``, ...), sections of the config, and what a call of
            ``generate`` may omit then.

    Raises:
        CheckpointError: the model is nowhere to be found; says which files to put where.
        ConfigError: a keyword that neither the model nor FunASR knows.
        DeviceError: the device is not usable here.
    """

    def __init__(self, model: str | Path, device: str = "auto", hub: str = "ms", **overrides: Any):
        folder = locate(str(model), hub)
        cls = model_class(folder)
        if cls is not None:  # what other models take is not ours to say
            _check("AutoModel", "keyword", overrides, (*BUILD_KEYS, *SECTIONS, *CALL_KEYS, *cls.decode_keys))
        options = {"disable_update": True, "disable_pbar": True, **overrides}
        place = devices.resolve(device)
        with devices.keeping_parameters(place):
            super().__init__(model=str(folder), device=str(place), hub="ms", **options)

    def generate(self, input: Any, input_len: Any = None, **call: Any) -> list[dict[str, Any]]:
        """Decode audio: paths, arrays, bytes, a wav.scp, or a list of these.

        Args:
            input: the audio.
            input_len: lengths, where ``input`` is a padded tensor of features.
            call: ``task``, the model's decoding settings (``DecodeConf`` of its system), FunASR's options.

        Returns:
            one ``{"key", "text", ...}`` per input, in order, also with ``vad_model``; an empty text where nothing was heard.

        Raises:
            ConfigError: a setting that neither the model nor FunASR knows, or a batch size of none.
        """
        _check("generate", "setting", call, (*CALL_KEYS, *getattr(self.model, "decode_keys", ())))
        if self.vad_model is None:
            return super().generate(input, input_len=input_len, **call)
        # FunASR leaves out a recording in whose pieces nothing was understood. Asked one by one, each has its result.
        nothing = {"text": "", "timestamp": []}  # FunASR's answer where its VAD hears no speech
        given = {"data_type": call.get("data_type"), "key": call.pop("key", None)}
        results = []
        for key, recording in zip(*prepare_data_iterator(input, input_len=input_len, **given)):
            found = super().generate(recording, input_len=input_len, **call)
            results.append({**(found[0] if found else nothing), "key": key})
            results[-1].pop("confidence", None)  # FunASR adds up those of the pieces
        return results


def _check(call: str, kind: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse names that nobody knows, and batches of nothing."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{call}({key}=...): unknown {kind}{suggest(key, known)}")
    size = given.get("batch_size", 1)
    if type(size) is not int or size < 1:
        raise ConfigError(f"batch_size={size!r}: expected a whole number of recordings from 1 on")


def model_class(folder: Path) -> type[Parts] | None:
    """The class of a model directory, if it is one of ours."""
    name = read_yaml(folder / "config.yaml").get("model") if (folder / "config.yaml").is_file() else None
    return register.find("model_classes", name) if ("model_classes", name) in register.CLASSES else None


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
