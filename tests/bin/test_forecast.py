"""A run is forecast from its config: sizes are exact, memory follows how a model is shared, nothing is read but sizes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from funasr_mooer.bin import forecast, pack
from funasr_mooer.border.build import build_model
from funasr_mooer.data.audio import write_wav
from funasr_mooer.data.corpus import DatasetConf
from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir
from funasr_mooer.data.loader import build_loader
from funasr_mooer.mooer.outline import Outline
from funasr_mooer.train.forecast import GIB, Data, Sharing, memory
from funasr_mooer.train.stages import StageConf

CONFIG = Path(__file__).resolve().parents[2] / "conf/mooer_paraformer_qwen2_7b.yaml"
DATA = Data(hours=1, frames=60_000, positions=55_000, labels=8_000, batches=10)
STAGE = StageConf(epochs=1)


@pytest.fixture
def sizes(tiny_llm, tmp_path):
    """A folder that holds the LLM's config.json and no weights."""
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize("freeze", [True, False])
def test_an_outline_has_the_weights_of_the_model_to_the_last_one(tiny_config, sizes, freeze):
    tiny_config["encoder_conf"]["freeze"] = freeze
    model, outline = build_model(tiny_config), Outline(tiny_config, sizes)
    count = {part: [tuple(p.shape) for p in params] for part, params in model.parts.items()}
    assert {part: [tuple(p.shape) for p in params] for part, params in outline.parts.items()} == count
    assert all(p.is_meta for params in outline.parts.values() for p in params)
    need = memory(outline, STAGE, Sharing(), DATA, 1000, torch.float32)
    params = [p for params in model.parts.values() for p in params]
    trained = sum(p.numel() for p in params if p.requires_grad)
    assert need.weights == 4 * sum(p.numel() for p in params)
    assert (need.gradients, need.optimiser) == (4 * trained, 8 * trained)


def test_what_layers_keep_is_what_autograd_keeps(tiny_config, tiny_llm):
    from funasr_mooer.mooer.outline import kept_bytes

    model = build_model(tiny_config).train()
    tokens, hidden = 40, model.llm.hidden_size
    layers, predicted = model.llm.layers, Outline(tiny_config, tiny_llm).layer_bytes(torch.float32)

    def run():
        x = torch.randn(1, tokens, hidden, requires_grad=True)
        place = model.llm.rotary_embedding(x, torch.arange(tokens)[None])
        return layers[0](x, position_embeddings=place, attention_mask=None)

    assert kept_bytes(run, layers[0]) / tokens == pytest.approx(predicted, rel=0.15)


def test_splitting_and_recomputing_save_what_they_promise(tiny_config, sizes):
    whole = Outline(tiny_config, sizes)
    plain, zero2, zero3 = (
        memory(whole, STAGE, Sharing(4, stage, half=stage > 0), DATA, 1000, torch.bfloat16) for stage in (0, 2, 3)
    )
    assert zero2.weights == plain.weights / 2  # cast to bfloat16
    assert zero2.optimiser == plain.optimiser * 12 / 8 / 4
    assert zero3.weights == zero2.weights / 4
    tiny_config["llm_conf"]["gradient_checkpointing"] = True
    tight = memory(Outline(tiny_config, sizes), STAGE, Sharing(), DATA, 1000, torch.float32)
    assert tight.activations < memory(whole, STAGE, Sharing(), DATA, 1000, torch.float32).activations
    assert tight.total > GIB


def test_the_command_forecasts_a_7b_model_from_its_sizes_alone(tmp_path, capsys):
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    argv = ["--config", str(CONFIG), "--hours", "5000", "--gpus", "8"]
    assert forecast.main([*argv, "--llm-config", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "encoder 158 M frozen | adapter 9.44 M trained | lora 161 M trained | llm 7.62 B frozen" in told
    assert "memory       weights 15.4" in told
    assert "GPU hours; fits" in told


def test_what_is_missing_is_said_with_where_it_comes_from(tmp_path, capsys):
    argv = ["--config", str(CONFIG), "--hours", "10"]
    assert forecast.main(argv) == 2
    assert "config.json of the model's page (1 kB, no weights)" in capsys.readouterr().err
    assert forecast.main([*argv, "--gpu", "rtx"]) == 2
    assert "--gpu rtx: not known; use one of" in capsys.readouterr().err


def make_pack(out, count, llm):
    """``count`` seconds of noise with two words each."""
    kaldi, wav = out.with_name(f"{out.name}_kaldi"), out.with_suffix(".wav")
    write_wav(wav, torch.rand(16000).sub(0.5).numpy())
    write_kaldi_dir(kaldi, [Utterance(f"utt{i}", str(wav), {"text": "turn on"}) for i in range(count)])
    assert pack.main(["--data", str(kaldi), "--out", str(out), "--tokenizer", llm]) == 0


@pytest.mark.parametrize("corpora", [None, {"often": 3, "half": {"weight": 0.5}, "never": 0}])
def test_an_epoch_of_several_corpora_has_the_batches_and_hours_of_training(tiny_config, tmp_path, corpora):
    packs = [tmp_path / name for name in ("often", "half", "never", "plain")]
    for folder, count in zip(packs, (5, 6, 7, 4)):
        make_pack(folder, count, tiny_config["llm_conf"]["init"])
    conf = DatasetConf(budget=100, corpora=corpora)  # two rows of 33 to 50 positions
    args = forecast.parse(["--config", "conf.yaml", "--train", *map(str, packs)])
    data = forecast.measure(args, conf, Outline(tiny_config, tiny_config["llm_conf"]["init"]))
    model = build_model(tiny_config)
    parts = (model.features, model.tokenizer, model.prompt)
    sampler = build_loader(conf, packs, *parts, model.audio_lengths).sampler
    assert len(sampler) == (22 if corpora is None else 3 * 5 + 3 + 4)
    assert data.batches == sampler.num_batches
    assert data.hours == pytest.approx(len(sampler) / 3600)


def test_a_pack_gives_the_batches_of_an_epoch(tiny_config, tmp_path, capsys):
    make_pack(tmp_path / "pack", 6, tiny_config["llm_conf"]["init"])
    tiny_config["dataset_conf"] = {"budget": 80, "packing": True}  # 8 of audio, 27 around it, 2 words: 37 each
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(tiny_config))
    assert forecast.main(["--config", str(tmp_path / "conf.yaml"), "--train", str(tmp_path / "pack")]) == 0
    assert "3 batches of 80 positions in an epoch" in capsys.readouterr().out
    large = ["--hours", "9", "++dataset_conf.budget=900000000"]
    assert forecast.main(["--config", str(tmp_path / "conf.yaml"), *large]) == 0
    assert "DOES NOT FIT: lower dataset_conf.budget" in capsys.readouterr().out
