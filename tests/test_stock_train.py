"""We are a plugin: FunASR's own trainer trains our model directory, and its own AutoModel decodes the result."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from funasr_mooer import weights
from funasr_mooer.border.build import build_model
from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir, write_kaldi_dir
from funasr_mooer.data.pack_writer import write_pack
from funasr_mooer.model_dir import write_model_dir
from funasr_mooer.mooer.tokenizer import MooerTokenizer


@pytest.fixture
def pack(tmp_path, tiny_llm):
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(12):
        wav = tmp_path / f"utt{number}.wav"
        soundfile.write(wav, rng.normal(0, 0.1, 16000 + 800 * number), 16000)
        texts = {"text": "turn on the light", "text.en": "zero one"}
        utterances.append(Utterance(f"utt{number:02}", str(wav), texts))
    write_kaldi_dir(tmp_path / "data", utterances)
    write_pack(read_kaldi_dir(tmp_path / "data"), tmp_path / "pack", MooerTokenizer(str(tiny_llm)))
    return tmp_path / "pack"


@pytest.mark.slow  # two processes import FunASR, one of them trains
def test_stock_trainer_trains_and_stock_automodel_decodes(tiny_config, pack, tmp_path):
    torch.manual_seed(0)
    start, exp = tmp_path / "start", tmp_path / "exp"
    write_model_dir(build_model(tiny_config), start, ["encoder", "adapter", "lora"])
    command = [sys.executable, "-m", "funasr.bin.train", f"++model={start}", "++model_revision=master"]
    command += [f"++train_data_set_list={pack}", f"++valid_data_set_list={pack}", f"++output_dir={exp}"]
    command += ["++dataset=MooerDataset", "++dataset_conf.dataloader=MooerDataloader", "++dataset_conf.num_workers=0"]
    command += ["++dataset_conf.budget=200", "++train_conf.max_epoch=2", "++train_conf.log_interval=1"]
    command += ["++scheduler=warmuplr", "++scheduler_conf.warmup_steps=2"]
    command += ["++optim=adam", "++optim_conf.lr=0.01", "++device=cpu", f"++hydra.run.dir={tmp_path}/hydra"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    trained = torch.load(exp / "model.pt.ep2", weights_only=True)["state_dict"]
    started = weights.read_tensors(start / "adapter.safetensors")
    assert not torch.equal(trained["adapter.linear1.weight"], started["linear1.weight"])
    frozen = weights.read_tensors(start / "encoder.safetensors")
    assert all(torch.equal(trained[f"encoder.{name}"], tensor) for name, tensor in frozen.items())

    code = (
        "import funasr, numpy as np\n"
        f"model = funasr.AutoModel(model={str(exp)!r}, init_param={str(exp / 'model.pt.ep2')!r}, device='cpu',"
        " disable_update=True, disable_pbar=True)\n"
        "wave = np.random.default_rng(0).normal(0, 0.1, 16000).astype('float32')\n"
        "print('RESULT', float(model.model.adapter.linear1.weight.sum()), model.generate(input=[wave], task='asr'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert float(line.split()[1]) == pytest.approx(float(trained["adapter.linear1.weight"].sum()), rel=1e-5)
    assert "'text'" in line
