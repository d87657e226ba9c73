"""WeNet's model directories, both ways: train.yaml, units.txt, global_cmvn and the weights.

A model directory made from one keeps ``train.yaml``, so that what is WeNet's own business (its data pipeline, its
optimiser) comes back unchanged.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from funasr_mooer import weights
from funasr_mooer.border.build import build_model
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.model_dir import read_model_dir, write_model_dir
from funasr_mooer.modules.moe_ffn import PARTS, MoEFFN, wenet_state_dict
from funasr_mooer.modules.positions import Positions, sinusoids
from funasr_mooer.u2pp_moe.model import U2ppMoEModel

WEIGHTS = ("final.pt", "model.safetensors", "final.safetensors")  # looked for in this order
CONFIG = "train.yaml"
ENCODERS = {"conformer": "MoEConformerEncoder"}
DECODERS = {"transformer": "MoETransformerDecoder", "bitransformer": "MoEBiTransformerDecoder"}
TOKENIZERS = ("char", "bpe")
PE_FRAMES = 5000  # rows of WeNet's position tables

# WeNet's defaults where they differ from ours, and values that it lets one change and we do not.
DEFAULTS = {
    "encoder": {"cnn_module_norm": "batch_norm", "mlp_type": "position_wise_feed_forward"},
    "decoder": {"mlp_type": "position_wise_feed_forward"},
    "model": {"ctc_weight": 0.5, "lsm_weight": 0.0, "reverse_weight": 0.0},
}
ONLY = {
    "macaron_style": True,
    "layer_norm_type": "layer_norm",
    "norm_eps": 1e-5,
    "conv_norm_eps": 1e-5,
    "final_norm": True,
    "concat_after": False,
    "query_bias": True,
    "key_bias": True,
    "value_bias": True,
    "conv_bias": True,
    "conv_inner_factor": 2,
    "src_attention": True,
    "src_query_bias": True,
    "src_key_bias": True,
    "src_value_bias": True,
    "tie_word_embedding": False,
    "n_kv_head": None,
    "head_dim": None,
    "positionwise_conv_kernel_size": 1,
    "dropout_rate": 0.0,  # of the CTC head
    "reduce": True,
    "ignore_id": -1,
}
IGNORED = ("use_sdpa", "ctc_blank_id")  # how WeNet computes attention; told to the tokenizer


def to_model_dir(wenet: str | Path, out: str | Path, checkpoint: str | None = None) -> None:
    """Turn a WeNet directory into a model directory.

    Args:
        wenet: holds train.yaml, units.txt, global_cmvn (where train.yaml names one) and the weights.
        out: model directory to write.
        checkpoint: name of the weight file; by default final.pt, or else model.safetensors.

    Raises:
        CheckpointError: a file is missing, or weights do not fit the config.
        ConfigError: a module or a setting that we do not have.
    """
    wenet, out = Path(wenet), Path(out)
    config = read_config(wenet)
    files = find_files(wenet, config, checkpoint)
    model = build_model(our_config(config, files))
    tensors = weights.read_tensors(files["weights"])
    weights.load_strict(model, stack_experts(model, without_tables(tensors)), files["weights"])
    _check_cmvn(model, files, wenet)
    write_model_dir(model, out, model.part_names)
    shutil.copyfile(wenet / CONFIG, out / CONFIG)


def to_wenet(model_dir: str | Path, out: str | Path, tables: bool = True) -> None:
    """Write a model directory as a WeNet directory: train.yaml, units.txt, global_cmvn and final.pt.

    Args:
        model_dir: of a U2ppMoE.
        out: folder to write.
        tables: write the position tables that WeNet keeps in newer checkpoints.

    Raises:
        CheckpointError: the model is not a U2ppMoE, or WeNet has no such features.
    """
    model_dir, out = Path(model_dir), Path(out)
    model = build_model(read_model_dir(model_dir))
    if not isinstance(model, U2ppMoEModel):
        raise CheckpointError(f"{model_dir}: holds a {type(model).__name__}; WeNet's layout is for U2ppMoE")
    kept = model_dir / CONFIG
    config = _yaml(kept) if kept.is_file() else {}
    config = their_config(model, config)
    state = {**wenet_state_dict(model), **(_position_tables(model) if tables else {})}
    mean, istd = _cmvn(model)
    if mean is not None:
        state |= {"encoder.global_cmvn.mean": mean, "encoder.global_cmvn.istd": istd}
        config["cmvn"], config["cmvn_conf"] = "global_cmvn", {"cmvn_file": "global_cmvn", "is_json_cmvn": True}
    out.mkdir(parents=True, exist_ok=True)
    if mean is not None:
        (out / "global_cmvn").write_text(json.dumps(cmvn_stats(mean, istd)) + "\n", encoding="utf-8")
    (out / CONFIG).write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    for name, path in model._tokenizer_files().items():
        shutil.copyfile(path, out / ("units.txt" if name == "init" else "bpe.model"))
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, out / "final.pt")


# -- configs --------------------------------------------------------------------------------------------------


def read_config(wenet: Path) -> dict[str, Any]:
    """WeNet's train.yaml, checked for modules that we have.

    Raises:
        CheckpointError: there is none.
        ConfigError: it names a module that we do not have.
    """
    if not (wenet / CONFIG).is_file():
        raise CheckpointError(f"{wenet}: is not a WeNet directory (no {CONFIG})")
    config = _yaml(wenet / CONFIG)
    known = {
        "model": ("asr_model",),
        "encoder": tuple(ENCODERS),
        "decoder": tuple(DECODERS),
        "ctc": ("ctc",),
        "tokenizer": TOKENIZERS,
        "cmvn": ("global_cmvn",),
    }
    for key, names in known.items():
        if config.get(key, names[0]) not in (*names, *((None,) if key == "cmvn" else ())):
            raise ConfigError(f"{wenet / CONFIG}: {key}: {config[key]} is not supported; known: {', '.join(names)}")
    for key in ("encoder", "decoder", "output_dim", "input_dim"):
        if key not in config:
            raise ConfigError(f"{wenet / CONFIG}: has no '{key}'; a WeNet model directory's {CONFIG} has it")
    return config


def find_files(wenet: Path, config: Mapping[str, Any], checkpoint: str | None) -> dict[str, Path]:
    """The files that a WeNet directory must hold: ``weights``, ``units``, and ``cmvn`` and ``bpe`` where it has them.

    Files that train.yaml names by a path elsewhere are looked for in the directory too.

    Raises:
        CheckpointError: lists what is missing.
    """
    conf = config.get("tokenizer_conf") or {}
    wanted = {"units": (conf.get("symbol_table_path"), "units.txt", "words.txt")}
    cmvn_file = (config.get("cmvn_conf") or config).get("cmvn_file")
    if config.get("cmvn") or cmvn_file:
        wanted["cmvn"] = (cmvn_file, "global_cmvn")
    if config.get("tokenizer") == "bpe":
        wanted["bpe"] = (conf.get("bpe_path"), "bpe.model")
    wanted["weights"] = (checkpoint,) if checkpoint else WEIGHTS
    files, missing = {}, []
    for what, names in wanted.items():
        paths = [wenet / name for full in names if full for name in dict.fromkeys((full, Path(full).name))]
        found = [path for path in paths if path.is_file()]
        if found:
            files[what] = found[0]
        else:
            missing.append(" or ".join(dict.fromkeys(path.name for path in paths)))
    if missing:
        raise CheckpointError(f"{wenet}: missing: {'; '.join(missing)}")
    return files


def our_config(config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """FunASR sections out of a WeNet config."""
    sections = {part: _section(config, part) for part in ("encoder", "decoder", "model", "ctc")}
    blank = int((config.get("ctc_conf") or {}).get("ctc_blank_id", 0))
    conf, last = config.get("tokenizer_conf") or {}, int(config["output_dim"]) - 1
    special = conf.get("special_tokens") or {}
    if conf.get("is_multilingual"):
        raise ConfigError("tokenizer_conf.is_multilingual: true is not supported")
    tokenizer = {
        "init": str(files["units"]),
        "split_with_space": bool(conf.get("split_with_space", False)),
        "special_tokens": {"<blank>": blank, "<sos>": special.get("<sos>", last), "<eos>": special.get("<eos>", last)},
    }
    if "bpe" in files:
        tokenizer["bpe_model"] = str(files["bpe"])
    decoder = sections["decoder"]
    if config["decoder"] == "transformer":
        decoder.pop("r_num_blocks", None)
    else:
        decoder.setdefault("num_blocks", 6)  # WeNet's
    return {
        "model": "U2ppMoE",
        "model_conf": sections["model"],
        "frontend": "WavFrontend",
        "frontend_conf": _frontend(config),
        "tokenizer": "MooerUnitsTokenizer",
        "tokenizer_conf": tokenizer,
        "encoder": ENCODERS[config["encoder"]],
        "encoder_conf": {**sections["encoder"], "global_cmvn": "cmvn" in files},
        "ctc_conf": sections["ctc"],
        "decoder": DECODERS[config["decoder"]],
        "decoder_conf": decoder,
    }


def their_config(model: U2ppMoEModel, kept: Mapping[str, Any]) -> dict[str, Any]:
    """A WeNet config for a model; ``kept`` is the one that it came with, whose other sections stay."""
    ours, tokenizer = copy.deepcopy(model.config), model.tokenizer
    for name in ("encoder", "decoder", "ctc"):
        for key in (
            "init",
            "fingerprint",
            "freeze",
            "global_cmvn",
            "pad_with_bias",
            "input_frame_ms",
            "ffn_dropout_rate",
        ):
            ours[f"{name}_conf"].pop(key, None)
    settings = ("ctc_weight", "lsm_weight", "reverse_weight", "length_normalized_loss")
    theirs = {
        "encoder": next(name for name, cls in ENCODERS.items() if cls == ours["encoder"]),
        "encoder_conf": _explicit(ours["encoder_conf"], "encoder"),
        "decoder": next(name for name, cls in DECODERS.items() if cls == ours["decoder"]),
        "decoder_conf": _explicit(ours["decoder_conf"], "decoder"),
        "tokenizer": "char" if tokenizer.bpe_model is None else "bpe",
        "tokenizer_conf": {
            "symbol_table_path": "units.txt",
            "split_with_space": tokenizer.split_with_space,
            "special_tokens": {"<blank>": tokenizer.pad_id, "<sos>": tokenizer.sos_id, "<eos>": tokenizer.eos_id},
        },
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": model.ctc.blank_id},
        "model": "asr_model",
        "model_conf": {name: getattr(model.model_conf, name) for name in settings},
        "input_dim": model.features.output_size(),
        "output_dim": len(tokenizer),
    }
    if tokenizer.bpe_model is not None:
        theirs["tokenizer_conf"]["bpe_path"] = "bpe.model"
    if not kept:
        fbank = {"num_mel_bins": model.features.conf.n_mels, "frame_length": 25, "frame_shift": 10, "dither": 0.1}
        return {**theirs, "dataset_conf": {"fbank_conf": fbank, "resample_conf": {"resample_rate": 16000}}}
    merged = copy.deepcopy(dict(kept))
    for key, value in theirs.items():
        if not isinstance(value, Mapping):
            merged[key] = value
        elif not key.startswith("tokenizer"):  # the same units came along, so what it said of them holds
            merged[key] = {**(merged.get(key) or {}), **{k: v for k, v in value.items() if _told(merged, key, k, v)}}
    return merged


def _told(kept: Mapping[str, Any], section: str, key: str, value: Any) -> bool:
    """Whether a setting has to be written: it was there, or is not WeNet's default."""
    part = section.removesuffix("_conf")
    return key in (kept.get(section) or {}) or value != {"ctc_blank_id": 0, "length_normalized_loss": False}.get(
        key, DEFAULTS.get(part, {}).get(key)
    )


