"""WeNet directories, both ways, and what is said of those that do not work."""

import json
import shutil

import pytest
import torch
import yaml

from funasr_mooer.bin.convert import main
from funasr_mooer.border.build import load_model
from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.model_dir import write_model_dir
from funasr_mooer.u2pp_moe import wenet
from funasr_mooer.weights import read_tensors


@pytest.fixture
def model_dir(model, tmp_path):
    write_model_dir(model, tmp_path / "model", model.part_names)
    return tmp_path / "model"


@pytest.fixture
def exported(model_dir, tmp_path):
    wenet.to_wenet(model_dir, tmp_path / "wenet")
    return tmp_path / "wenet"


def changed(folder, **keys):
    """train.yaml with other keys; None removes one."""
    config = yaml.safe_load((folder / "train.yaml").read_text())
    for key, value in keys.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "train.yaml").write_text(yaml.safe_dump(kept))


def test_a_model_of_ours_becomes_wenets_and_comes_back(model, exported, tmp_path, batch):
    assert sorted(path.name for path in exported.iterdir()) == ["final.pt", "train.yaml", "units.txt"]
    config = yaml.safe_load((exported / "train.yaml").read_text())
    assert config["encoder_conf"]["mlp_type"] == "moe"
    assert config["encoder_conf"]["cnn_module_norm"] == "layer_norm"  # not WeNet's default
    assert config["input_dim"] == 16
    tensors = read_tensors(exported / "final.pt")
    assert tensors["encoder.encoders.0.feed_forward.experts.3.w_1.weight"].shape == (24, 16)
    assert tensors["encoder.embed.pos_enc.pe"].shape == (1, 5000, 16)
    wenet.to_model_dir(exported, tmp_path / "again")
    again = load_model(tmp_path / "again")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, second = (m.decode(batch["feats"], batch["feat_lengths"], reverse_weight=0.3) for m in (model, again))
    assert first == second


def test_normalisation_of_the_frontend_becomes_global_cmvn(model, tmp_path, config):
    from funasr_mooer.border.build import build_model
    from funasr_mooer.data.cmvn import write_cmvn

    torch.manual_seed(0)
    write_cmvn(torch.stack([torch.randn(16), torch.rand(16) + 0.5]), tmp_path / "am.mvn")
    config["frontend_conf"]["cmvn_file"] = str(tmp_path / "am.mvn")
    ours = build_model(config)
    write_model_dir(ours, tmp_path / "model", ours.part_names)
    wenet.to_wenet(tmp_path / "model", tmp_path / "wenet")
    assert json.loads((tmp_path / "wenet/global_cmvn").read_text())["frame_num"] == 1
    wenet.to_model_dir(tmp_path / "wenet", tmp_path / "again")
    again = load_model(tmp_path / "again")
    wave = torch.randn(8000) * 0.1
    for raw, normalised in ((again.features(wave), ours.features(wave)),):
        torch.testing.assert_close(again.encoder.global_cmvn(raw), normalised, atol=1e-4, rtol=1e-5)


def test_both_conventions_of_start_and_end_are_read(exported, tmp_path):
    for given, expected in (({"<sos>": 2, "<eos>": 2}, 2), (None, 6)):  # in old versions the last unit
        changed(exported, tokenizer_conf={"special_tokens": given})
        wenet.to_model_dir(exported, tmp_path / "out")
        model = load_model(tmp_path / "out")
        assert (model.sos, model.eos) == (expected, expected)


def test_safetensors_and_a_named_checkpoint_are_read(exported, tmp_path):
    from safetensors.torch import save_file

    save_file(read_tensors(exported / "final.pt"), exported / "model.safetensors")
    shutil.move(exported / "final.pt", exported / "avg_10.pt")
    assert main(["wenet", "--wenet", str(exported), "--out", str(tmp_path / "a")]) == 0
    assert main(["wenet", "--wenet", str(exported), "--out", str(tmp_path / "b"), "--checkpoint", "avg_10.pt"]) == 0
    a, b = (load_model(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert main(["wenet", "--model", str(tmp_path / "a"), "--wenet", str(tmp_path / "c"), "--without-tables"]) == 0
    assert not any(key.endswith(".pe") for key in read_tensors(tmp_path / "c/final.pt"))


def test_missing_files_are_listed(exported, tmp_path, capsys):
    changed(exported, cmvn="global_cmvn", cmvn_conf=None)
    (exported / "final.pt").unlink()
    (exported / "units.txt").unlink()
    assert main(["wenet", "--wenet", str(exported), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for name in ("units.txt", "global_cmvn", "final.pt or model.safetensors"):
        assert name in message
    assert not (tmp_path / "out").exists()
    (exported / "train.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"is not a WeNet directory \(no train.yaml\)"):
        wenet.to_model_dir(exported, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder": "squeezeformer"}, "encoder: squeezeformer is not supported; known: conformer"),
        ({"decoder": "whisper_decoder"}, "known: transformer, bitransformer"),
        ({"model": "paraformer"}, "model: paraformer is not supported"),
        ({"tokenizer": "whisper"}, "known: char, bpe"),
        ({"output_dim": None}, "has no 'output_dim'"),
        ({"encoder_conf": {"mlp_type": "gated"}}, "mlp_type='gated' is not supported"),
        ({"encoder_conf": {"n_expert_activated": 9}}, "n_expert_activated=9 must lie between 1 and n_expert=4"),
        ({"encoder_conf": {"selfattention_layer_type": "selfattn"}}, "use rel_selfattn"),
        ({"encoder_conf": {"layer_norm_type": "rms_norm"}}, "layer_norm_type must be layer_norm"),
        ({"encoder_conf": {"something": 1}}, "encoder_conf.something: unknown key"),
        ({"input_dim": 80}, "input_dim 80 is not num_mel_bins 16"),
    ],
)
def test_what_we_do_not_have_is_an_error(exported, tmp_path, keys, message):
    changed(exported, **keys)
    with pytest.raises(ConfigError, match=message):
        wenet.to_model_dir(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_named(exported, tmp_path):
    tensors = read_tensors(exported / "final.pt")
    lost = "decoder.left_decoder.decoders.0.feed_forward.experts.1.w_2.bias"
    torch.save(
        {**{k: v for k, v in tensors.items() if k != lost}, "projector.weight": torch.ones(1)}, exported / "final.pt"
    )
    with pytest.raises(CheckpointError, match=r"missing: .*feed_forward.b_2.*unexpected.*") as error:
        wenet.to_model_dir(exported, tmp_path / "out")
    assert "projector.weight" in str(error.value)
    with pytest.raises(CheckpointError, match="holds a CTCModel|is not a model directory"):
        wenet.to_wenet(exported, tmp_path / "out")


def test_another_models_cmvn_is_noticed(exported, tmp_path):
    tensors = read_tensors(exported / "final.pt")
    tensors |= {"encoder.global_cmvn.mean": torch.zeros(16), "encoder.global_cmvn.istd": torch.ones(16)}
    torch.save(tensors, exported / "final.pt")
    changed(exported, cmvn="global_cmvn")
    (exported / "global_cmvn").write_text(json.dumps(wenet.cmvn_stats(torch.ones(16), torch.ones(16))))
    with pytest.raises(CheckpointError, match="hold different CMVN"):
        wenet.to_model_dir(exported, tmp_path / "out")
    (exported / "global_cmvn").write_text("[ 1 2 3 ]")
    with pytest.raises(CheckpointError, match="is not WeNet's json"):
        wenet.to_model_dir(exported, tmp_path / "out")
