"""The official MooER releases: their names, their files, their layout; both ways.

Layout of a speech-to-text release::

    paraformer_encoder/{am.mvn, paraformer-encoder.pth}
    {asr, ast, asr_ast_mtl}/{adapter_project.pt, lora_weights/}
    Qwen2-7B-Instruct/                     the base LLM, downloaded apart

Speech-to-speech releases keep everything in one folder, with ``lora/`` and ``llm/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funasr_mooer import weights
from funasr_mooer.border.parts import strip_prefixes
from funasr_mooer.errors import CheckpointError, ConfigError, DependencyError
from funasr_mooer.model_dir import read_model_dir, write_model_dir

FRAME_MS = 60  # one Paraformer frame
ATTENTION_HEADS = 4  # of every released encoder; cannot be read off the weights
ENCODER_FILE = "paraformer-encoder.pth"


@dataclasses.dataclass(frozen=True)
class Release:
    """One official release.

    Attributes:
        modelscope: id on ModelScope.
        huggingface: id on Hugging Face, or None where it is not there.
        weights: its sub-folders of adapter and LoRA; "." where they lie in the release's own folder.
        base_llm: name of the base model, or None where the release brings it along.
    """

    modelscope: str
    huggingface: str | None
    weights: tuple[str, ...]
    base_llm: str | None

    @property
    def files(self) -> list[str]:
        """What must be on disk, relative to the release's folder."""
        if self.weights == (".",):
            return ["am.mvn", ENCODER_FILE, "adapter_project.pt", "lora/", "llm/"]
        parts = [f"{folder}/{name}" for folder in self.weights for name in ("adapter_project.pt", "lora_weights/")]
        return ["paraformer_encoder/am.mvn", f"paraformer_encoder/{ENCODER_FILE}", *parts, f"{self.base_llm}/"]


