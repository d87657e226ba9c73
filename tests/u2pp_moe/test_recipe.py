"""The commands of a recipe, one after the other: texts and audio to a model that decodes, and to WeNet's layout."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from funasr_mooer.bin import cmvn, convert, decode, pack, train, units
from funasr_mooer.data.audio import write_wav
from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir


@pytest.fixture
def data(tmp_path):
    """A Kaldi directory of eight short noises."""
    random, utts = np.random.default_rng(0), []
    for number in range(8):
        path = tmp_path / f"wav{number}.wav"
        write_wav(path, random.normal(0, 0.1, 8000 + 800 * number).astype(np.float32))
        utts.append(Utterance(f"utt{number}", str(path), {"text": "".join(random.choice(list("abc d"), 4))}))
    write_kaldi_dir(tmp_path / "data", utts)
    return str(tmp_path / "data")


@pytest.fixture
def prepared(tmp_path, data, config):
    """units.txt, a pack, am.mvn and a config that names them."""
    assert units.main(["--data", data, "--out", str(tmp_path / "units.txt")]) == 0
    table, packed = str(tmp_path / "units.txt"), str(tmp_path / "pack")
    assert pack.main(["--data", data, "--out", packed, "--tokenizer", table, "--nj", "1"]) == 0
    config |= {
        "tokenizer_conf": {"init": table},
        "dataset": "MooerDataset",
        "dataset_conf": {"budget": 300, "num_workers": 0},
        "train_conf": {
            "max_steps": 4,
            "max_epoch": 9,
            "validate_interval": 2,
            "save_checkpoint_interval": 2,  # FunASR's own trainer wants it equal
            "decode_utts": 2,
            "tensorboard": False,
        },
        "optim_conf": {"lr": 1e-3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "am.mvn")]
    assert cmvn.main(["--pack", packed, *made]) == 0
    config["frontend_conf"]["cmvn_file"] = str(tmp_path / "am.mvn")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return packed


def test_from_texts_and_audio_to_a_model_that_decodes(tmp_path, data, prepared, capsys, monkeypatch):
    monkeypatch.setattr("funasr_mooer.train.loop.draw_curves", lambda *_: None)  # tests/bin/test_train.py draws them
    files = ["--config", str(tmp_path / "config.yaml"), "--exp", str(tmp_path / "exp")]
    assert train.main([*files, "--train", prepared, "--dev", prepared, "--device", "cpu"]) == 0
    model = str(tmp_path / "exp/best")
    assert (tmp_path / "exp/best/units.txt").is_file()
    for number, settings in enumerate((["++method=ctc_greedy_search"], ["++decoding_chunk_size=4", "++beam_size=3"])):
        out = tmp_path / f"decoded{number}"
        assert decode.main(["--model", model, "--data", data, "--out", str(out), "--device", "cpu", *settings]) == 0
        results = [json.loads(line) for line in (out / "result.jsonl").read_text().splitlines()]
        assert [result["key"] for result in results] == [f"utt{number}" for number in range(8)]
        assert "timestamp" in results[0]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "rows: {full: {decoding_chunk_size: -1}, chunk4: {decoding_chunk_size: 4}}\n"
        "columns: {greedy: {method: ctc_greedy_search}, rescoring: {method: attention_rescoring}}\n"
    )
    out = tmp_path / "swept"
    swept = ["--model", model, "--data", data, "--out", str(out), "--device", "cpu", "--sweep", str(sweep)]
    assert decode.main(swept) == 0
    assert (out / "full.greedy/text").read_bytes() == (tmp_path / "decoded0/text").read_bytes()
    facts = json.loads((out / "chunk4.rescoring/decode.json").read_text())
    assert facts["settings"] == {"decoding_chunk_size": 4, "method": "attention_rescoring"}
    assert facts["rtf"] > 0
    assert convert.main(["wenet", "--model", model, "--wenet", str(tmp_path / "wenet")]) == 0
    assert convert.main(["wenet", "--wenet", str(tmp_path / "wenet"), "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    wrong = ["--model", model, "--data", data, "--out", str(tmp_path / "wrong"), "++num_beams=2"]
    assert decode.main(wrong) == 2  # MooER's setting
    assert "decoding setting 'num_beams' is unknown" in capsys.readouterr().err


@pytest.mark.slow
def test_stock_trainer_trains_and_stock_automodel_decodes(tmp_path, prepared):
    from funasr_mooer.border.build import build_model
    from funasr_mooer.config import load_config
    from funasr_mooer.model_dir import write_model_dir

    model = build_model(load_config(tmp_path / "config.yaml"))
    start, exp = tmp_path / "start", tmp_path / "exp"
    write_model_dir(model, start, model.part_names)
    command = [sys.executable, "-m", "funasr.bin.train", f"++model={start}", "++model_revision=master"]
    command += [f"++train_data_set_list={prepared}", f"++valid_data_set_list={prepared}", f"++output_dir={exp}"]
    command += ["++dataset=MooerDataset", "++dataset_conf.dataloader=MooerDataloader", "++dataset_conf.num_workers=0"]
    command += ["++dataset_conf.budget=300", "++train_conf.max_epoch=2", "++train_conf.log_interval=1"]
    command += ["++scheduler=warmuplr", "++scheduler_conf.warmup_steps=2"]
    command += ["++optim=adam", "++optim_conf.lr=0.01", "++device=cpu", f"++hydra.run.dir={tmp_path}/hydra"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    code = (
        "import funasr, numpy as np\n"
        f"model = funasr.AutoModel(model={str(exp)!r}, init_param={str(exp / 'model.pt.ep2')!r}, device='cpu',"
        " disable_update=True, disable_pbar=True)\n"
        "wave = np.random.default_rng(0).normal(0, 0.1, 16000).astype('float32')\n"
        "print('RESULT', model.generate(input=[wave]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'text'" in done.stdout
