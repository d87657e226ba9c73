"""Forecast a training run from its config: memory of a GPU, updates, hours; nothing is started and no weights are read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funasr_mooer.bin.cli import run
from funasr_mooer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from funasr_mooer.mooer.outline import Outline
    from funasr_mooer.train.forecast import Data, Sharing

EXAMPLES = """examples:
  funasr-mooer forecast --config conf/mooer_paraformer_qwen2_7b.yaml --llm-config LLM_DIR --hours 5000 --gpus 8 --gpu h100
  funasr-mooer forecast --config conf.yaml --train data/pack/train ++train_conf.use_deepspeed=true \\
    ++train_conf.deepspeed_config=conf/deepspeed/zero2.json

Memory counts weights, gradients, optimiser states, what the layers of the LLM keep for the backward pass (measured on
shapes, without computing), logits, and what a runtime takes. Hours follow from --mfu, which depends on the GPU and on
how large batches are; measure a few hundred updates (MFU stands in the step lines), then forecast again.
"""
PROMPT = 27  # tokens of the released chat template around an ASR instruction, and the end of the answer
ANSWER_PER_S = 2.2  # tokens of the answer per second of speech: 1.6 for Chinese, 2.9 for English
MEAN_S = 7.5  # of an utterance, where only hours are given
FILLED = 0.92  # of the budget, where only hours are given


@run
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse([text for text in argv if not text.startswith("++")])
    from funasr_mooer import device as devices
    from funasr_mooer.config import section
    from funasr_mooer.data.corpus import DatasetConf
    from funasr_mooer.train.progress import describe_parts, show_count, show_time
    from funasr_mooer.train.stages import read_stages, trainable_parts

    config = read_config(args.config, [text for text in argv if text.startswith("++")])
    conf, stages = read_stages(config)
    dataset = section(DatasetConf, config.get("dataset_conf"), "dataset_conf")
    if args.gpu not in devices.CARDS:
        raise ConfigError(f"--gpu {args.gpu}: not known; use one of {', '.join(devices.CARDS)}")
    card = devices.CARDS[args.gpu]

    from funasr_mooer.mooer.outline import Outline
    from funasr_mooer.train import forecast

    model = Outline(config, llm_folder(config, args.llm_config))
    default = trainable_parts(model)
    data = measure(args, dataset, model)
    sharing = how_shared(conf, args.gpus)
    print(f"{'data':12} {data.hours:.1f} h, {data.batches} batches of {dataset.budget} positions in an epoch")
    total_h, fits = 0.0, True
    for stage in stages:
        model.train_parts(stage.train or default)
        need = forecast.memory(model, stage, sharing, data, dataset.budget, forecast.compute_dtype(conf.dtype))
        needed_h = forecast.hours(model, stage, data, args.gpus, args.mfu * card.tflops * 1e12)
        total_h, fits = total_h + needed_h, fits and need.total <= card.gib * forecast.GIB
        print(f"{'stage':12} {stage.name}: {describe_parts(model, stage.train or default)}")
        print(f"{'memory':12} {show_memory(need)} of {card.gib:g} GiB on {args.gpu}")
        count = forecast.updates(stage, data, args.gpus)
        print(
            f"{'time':12} {show_count(count)} updates, {show_time(3600 * needed_h)} at MFU {args.mfu:g} on {args.gpus} GPUs"
        )
    print(f"{'in all':12} {show_time(3600 * total_h)}, {total_h * args.gpus:.1f} GPU hours; ", end="")
    print("fits" if fits else "DOES NOT FIT: lower dataset_conf.budget, checkpoint gradients, or split more (ZeRO-3)")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="funasr-mooer forecast",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the whole system; ??? may stay where files go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", nargs="+", metavar="PACK", help="packs to train on")
    source.add_argument("--hours", type=float, help="hours of audio in an epoch, where there is no pack yet")
    parser.add_argument(
        "--llm-config", metavar="DIR", help="folder with the LLM's config.json, instead of llm_conf.init"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, one per GPU")
    parser.add_argument("--gpu", default="h100", help="h100, a100, s4000, ...")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that is reached (default: 0.4)")
    args = parser.parse_args(argv)
    if args.gpus < 1 or not 0 < args.mfu <= 1:
        parser.error("--gpus must be at least 1, and --mfu in (0, 1]")
    return args


def read_config(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A config whose ``???`` may stay open: files are not read here.

    Raises:
        ConfigError: the file does not exist or is not YAML.
    """
    from funasr_mooer.config import override, read_yaml

    return override(_without_open_values(read_yaml(path)), overrides, path)


