"""The command that trains: from a pack to a model directory that decodes."""

import importlib.util
import json

import numpy as np
import pytest
import yaml

from funasr_mooer.bin import average, train
from funasr_mooer.data.audio import write_wav
from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir

WORDS = "turn on off the light zero one two".split()


@pytest.fixture
def corpus(tmp_path, tiny_llm):
    """A pack of twelve short noises with texts in the tiny tokenizer's words."""
    from funasr_mooer.bin import pack

    random, utts = np.random.default_rng(0), []
    for number in range(12):
        path = tmp_path / f"wav{number}.wav"
        write_wav(path, random.normal(0, 0.1, 8000 + 800 * number).astype(np.float32))
        texts = {"text": " ".join(random.choice(WORDS, 2)), "text.en": "the light"}
        utts.append(Utterance(f"utt{number:02d}", str(path), texts))
    write_kaldi_dir(tmp_path / "kaldi", utts)
    pack.main(["--data", str(tmp_path / "kaldi"), "--out", str(tmp_path / "pack"), "--tokenizer", str(tiny_llm)])
    return tmp_path / "pack"


@pytest.fixture
def command(tmp_path, tiny_config, corpus):
    """The arguments of a run of two stages."""
    tiny_config |= {
        "dataset_conf": {"budget": 150, "num_workers": 0},
        "train_conf": {
            "stages": [
                {
                    "name": "warm-up",
                    "train": ["adapter"],
                    "objective": "adapter_ctc",
                    "steps": 2,
                    "optim": {"lr": 0.01},
                },
                {"name": "llm", "train": ["adapter", "lora"], "objective": "llm", "steps": 4},
            ],
            "validate_interval": 2,
            "decode_utts": 3,
            "decode_metric": {"asr": ["cer", "wer"], "ast": "bleu"},
            "peak_tflops": 0.1,
            "log_interval": 1,
            "tensorboard": False,
            "keep_nbest_models": 5,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    exp = str(tmp_path / "exp")
    return ["--config", str(tmp_path / "config.yaml"), "--exp", exp, "--train", str(corpus), "--dev", str(corpus)]


def test_a_config_and_a_pack_become_model_directories_that_decode(tmp_path, command, monkeypatch):
    from funasr_mooer.border.build import load_model

    exp = tmp_path / "exp"
    argv = [*command, "--device", "cpu", "++dataset_conf.packing=true"]
    with monkeypatch.context() as patch:  # the curves of the whole run are enough
        patch.setattr("funasr_mooer.train.loop.draw_curves", lambda *_: None)
        assert train.main([*argv, "++train_conf.stages.1.steps=2"]) == 0
    assert (exp / "last").resolve().name == "step-4"
    assert train.main(argv) == 0  # the same experiment, two updates longer
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(0 < r["mfu"] < 1 for r in records if r["kind"] == "train")
    assert {"loss", "acc", "cer", "wer", "bleu"} <= next(
        r for r in records if r["kind"] == "valid" and r["step"] == 6
    ).keys()
    assert (exp / "curves.png").is_file() or not importlib.util.find_spec("matplotlib")
    assert "parts        encoder" in (exp / "train.log").read_text()
    assert "sample       ast | ref: the light | hyp:" in (exp / "train.log").read_text()
    for name in ("last", "best", "model"):
        assert load_model(exp / name, "cpu").prompt.tasks.keys() == {"asr", "ast"}
    assert average.main(["--exp", str(exp), "--num", "2", "--out", str(tmp_path / "mean")]) == 0
    load_model(tmp_path / "mean", "cpu")


def test_what_is_wrong_in_the_config_is_one_line_before_anything_is_built(command, capsys):
    assert train.main([*command, "++train_conf.keep_nbest=3"]) == 2
    error = capsys.readouterr().err.strip()
    assert error == "ConfigError: train_conf.keep_nbest: unknown key; did you mean 'keep_nbest_models'?"


def test_a_metric_that_does_not_exist_is_named(command, capsys):
    assert train.main([*command, "++train_conf.decode_metric=ser"]) == 2
    assert "train_conf.decode_metric: 'ser' is not known; did you mean" in capsys.readouterr().err


def test_averaging_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("train_conf: {max_epoch: 1}\n")
    assert average.main(["--exp", str(tmp_path), "--out", str(tmp_path / "mean")]) == 2
    assert "no checkpoint to average, there is none" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_from_one_command(tmp_path, command):
    assert train.main([*command, "--device", "cpu", "--nproc", "2"]) == 0
    assert (tmp_path / "exp/last/train_state.json").is_file()