RELEASES = {
    "MooER-MTL-5K": Release(
        "MooreThreadsSpeech/MooER-MTL-5K", "mtspeech/MooER-MTL-5K", ("asr_ast_mtl", "asr", "ast"), "Qwen2-7B-Instruct"
    ),
    "MooER-MTL-80K": Release(
        "MooreThreadsSpeech/MooER-MTL-80K", "mtspeech/MooER-MTL-80K", ("asr",), "Qwen2-7B-Instruct"
    ),
    "MooER-MTL-5K-1.5B": Release(
        "MooreThreadsSpeech/MooER-MTL-5K-1.5B", "mtspeech/MooER-MTL-5K-1.5B", ("ast",), "Qwen2-1.5B-Instruct"
    ),
    "MooER-omni-v1": Release("MooreThreadsSpeech/MooER-omni-v1", None, (".",), None),
    "MooER-S2ST-v1": Release("MooreThreadsSpeech/MooER-S2ST-v1", None, (".",), None),
}
# What the models of a sub-folder answer. The multi-task model gives transcript and translation, line by line.
TASKS = {"asr": ["asr"], "ast": ["ast"], "asr_ast_mtl": ["asr_ast"]}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts of one released model lie."""

    cmvn: Path
    encoder: Path
    adapter: Path
    lora: Path
    llm: Path


# -- from a release to a model directory ----------------------------------------------------------------------


def find_layout(root: str | Path, folder: str, llm: str | Path | None = None) -> Layout:
    """Find the files of one model in a release, read in place.

    Args:
        root: the release's folder.
        folder: the sub-folder of adapter and LoRA; "." for speech-to-speech releases.
        llm: folder of the base LLM, if it does not lie in ``root``.

    Raises:
        CheckpointError: lists every file that is missing.
    """
    root = Path(root)
    shared = root / "paraformer_encoder" if (root / "paraformer_encoder").is_dir() else root
    lora = root / folder / ("lora_weights" if (root / folder / "lora_weights").is_dir() else "lora")
    found = Layout(
        cmvn=shared / "am.mvn",
        encoder=shared / ENCODER_FILE,
        adapter=root / folder / "adapter_project.pt",
        lora=lora,
        llm=Path(llm) if llm else _base_llm(root),
    )
    missing = [str(path) for path in dataclasses.astuple(found) if not path.exists()]
    if missing:
        raise CheckpointError(f"{root}: not the layout of a MooER release; missing: {', '.join(missing)}")
    if found.adapter.is_dir():
        raise CheckpointError(f"{found.adapter}: is a DeepSpeed folder; turn it into one file with its zero_to_fp32.py")
    return found


def config_of(layout: Layout, tasks: Sequence[str], attention_heads: int = ATTENTION_HEADS) -> dict[str, Any]:
    """The config of a released model; sizes are read off the weights.

    Raises:
        CheckpointError: encoder and adapter do not fit each other.
    """
    adapter_file = weights.read_tensors(layout.adapter)
    trained_encoder = any(name.startswith("encoder.") for name in adapter_file)
    encoder_file = layout.adapter if trained_encoder else layout.encoder
    encoder = encoder_conf(strip_prefixes(weights.read_tensors(encoder_file), "encoder"), encoder_file)
    linear1 = strip_prefixes(adapter_file, "adapter").get("linear1.weight")
    if linear1 is None:
        raise CheckpointError(f"{layout.adapter}: holds no adapter (encoder_projector.linear1.weight)")
    k, rest = divmod(linear1.shape[1], encoder["output_size"])
    if rest or not k:
        raise CheckpointError(
            f"{layout.adapter}: its adapter takes {linear1.shape[1]} values, "
            f"which is no multiple of the encoder's {encoder['output_size']}"
        )
    frontend = {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10}
    return {
        "model": "MooER",
        "model_conf": {},
        "frontend": "WavFrontend",
        "frontend_conf": {**frontend, "lfr_m": 7, "lfr_n": 6, "dither": 0.0, "cmvn_file": str(layout.cmvn)},
        "tokenizer": "MooerTokenizer",
        "tokenizer_conf": {"init": str(layout.llm)},
        "encoder": "MooerParaformerEncoder",
        "encoder_conf": {"init": str(encoder_file), "freeze": True, **encoder, "attention_heads": attention_heads},
        "adapter": "MooerLinearAdapter",
        "adapter_conf": {
            "init": str(layout.adapter),
            "granularity_ms": FRAME_MS * k,
            "hidden_dim": linear1.shape[0],
        },
        "llm": "LoRAQwenDecoder",
        "llm_conf": {"init": str(layout.llm), "lora": {"init": str(layout.lora)}},
        "prompt_conf": {"tasks": list(tasks)},
    }


def encoder_conf(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, int]:
    """Sizes of a SANM encoder out of its weights (all but the number of heads)."""
    needed = ("after_norm.weight", "encoders0.0.feed_forward.w_1.weight", "encoders0.0.self_attn.fsmn_block.weight")
    weights.complain(source, missing=[name for name in needed if name not in tensors])
    blocks = {name.split(".")[1] for name in tensors if name.startswith("encoders.")}
    return {
        "output_size": tensors[needed[0]].shape[0],
        "linear_units": tensors[needed[1]].shape[0],
        "kernel_size": tensors[needed[2]].shape[-1],
        "num_blocks": 1 + len(blocks),
    }


def to_model_dir(
    root: str | Path,
    out: str | Path,
    folder: str,
    tasks: Sequence[str] | None = None,
    llm: str | Path | None = None,
    attention_heads: int = ATTENTION_HEADS,
) -> None:
    """Write a released model as a model directory: adapter and LoRA inside, encoder and base LLM by path and hash.

    Args:
        root: the release's folder.
        out: the model directory.
        folder: sub-folder of the weights (``asr``, ``ast``, ``asr_ast_mtl``, or ".").
        tasks: what the model may be asked; by default what the folder's name says.
        llm: folder of the base LLM, if it does not lie in ``root``.
        attention_heads: of the encoder; not stored in the weights.

    Raises:
        CheckpointError: files or tensors missing, unexpected, or of the wrong size.
        ConfigError: no tasks given and none to be guessed from the folder's name.
    """
    from funasr_mooer.border.build import build_model

    if tasks is None and folder not in TASKS:
        raise ConfigError(
            f"--weights {folder}: its name does not say what the model answers; give --tasks, as in asr,ast"
        )
    config = config_of(find_layout(root, folder, llm), tasks or TASKS[folder], attention_heads)
    write_model_dir(build_model(config), out, ["adapter", "lora"])


# -- from a model directory to a release ----------------------------------------------------------------------


def to_release(model_dir: str | Path, out: str | Path, folder: str | None = None) -> str:
    """Write a model directory in the official layout; returns the name of the sub-folder.

    The base LLM is linked, not copied.

    Raises:
        ConfigError: not a MooER model with a Paraformer encoder, a linear adapter and LoRA.
    """
    from funasr_mooer.border.build import build_model

    config = read_model_dir(model_dir)
    for key, wanted in (("model", "MooER"), ("encoder", "MooerParaformerEncoder"), ("adapter", "MooerLinearAdapter")):
        if config.get(key) != wanted:
            raise ConfigError(f"{model_dir}: {key} is {config.get(key)}; the official layout holds only {wanted}")
    model = build_model(config)
    if model.llm.lora is None:
        raise ConfigError(f"{model_dir}: its LLM has no LoRA; the official layout needs one")
    tasks = list(model.prompt.tasks)
    folder = folder or next((name for name, known in TASKS.items() if known == tasks), "_".join(tasks))
    out = Path(out)
    shared, own = out / "paraformer_encoder", out / folder
    shared.mkdir(parents=True, exist_ok=True)
    own.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config["frontend_conf"]["cmvn_file"], shared / "am.mvn")
    _save_pickle(model.encoder.state_dict(), shared / ENCODER_FILE)
    adapter = {f"encoder_projector.{name}": tensor for name, tensor in model.adapter.state_dict().items()}
    _save_pickle(adapter, own / "adapter_project.pt")
    model.llm.save_lora(own / "lora_weights")
    lora = own / "lora_weights" / "adapter_model.safetensors"
    _save_pickle(weights.read_tensors(lora), lora.with_suffix(".bin"))
    lora.unlink()
    llm = out / model.llm.init.resolve().name
    if not llm.exists():
        llm.symlink_to(model.llm.init.resolve(), target_is_directory=True)
    return folder


def _save_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, path)


# -- releases by name -----------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Where releases are kept: ``$FUNASR_MOOER_CACHE``, by default ``~/.cache/funasr_mooer``."""
    return Path(os.environ.get("FUNASR_MOOER_CACHE", "~/.cache/funasr_mooer")).expanduser()


