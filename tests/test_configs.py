"""Every YAML of the repository loads, has no unknown key, and builds its model, at tiny sizes."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from funasr_mooer.config import load_config, section
from funasr_mooer.data.corpus import DatasetConf
from funasr_mooer.mooer import generate
from funasr_mooer.score.sweep import read_sweep
from funasr_mooer.train.stages import read_stages, trained_parts
from funasr_mooer.u2pp_moe import search

ROOT = Path(__file__).resolve().parents[1]
WORK = {"exp", "data"}  # what recipes write
FOUND = sorted(
    path
    for top in ("conf", "egs")
    for path in (ROOT / top).rglob("*.y*ml")
    if not any(part.split("_")[0] in WORK for part in path.relative_to(ROOT).parts)
)
SYSTEMS = [path for path in FOUND if re.search(r"^model:", path.read_text(encoding="utf-8"), re.MULTILINE)]
# A constructor's sizes -> tiny ones; encoder and decoder get those that they have.
TINY = {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 2, "r_num_blocks": 1, "n_expert": 2}
# Whose decoding settings a model takes.
DECODING = {"MooER": generate, "MooerCTC": generate, "U2ppMoE": search}


@pytest.fixture(scope="session")
def tiny_tokenizers(tiny_llm, tmp_path_factory) -> dict[str, Path]:
    """What ``tokenizer_conf.init`` may name, for each kind of tokenizer."""
    units = tmp_path_factory.mktemp("units") / "units.txt"
    units.write_text(
        "".join(f"{unit} {i}\n" for i, unit in enumerate("<blank> <unk> 打 开 关 灯 零 一 <sos/eos>".split()))
    )
    return {"MooerTokenizer": tiny_llm, "MooerUnitsTokenizer": units}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tiny_overrides(config: dict, tokenizers: dict[str, Path]) -> list[str]:
    """What makes a system small: its own structure, with tiny layers, a tiny LLM and no files."""
    from funasr.register import tables

    import funasr_mooer  # noqa: F401  (registers the encoders)

    wanted = {"tokenizer_conf.init": tokenizers[config["tokenizer"]], "frontend_conf.cmvn_file": "null"}
    for part, classes in (("encoder", tables.encoder_classes), ("decoder", tables.decoder_classes)):
        if part in config:
            known = inspect.signature(classes[config[part]]).parameters
            wanted |= {f"{part}_conf.{key}": size for key, size in TINY.items() if key in known}
    parts = ("encoder", "decoder", "adapter", "ctc")
    wanted |= {f"{part}_conf.init": "null" for part in parts if f"{part}_conf" in config}
    if "llm" in config:
        wanted |= {"llm_conf.init": tokenizers["MooerTokenizer"], "llm_conf.dtype": "float32"}
        if (config.get("llm_conf") or {}).get("lora"):
            wanted |= {"llm_conf.lora.init": "null", "llm_conf.lora.r": 2}
    return [f"++{key}={value}" for key, value in wanted.items()]


def test_configs_are_found():
    assert {"conf/mooer_paraformer_qwen2_7b.yaml", "conf/decode/mooer.yaml"} <= {*map(name, FOUND)}
    assert SYSTEMS


@pytest.mark.parametrize("path", SYSTEMS, ids=name)
def test_a_system_builds_and_takes_a_training_step(path, tiny_tokenizers):
    from funasr_mooer.border.build import SECTIONS, build_model

    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(raw) <= set(SECTIONS)
    config = load_config(path, tiny_overrides(raw, tiny_tokenizers))
    model = build_model(config).train()
    section(DatasetConf, config.get("dataset_conf"), "dataset_conf")
    decoding = DECODING[config["model"]]
    decoding.decode_conf(config.get("decode_conf"))
    assert set(config.get("decode_conf") or {}) <= set(decoding.DECODE_KEYS)

    _, stages = read_stages(config)
    assert trained_parts(model, stages)
    batch = a_batch(model)
    for stage in stages:
        if stage.train:
            model.train_parts(stage.train)
        if stage.objective:
            model.set_objective(stage.objective)
        model.zero_grad(set_to_none=True)
        loss, stats, _ = model(**batch)
        loss.backward()
        assert torch.isfinite(loss), stage.name
        assert "loss" in stats
        for part in stage.train or []:
            assert any(parameter.grad is not None for parameter in model.parts[part]), f"{stage.name}: {part}"


def test_the_sizes_of_the_paper(tmp_path):
    """Dense-225M and MoE-1B with 6000 units, built without memory."""
    from funasr_mooer.border.build import build_model

    units = ["<blank>", "<unk>", *(f"u{i}" for i in range(5997)), "<sos/eos>"]
    (tmp_path / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)))
    millions = {}
    for size in ("1b", "225m_dense"):
        files = [f"++tokenizer_conf.init={tmp_path}", "++frontend_conf.cmvn_file=null"]
        config = load_config(ROOT / f"conf/u2pp_moe_{size}.yaml", files)
        with torch.device("meta"):
            millions[size] = sum(parameter.numel() for parameter in build_model(config).parameters()) / 1e6
    assert millions["225m_dense"] == pytest.approx(225, abs=5)
    assert 1060 < millions["1b"] < 1110
    assert millions["1b"] / millions["225m_dense"] == pytest.approx(4.7, abs=0.15)


def a_batch(model) -> dict[str, torch.Tensor]:
    """Two utterances of noise with random answers, as the model's ``forward`` takes them."""
    generator = torch.Generator().manual_seed(0)
    waves = [torch.rand(samples, generator=generator).sub(0.5).numpy() for samples in (32000, 20000)]
    feats, feat_lengths = model.features.batch(waves)
    transcript = torch.tensor([[3, 4, 5], [6, 7, 0]])
    batch = {"feats": feats, "feat_lengths": feat_lengths}
    batch |= {"transcript_ids": transcript, "transcript_lengths": torch.tensor([3, 2])}
    if hasattr(model, "prompt"):
        prompt = model.prompt.ids(next(iter(model.prompt.tasks)))
        answer = [3, 4, model.tokenizer.eos_id]
        ids = torch.tensor([prompt + answer] * 2)
        labels = torch.tensor([[-100] * len(prompt) + answer] * 2)
        batch |= {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    return batch


@pytest.mark.parametrize("path", [path for path in FOUND if path not in SYSTEMS], ids=name)
def test_what_is_no_system_holds_decoding_settings_or_sections_of_one(path, tiny_llm):
    from funasr_mooer.border.build import SECTIONS
    from funasr_mooer.mooer.prompt import Prompt
    from funasr_mooer.mooer.tokenizer import MooerTokenizer

    if path.stem.endswith("_sweep"):
        for way in read_sweep(path, {}):
            search.decode_conf(way.settings)
        return
    config = load_config(path)
    decoding = [settings for settings in DECODING.values() if set(config) <= set(settings.DECODE_KEYS)]
    if decoding:
        decoding[0].decode_conf(config)
    else:
        assert set(config) <= set(SECTIONS)
        Prompt(MooerTokenizer(str(tiny_llm)), config.get("prompt_conf"))


def test_deepspeed_settings_are_what_their_names_say():
    for path in sorted((ROOT / "conf").rglob("zero*.json")):
        stage = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        assert path.stem.startswith(f"zero{stage}"), path