def _without_open_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_open_values(inner) for key, inner in value.items()}
    return None if value == "???" else value


def llm_folder(config: Mapping[str, Any], given: str | None) -> Path:
    """The folder whose ``config.json`` tells the sizes of the LLM.

    Raises:
        CheckpointError: there is none; says where it comes from.
    """
    name = given or (config.get("llm_conf") or {}).get("init")
    folder = Path(name) if name else None
    if folder is None or not (folder / "config.json").is_file():
        where = (
            "--llm-config is not given and llm_conf.init is open" if folder is None else f"{folder} has no config.json"
        )
        raise CheckpointError(
            f"the LLM's sizes are not known: {where}; put config.json of the model's page (1 kB, no weights) "
            "into a folder and give it with --llm-config DIR"
        )
    return folder


def measure(args: argparse.Namespace, dataset: Any, model: Outline) -> Data:
    """What an epoch holds: read from the packs, each as often as ``dataset_conf.corpora`` says; or estimated from the hours."""
    import numpy as np
    import torch

    from funasr_mooer.data.audio import SAMPLE_RATE
    from funasr_mooer.data.mix import mix
    from funasr_mooer.data.sampler import TokenBudgetSampler
    from funasr_mooer.data.shards import Pack
    from funasr_mooer.train.forecast import Data

    packs = [Pack(path) for path in args.train or ()]
    if packs:
        said = mix(dataset.corpora, [pack.path for pack in packs])
        groups = [(len(pack), each.weight) for pack, each in zip(packs, said)]
        seconds = np.concatenate([pack.records["samples"] for pack in packs]) / SAMPLE_RATE
        answers = np.concatenate([pack.token_counts()[pack.fields[0]] for pack in packs]).astype(np.int64)
    else:
        seconds = np.full(max(1, round(args.hours * 3600 / MEAN_S)), MEAN_S)
        answers = np.round(seconds * ANSWER_PER_S).astype(np.int64)
        groups = [(len(seconds), 1.0)]
    kept = (seconds >= dataset.min_duration_s) & (seconds <= dataset.max_duration_s)
    shown = np.repeat([weight for _, weight in groups], [count for count, _ in groups]) * kept  # times per epoch
    frames = np.ceil(seconds * 1000 / model.feature_ms).astype(np.int64)
    audio = model.adapter.output_lengths(model.encoder.output_lengths(torch.from_numpy(frames))).numpy()
    positions = np.where(kept, audio + PROMPT + answers, 0)
    if packs:
        sampler = TokenBudgetSampler(
            positions,
            dataset.budget,
            dataset.window,
            dataset.max_utts,
            groups=groups,
            length_multiple=1 if dataset.packing else dataset.length_multiple,
            packed=dataset.packing,
        )
        batches = sampler.num_batches
    else:
        batches = max(1, round(float(positions.sum()) / (FILLED * dataset.budget)))
    hours, *counts = (float(shown @ each) for each in (seconds / 3600, frames, positions, answers + 1))
    return Data(hours, *counts, batches)


def how_shared(conf: Any, gpus: int) -> Sharing:
    """What the training section says about splitting the model.

    Raises:
        ConfigError: DeepSpeed's file is not there, or not JSON.
    """
    from funasr_mooer.train.forecast import Sharing

    if getattr(conf, "use_fsdp", False):
        return Sharing(gpus, stage=3)
    if not conf.use_deepspeed:
        return Sharing(gpus)
    try:
        settings = json.loads(Path(conf.deepspeed_config or "").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"train_conf.deepspeed_config: {conf.deepspeed_config}: {error}") from error
    half = conf.dtype != "float32" and bool(settings.get("bf16", {}).get("enabled", False))
    return Sharing(gpus, settings.get("zero_optimization", {}).get("stage", 0), half)


def show_memory(need: Any) -> str:
    """``weights 15.6 | gradients ... | in all 39.9`` in GiB."""
    from funasr_mooer.train.forecast import GIB

    names = ("weights", "gradients", "optimiser", "activations", "logits")
    words = [f"{name} {getattr(need, name) / GIB:.2f}" for name in names]
    return f"{' | '.join(words)} ({'; '.join(need.notes)}) | in all {need.total / GIB:.1f}"


if __name__ == "__main__":
    sys.exit(main())