def fetch(name: str, hub: str) -> Path:
    """The folder of an official release, downloaded if it is not in the cache.

    Raises:
        CheckpointError: not in the cache and not to be downloaded; lists the files and where to put them.
    """
    release = RELEASES[name]
    folder = cache_root() / name
    missing = [file for file in release.files if not (folder / file).exists()]
    if not missing:
        return folder
    source = release.modelscope if hub in ("ms", "modelscope") else release.huggingface
    try:
        if source is None:
            raise CheckpointError(f"{name} is not on Hugging Face; use hub='ms'")
        download(source, hub, folder)
        if release.base_llm and f"{release.base_llm}/" in missing:
            owner = "qwen" if hub in ("ms", "modelscope") else "Qwen"
            download(f"{owner}/{release.base_llm}", hub, folder / release.base_llm)
    except CheckpointError as error:
        where = [f"https://modelscope.cn/models/{release.modelscope}"]
        where += [f"https://huggingface.co/{release.huggingface}"] if release.huggingface else []
        where += [f"https://huggingface.co/Qwen/{release.base_llm}"] if release.base_llm else []
        raise CheckpointError(
            f"{name}: {error}. Put these into {folder}: {', '.join(missing)}; they are at {' and '.join(where)}"
        ) from error
    return folder


def download(repo: str, hub: str, folder: str | Path | None = None) -> Path:
    """A repository of ModelScope (``ms``) or Hugging Face (``hf``), downloaded whole.

    Raises:
        CheckpointError: no network, or no such repository.
    """
    import requests

    folder = Path(folder) if folder else cache_root() / repo.replace("/", "--")
    try:
        if hub in ("ms", "modelscope"):
            from modelscope.hub.snapshot_download import snapshot_download
        elif hub in ("hf", "huggingface"):
            from huggingface_hub import snapshot_download
        else:
            raise ConfigError(f"hub '{hub}' is not known; use ms or hf")
        snapshot_download(repo, local_dir=str(folder))
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"downloading from {hub} needs the package {error.name}: pip install {error.name}"
        ) from error
    except (OSError, ValueError, requests.RequestException) as error:
        raise CheckpointError(f"{repo} cannot be downloaded from {hub} ({_brief(error)})") from error
    return folder


def cached_model_dir(root: Path) -> Path:
    """A release's folder as a model directory, converted on first use.

    The multi-task weights are taken where there are several.

    Raises:
        CheckpointError: the folder is neither a model directory nor a release.
    """
    if (root / "config.yaml").is_file():
        return root
    folders = [name for name in ("asr_ast_mtl", "asr", "ast") if (root / name / "adapter_project.pt").is_file()]
    if not folders and (root / "adapter_project.pt").is_file():
        raise CheckpointError(
            f"{root}: is a speech-to-speech release, which AutoModel does not run yet; "
            f"its text side can be read with: funasr-mooer convert mooer --release {root} --weights . --tasks s2s_trans --out DIR"
        )
    if not folders:
        raise CheckpointError(
            f"{root}: is neither a model directory (config.yaml) nor a MooER release (asr/, ast/, ...)"
        )
    layout = find_layout(root, folders[0])
    stamp = "".join(weights.fingerprint(path) for path in (layout.encoder, layout.adapter, layout.lora, layout.llm))
    out = cache_root() / "converted" / f"{root.name}-{folders[0]}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if not (out / "configuration.json").is_file():
        to_model_dir(root, out, folders[0])
    return out


def _base_llm(root: Path) -> Path:
    """The one sub-folder that holds an LLM."""
    llms = [
        file.parent
        for file in sorted(root.glob("*/config.json"))
        if "model_type" in json.loads(file.read_text("utf-8"))
    ]
    if len(llms) != 1:
        found = ", ".join(path.name for path in llms) or "none"
        raise CheckpointError(
            f"{root}: expected the folder of one base LLM in it, found {found}; name it with --llm DIR"
        )
    return llms[0]


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