def _explicit(conf: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Our settings with those written out whose default is another one in WeNet."""
    ours = {"cnn_module_norm": "layer_norm", "mlp_type": "moe"}
    if part == "decoder":
        ours |= {"num_blocks": conf.get("num_blocks", 6), "r_num_blocks": conf.get("r_num_blocks", 3)}
    return {**{key: value for key, value in ours.items() if key in DEFAULTS[part]}, **conf}


def _section(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One of WeNet's sections in our words, its defaults written out.

    Raises:
        ConfigError: a setting at a value that we do not have.
    """
    given = {**DEFAULTS.get(part, {}), **(config.get(f"{part}_conf") or {})}
    for key, only in ONLY.items():
        own = key == "dropout_rate" and part != "ctc"  # elsewhere it is a setting of ours
        if key in given and not own and given.pop(key) != only:
            raise ConfigError(f"{CONFIG}: {part}_conf.{key} must be {only}; other values are not supported")
    return {key: value for key, value in given.items() if key not in IGNORED}


def _frontend(config: Mapping[str, Any]) -> dict[str, Any]:
    """WeNet's fbank as FunASR's frontend: Kaldi's own window, no stacking, no dither in decoding."""
    data = config.get("dataset_conf") or {}
    if data.get("feats_type", "fbank") != "fbank":
        raise ConfigError(f"{CONFIG}: dataset_conf.feats_type: {data['feats_type']} is not supported; known: fbank")
    fbank = data.get("fbank_conf") or {}
    bins = int(fbank.get("num_mel_bins", config["input_dim"]))
    if bins != config["input_dim"]:
        raise ConfigError(f"{CONFIG}: input_dim {config['input_dim']} is not num_mel_bins {bins}")
    return {
        "fs": int((data.get("resample_conf") or {}).get("resample_rate", 16000)),
        "window": "povey",
        "n_mels": bins,
        "frame_length": fbank.get("frame_length", 25),
        "frame_shift": fbank.get("frame_shift", 10),
        "lfr_m": 1,
        "lfr_n": 1,
        "dither": 0.0,
    }


def _yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: is not a mapping of settings")
    return config


# -- weights --------------------------------------------------------------------------------------------------


def without_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the position tables of newer checkpoints, which are constants."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".pe")}


def stack_experts(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """WeNet's weights with the experts of each layer stacked, as our layers have them.

    An expert that is missing stays missing, under WeNet's name.
    """
    stacked = dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, MoEFFN):
            for theirs, ours in PARTS.items():
                keys = [f"{name}.experts.{i}.{theirs}" for i in range(module.num_experts)]
                if all(key in tensors for key in keys):
                    stacked[f"{name}.{ours}"] = torch.stack([stacked.pop(key) for key in keys])
    return stacked


def cmvn_stats(mean: Tensor, istd: Tensor) -> dict[str, Any]:
    """WeNet's statistics of one frame, (F,) each, from which it computes this mean and 1 / deviation."""
    mean, variance = mean.double(), istd.double() ** -2
    return {"mean_stat": mean.tolist(), "var_stat": (variance + mean**2).tolist(), "frame_num": 1}


def read_cmvn_stats(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation, (F,) float32 each, of WeNet's json statistics.

    Raises:
        CheckpointError: not in that format.
    """
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        mean, square = (
            torch.tensor(stats[key], dtype=torch.float64) / stats["frame_num"] for key in ("mean_stat", "var_stat")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not WeNet's json of mean_stat, var_stat and frame_num ({error})") from error
    return mean.float(), (square - mean**2).clamp(min=1e-20).rsqrt().float()


def _check_cmvn(model: U2ppMoEModel, files: Mapping[str, Path], wenet: Path) -> None:
    """The weights hold the statistics too; both must be of one model."""
    if "cmvn" not in files:
        return
    found, own = read_cmvn_stats(files["cmvn"]), model.encoder.global_cmvn
    for name, stats, buffer in zip(("mean", "istd"), found, (own.mean, own.istd)):
        if stats.shape != buffer.shape or not torch.allclose(stats, buffer, rtol=1e-3, atol=1e-4):
            raise CheckpointError(f"{wenet}: {files['cmvn'].name} and the weights hold different CMVN ({name})")


def _cmvn(model: U2ppMoEModel) -> tuple[Tensor | None, Tensor | None]:
    """The model's normalisation, wherever it is kept."""
    if model.encoder.global_cmvn is not None:
        return model.encoder.global_cmvn.mean, model.encoder.global_cmvn.istd
    if model.features.conf.lfr_m != 1:
        raise CheckpointError(f"frontend_conf.lfr_m={model.features.conf.lfr_m}: WeNet does not stack frames")
    return (None, None) if model.features.cmvn is None else (-model.features.cmvn[0], model.features.cmvn[1])


def _position_tables(model: nn.Module) -> dict[str, Tensor]:
    """What WeNet calls ``pe``."""
    places = {name: module.pe.shape[2] for name, module in model.named_modules() if isinstance(module, Positions)}
    return {f"{name}.pe": sinusoids(PE_FRAMES, size) for name, size in places.items()}
