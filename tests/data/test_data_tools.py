"""The command lines of the data room."""

import pytest

from funasr_mooer.bin.cmvn import main as cmvn
from funasr_mooer.bin.pack import main as pack
from funasr_mooer.data.features import Features
from funasr_mooer.data.shards import Pack


@pytest.fixture
def tokenizer(golden):
    pytest.importorskip("transformers")
    return str(golden / "mooer/release/Qwen2-tiny")


def test_a_directory_is_packed_and_its_statistics_computed(corpus, tokenizer, tmp_path, capsys):
    out = tmp_path / "pack"
    assert pack(["--data", str(corpus), "--out", str(out), "--tokenizer", tokenizer, "--nj", "1"]) == 0
    assert "24 utts" in capsys.readouterr().out
    assert len(Pack(out)) == 24
    assert cmvn(["--pack", str(out), "--out", str(tmp_path / "am.mvn")]) == 0
    assert Features({"cmvn_file": str(tmp_path / "am.mvn")})(Pack(out).samples(0)).abs().mean() < 2


def test_statistics_need_no_more_of_a_config_than_its_frontend(corpus, tokenizer, tmp_path):
    out, config = tmp_path / "pack", tmp_path / "config.yaml"
    assert pack(["--data", str(corpus), "--out", str(out), "--tokenizer", tokenizer, "--nj", "1"]) == 0
    frontend = "frontend_conf: {lfr_m: 1, lfr_n: 1, cmvn_file: '???'}"
    config.write_text(f"{frontend}\ntokenizer_conf: {{init: '???'}}\n")
    assert cmvn(["--pack", str(out), "--config", str(config), "--out", str(tmp_path / "am.mvn")]) == 0
    assert Features({"lfr_m": 1, "lfr_n": 1, "cmvn_file": str(tmp_path / "am.mvn")}).cmvn.shape == (2, 80)


def test_mistakes_are_one_line_and_a_status(tokenizer, tmp_path, capsys):
    assert pack(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "p"), "--tokenizer", tokenizer]) != 0
    assert "no such directory" in capsys.readouterr().err
    assert cmvn(["--pack", str(tmp_path), "--out", str(tmp_path / "am.mvn")]) != 0
    assert "not a pack" in capsys.readouterr().err
