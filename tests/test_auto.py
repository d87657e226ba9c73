"""Models by name and directory: what is found, what is not, and what the message says then."""

import inspect
import json
import re
import subprocess
import sys

import funasr
import numpy as np
import pytest
import torch
from funasr.auto import auto_model
from funasr.download import download_model_from_hub

from funasr_mooer.auto import BUILD_KEYS, CALL_KEYS, AutoModel, locate
from funasr_mooer.border.build import SECTIONS, build_model
from funasr_mooer.data.audio import write_wav
from funasr_mooer.errors import CheckpointError, ConfigError, DeviceError
from funasr_mooer.model_dir import write_model_dir


@pytest.fixture
def model_dir(tiny_config, tmp_path):
    torch.manual_seed(0)
    write_model_dir(build_model(tiny_config), tmp_path / "model", ["encoder", "adapter", "lora"])
    return tmp_path / "model"


@pytest.fixture
def wave():
    return np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def test_stock_funasr_loads_a_model_directory_without_importing_us(model_dir):
    code = (
        "import numpy as np, json, funasr\n"
        f"model = funasr.AutoModel(model={str(model_dir)!r}, device='cpu', disable_update=True, disable_pbar=True)\n"
        "wave = np.random.default_rng(0).normal(0, 0.1, 16000).astype('float32')\n"
        "print('RESULT', json.dumps(model.generate(input=[wave], task='asr')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert "text" in json.loads(line.removeprefix("RESULT "))[0]


def test_automodel_decodes_and_refuses_settings_that_nobody_knows(model_dir, wave):
    model = AutoModel(model=model_dir)
    (result,) = model.generate(input=[wave], task="asr", num_beams=2)
    assert isinstance(result["text"], str)
    with pytest.raises(ConfigError, match=r"generate\(num_beam=...\): unknown setting; did you mean 'num_beams'"):
        model.generate(input=[wave], num_beam=2)
    with pytest.raises(ConfigError, match="task 'asx' is not one"):
        model.generate(input=[wave], task="asx")
    with pytest.raises(ConfigError, match=r"generate\(blank_penalty=...\): unknown setting"):  # U2ppMoE has it
        model.generate(input=[wave], task="asr", blank_penalty=1.0)


def test_automodel_refuses_keywords_that_nobody_knows(model_dir, wave):
    with pytest.raises(ConfigError, match=r"AutoModel\(num_beam=...\): unknown keyword; did you mean 'num_beams'"):
        AutoModel(model=model_dir, num_beam=3)
    with pytest.raises(ConfigError, match=r"AutoModel\(vad_modle=...\): unknown keyword; did you mean 'vad_model'"):
        AutoModel(model=model_dir, vad_modle="fsmn-vad")
    with pytest.raises(ConfigError, match="endpoint_conf: MooER does not read it"):
        AutoModel(model=model_dir, endpoint_conf={})
    model = AutoModel(model=model_dir, num_beams=2, ncpu=1, prompt_conf={"tasks": ["asr"]}, task="asr")
    assert list(model.model.prompt.tasks) == ["asr"]
    assert isinstance(model.generate(input=[wave])[0]["text"], str)


def test_every_keyword_that_funasr_reads_is_known():
    source = inspect.getsource(auto_model) + inspect.getsource(download_model_from_hub)
    read = set(re.findall(r"\bkwargs\.get\(\"(\w+)\"", source))
    assert {"vad_model", "ncpu", "init_param"} <= read
    ours = {"device", "hub"}  # parameters of our own
    elsewhere = {"input_size", "vocab_size", "token_list", "type", "cb_kwargs", "preset_spk_num"}  # what FunASR derives
    assert read - {*BUILD_KEYS, *CALL_KEYS, *SECTIONS} - ours - elsewhere == set()


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_a_batch_size_is_a_number_from_1_on(model_dir, wave, size):
    message = f"batch_size={size!r}: expected a whole number of recordings from 1 on"
    with pytest.raises(ConfigError, match=message):
        AutoModel(model=model_dir, batch_size=size)
    model = AutoModel(model=model_dir)
    with pytest.raises(ConfigError, match=message):
        model.generate(input=[wave], task="asr", batch_size=size)


@pytest.mark.parametrize("name", ["hotword", "hotwords"])
def test_a_model_that_knows_no_hotwords_says_so(model_dir, wave, name):
    for auto in (AutoModel(model=model_dir), funasr.AutoModel(model=str(model_dir), device="cpu", disable_update=True)):
        with pytest.raises(ConfigError, match=f"{name}: MooER cannot be told which words to expect; remove it"):
            auto.generate(input=[wave], task="asr", **{name: "turn light"})


def test_a_device_that_is_not_there_is_an_error(model_dir):
    with pytest.raises(DeviceError, match="torch_musa is not installed|torch sees no musa"):
        AutoModel(model=model_dir, device="musa")
    with pytest.raises(DeviceError, match="use one of auto, cpu, cuda, musa"):
        AutoModel(model=model_dir, device="gpu")


def test_a_release_that_is_not_on_disk_says_which_files_go_where(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNASR_MOOER_CACHE", str(tmp_path))
    monkeypatch.setattr("funasr_mooer.mooer.release.download", no_network)
    with pytest.raises(CheckpointError) as error:
        locate("MooER-MTL-5K")
    for word in (
        str(tmp_path / "MooER-MTL-5K"),
        "asr_ast_mtl/adapter_project.pt",
        "Qwen2-7B-Instruct/",
        "modelscope.cn",
    ):
        assert word in str(error.value)
    with pytest.raises(CheckpointError, match="not on Hugging Face; use hub='ms'"):
        locate("MooER-omni-v1", "hf")


def no_network(repo, hub, folder=None):
    raise CheckpointError(f"{repo} cannot be downloaded from {hub} (no network)")


def test_names_of_nothing_list_what_is_known():
    with pytest.raises(CheckpointError, match="MooER-MTL-80K"):
        locate("MooER-5K")
    with pytest.raises(CheckpointError, match="no such model directory"):
        locate("/no/such/folder")


def test_a_release_folder_is_converted_once(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNASR_MOOER_CACHE", str(tmp_path))
    first = locate(str(golden / "mooer/release"))
    stamp = (first / "config.yaml").stat().st_mtime_ns
    assert locate(str(golden / "mooer/release")) == first
    assert (first / "config.yaml").stat().st_mtime_ns == stamp


def test_convert_lists_what_is_missing(tmp_path, capsys):
    from funasr_mooer.bin.convert import main

    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen/config.json").write_text('{"model_type": "qwen2"}')
    assert main(["mooer", "--release", str(tmp_path), "--weights", "asr", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "missing:" in message
    assert "asr/adapter_project.pt" in message
    assert "am.mvn" in message
    assert not (tmp_path / "out").exists()


class TwoPieces(torch.nn.Module):
    """A VAD that hears speech in the first and the third half second."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def inference(self, data_in, key, **_):
        return [{"key": utt, "value": [[0, 500], [1000, 1500]]} for utt in key], {"batch_data_time": 1.0}


def test_behind_a_vad_each_input_has_a_result_even_if_nothing_was_understood(model_dir, wave, tmp_path, monkeypatch):
    long, heard = np.tile(wave, 2), iter([["", ""], ["turn", "on"], ["", ""]])
    files = [tmp_path / f"{name}.wav" for name in ("one", "two", "three")]
    for file in files:
        write_wav(file, long)
    (tmp_path / "wav.scp").write_text("".join(f"{file.stem} {file}\n" for file in files))
    model = AutoModel(model=model_dir)
    model.vad_model, model.vad_kwargs = TwoPieces(), {}
    texts = []

    def inference(data_in, key, **_):
        texts.extend([] if texts else next(heard))
        return [{"key": utt, "text": texts.pop(0), "confidence": 0.9} for utt in key], {"batch_data_time": 1.0}

    monkeypatch.setattr(model.model, "inference", inference)
    results = model.generate(input=str(tmp_path / "wav.scp"), task="asr")
    assert [(result["key"], result["text"]) for result in results] == [("one", ""), ("two", "turn on"), ("three", "")]
    assert not any("confidence" in result for result in results)  # pieces have one, and FunASR would add them up
    heard = iter([["", ""], ["", "light"]])
    assert [result["text"].strip() for result in model.generate(input=[long, long], task="asr")] == ["", "light"]


def test_long_audio_is_cut_at_pauses_by_funasrs_silero_vad(golden, model_dir):
    pytest.importorskip("silero_vad", reason="pip install funasr-mooer[vad]")
    from funasr_mooer.data.audio import read_audio

    pause = np.zeros(8000, np.float32)
    speech = [np.concatenate([read_audio(path), pause]) for path in sorted((golden / "mooer/wav").glob("utt*.wav"))]
    long = np.concatenate(speech * 8)
    assert len(long) > 31 * 16000
    model = AutoModel(model=model_dir, vad_model="silero-vad", vad_kwargs={"max_single_segment_time": 20000})
    # An untrained model repeats the prompt's line break, which is no text.
    (result,) = model.generate(input=long, task="asr", no_repeat_ngram_size=1)
    assert result["text"]
