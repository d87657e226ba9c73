"""Everything a MUSA device must do: the same as the CPU.

Runs on a card (``pytest -m gpu tests/test_musa.py``), and on the simulated device, where test_fake_musa.py starts it.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from funasr_mooer import device as devices
from funasr_mooer import weights
from funasr_mooer.bin import decode, pack, train
from funasr_mooer.data.audio import write_wav
from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir
from funasr_mooer.errors import DeviceError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not devices.is_available("musa"), reason="no MUSA device here"),
]
SIMULATED = getattr(torch.version, "musa", None) == "simulated"
only_simulated = pytest.mark.skipif(not SIMULATED, reason="only the simulated device can be told to")
# Its kernels are the CPU's, but not always the same ones (no fused attention), so sums may be taken in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5} if SIMULATED else {"rtol": 1e-3, "atol": 1e-4}
WORDS = "turn on off the light zero one two".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_llm):
    """Twelve short noises with texts in the tiny tokenizer's words: (Kaldi directory, pack)."""
    folder, random, utts = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for number in range(12):
        path = folder / f"wav{number}.wav"
        write_wav(path, random.normal(0, 0.1, 8000 + 800 * number).astype(np.float32))
        texts = {"text": " ".join(random.choice(WORDS, 2)), "text.en": "the light"}
        utts.append(Utterance(f"utt{number:02d}", str(path), texts))
    write_kaldi_dir(folder / "kaldi", utts)
    pack.main(["--data", str(folder / "kaldi"), "--out", str(folder / "pack"), "--tokenizer", str(tiny_llm)])
    return folder / "kaldi", folder / "pack"


@pytest.fixture(scope="module")
def config(tiny_system):
    """A MooER that trains its adapter with CTC, then everything, through LoRA with dropout."""
    stages = [
        {"name": "warm-up", "train": ["adapter"], "objective": "adapter_ctc", "steps": 2},
        {"name": "all", "train": ["encoder", "adapter", "lora"], "objective": "llm", "steps": 4, "accum": 2},
    ]
    return {
        **tiny_system,
        "encoder_conf": {**tiny_system["encoder_conf"], "freeze": False},
        "llm_conf": {**tiny_system["llm_conf"], "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "decode_conf": {"max_new_tokens": 5},  # with beams
        "dataset_conf": {"budget": 100, "num_workers": 0},
        # Keys' biases have no gradient but rounding errors, which AdamW with its usual eps would turn into steps.
        "optim_conf": {"lr": 0.002, "eps": 1e-4},
        "train_conf": {
            "stages": stages,
            "grad_clip": 1.0,
            "dtype": "float32",
            "validate_interval": 3,
            "log_interval": 1,
            "tensorboard": False,
        },
    }


@pytest.fixture(scope="module")
def model_dir(config, tmp_path_factory):
    """The model directory of an untrained model."""
    from funasr_mooer.border.build import build_model
    from funasr_mooer.model_dir import write_model_dir

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    write_model_dir(build_model(config), folder, ["encoder", "adapter", "lora"])
    return folder


@pytest.fixture(scope="module")
def start(config, corpus, tmp_path_factory):
    """Trains with the real command in an experiment directory; returns (exit status, directory)."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("exp")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    packs = ["--train", str(corpus[1]), "--dev", str(corpus[1])]

    def command(name, device, *more):
        AcceleratorState._reset_state(True)  # Accelerate remembers the device of the run before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("funasr_mooer.train.loop.draw_curves", lambda *_: None)
            exp = ["--config", str(folder / "config.yaml"), "--exp", str(folder / name)]
            return train.main([*exp, *packs, "--device", device, *more]), folder / name

    return command


@pytest.fixture(scope="module")
def on_cpu(start):
    """A run on the CPU."""
    status, exp = start("cpu", "cpu")
    assert status == 0
    return exp


@pytest.fixture(scope="module")
def on_musa(start):
    """The same run on the device that ``auto`` finds."""
    devices_used = kernels()
    status, exp = start("musa", "auto")
    assert status == 0
    assert kernels() - devices_used > 1000 or not SIMULATED
    return exp


def kernels() -> int:
    """Kernels that the simulated device has run."""
    return torch.ops.fake_musa.kernels() if SIMULATED else 0


def losses(exp):
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] in ("train", "valid")]


def parameters(folder):
    """Every trained tensor of a model directory."""
    files = {"adapter.safetensors", "encoder.safetensors", "lora/adapter_model.safetensors"}
    return {f"{file}:{name}": t for file in files for name, t in weights.read_tensors(folder / file).items()}


def assert_same_weights(one, other, **tolerance):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# -- the device itself ------------------------------------------------------------------------------------------------


def test_auto_takes_the_musa_device():
    assert devices.resolve("auto").type == "musa"
    assert devices.describe("musa")
    assert devices.collective_backend(torch.device("musa")) == "mccl"


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="device 'cuda': torch sees no cuda device"):
        devices.resolve("cuda")


@only_simulated
def test_code_for_cuda_alone_and_forgotten_moves_fail_here():
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        torch.zeros(2).cuda()
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(2, device="musa") + torch.zeros(2)


@pytest.mark.parametrize("name", ["auto", "musa"])
def test_parameters_stay_the_same_objects_and_tied_embeddings_tied(name, model_dir):
    from funasr_mooer.border.build import build_model, load_model
    from funasr_mooer.model_dir import read_model_dir

    llm = load_model(model_dir, name).llm.model
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    assert llm.get_output_embeddings().weight.device.type == "musa"
    model = build_model(read_model_dir(model_dir))
    before = list(map(id, model.parameters()))
    assert list(map(id, devices.place(model, devices.resolve(name)).parameters())) == before


# -- models -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "paraformer": ("paraformer.ParaformerEncoder", {"output_size": 16, "linear_units": 32, "num_blocks": 2}),
    "moe, streaming": ("moe_conformer.MoEConformerEncoder", {"n_expert": 4, "causal": True, "use_dynamic_chunk": True}),
    "moe, convolutions": ("moe_conformer.MoEConformerEncoder", {"n_expert": 4, "input_layer": "conv2d"}),
    "conformer": (
        "moe_conformer.MoEConformerEncoder",
        {"mlp_type": "position_wise_feed_forward", "input_layer": "linear", "cnn_module_norm": "batch_norm"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_hears_and_learns_the_same(layout):
    import importlib

    name, sizes = LAYOUTS[layout]
    module, _, cls = name.rpartition(".")
    if "MoE" in cls:
        sizes = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, **sizes}
    found = []
    for device in ("cpu", devices.resolve("musa")):
        torch.manual_seed(0)
        model = getattr(importlib.import_module(f"funasr_mooer.encoders.{module}"), cls)(input_size=20, **sizes)
        feats, lengths = torch.randn(3, 40, 20), torch.tensor([40, 31, 12])
        model = model.eval().to(device)
        out, out_lengths = model(feats.to(device), lengths.to(device))
        assert out.device.type == torch.device(device).type
        loss = (out * torch.linspace(-1, 1, out.shape[-1], device=device)).sum() / out.shape[1]
        loss.backward()
        grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found.append([out.detach().cpu(), out_lengths.cpu(), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def u2pp_moe(tmp_path):
    """Builds a tiny U2++ MoE, the same each time, on a device."""
    from funasr_mooer.border.build import build_model
    from funasr_mooer.u2pp_moe.tokenizer import write_units

    write_units(["<blank>", "<unk>", "<sos/eos>", *"abcd"], tmp_path / "units.txt")
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 2, "mlp_type": "moe", "n_expert": 4}
    config = {
        "model": "U2ppMoE",
        "frontend": "WavFrontend",
        "frontend_conf": {"window": "povey", "lfr_m": 1, "lfr_n": 1, "n_mels": 16, "dither": 0.0},
        "tokenizer": "MooerUnitsTokenizer",
        "tokenizer_conf": {"init": str(tmp_path / "units.txt")},
        "encoder": "MoEConformerEncoder",
        "encoder_conf": {
            **sizes,
            "output_size": 16,
            "input_layer": "conv2d",
            "causal": True,
            "use_dynamic_chunk": True,
        },
        "decoder": "MoEBiTransformerDecoder",
        "decoder_conf": {**sizes, "r_num_blocks": 1},
    }

    def build(device):
        torch.manual_seed(0)
        return devices.place(build_model(config), devices.resolve(device))

    return build


def test_u2pp_moe_learns_the_same_and_finds_the_same_words_with_every_search(u2pp_moe):
    from funasr_mooer.u2pp_moe.search import METHODS

    random = torch.Generator().manual_seed(0)
    batch = {
        "feats": torch.randn(3, 90, 16, generator=random),
        "feat_lengths": torch.tensor([90, 70, 44]),
        "transcript_ids": torch.tensor([[3, 4, 5, 6], [4, 4, 0, 0], [5, 0, 0, 0]]),
        "transcript_lengths": torch.tensor([4, 2, 1]),
    }
    found = []
    for device in ("cpu", "musa"):
        model = u2pp_moe(device)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        devices.seed_all(1)  # of dropout and of the chunk that this batch is masked with
        loss, _, _ = model.train()(**inputs)
        loss.backward()
        model.eval()
        feats, lengths = inputs["feats"], inputs["feat_lengths"]
        texts = [
            model.decode(feats, lengths, method=m, decoding_chunk_size=c, blank_penalty=3.0)
            for m in METHODS
            for c in (-1, 4)
        ]
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads, [[row["text"] for row in rows] for rows in texts]))
    cpu, musa = found
    assert cpu[2] == musa[2]
    assert any(text for rows in cpu[2] for text in rows)
    if SIMULATED:  # a card draws other random numbers
        assert musa[0] == pytest.approx(cpu[0], rel=1e-5)
        torch.testing.assert_close(musa[1], cpu[1], rtol=1e-4, atol=1e-4)


def test_u2pp_moe_streams_to_the_same_words(u2pp_moe):
    from funasr_mooer.u2pp_moe.search import DecodeConf
    from funasr_mooer.u2pp_moe.streaming import Streamer

    wave, texts = np.random.default_rng(0).normal(0, 0.1, 14000).astype(np.float32), []
    for device in ("cpu", "musa"):
        streamer = Streamer(
            u2pp_moe(device).eval(), DecodeConf("attention_rescoring", 4, 2, beam_size=3, blank_penalty=3.0)
        )
        stream = streamer.open()
        for start in range(0, len(wave), 5000):
            (result,) = streamer.feed([stream], [wave[start : start + 5000]], final=start + 5000 >= len(wave))
        texts.append(result["text"])
    assert texts[0] == texts[1] != ""


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_gives_the_losses_and_weights_of_the_cpu(on_cpu, on_musa):
    assert len(losses(on_cpu)) >= 8
    np.testing.assert_allclose(losses(on_musa), losses(on_cpu), rtol=1e-4 if SIMULATED else 1e-2)
    assert_same_weights(on_cpu / "last", on_musa / "last", **CLOSE)


def test_features_made_on_the_device_are_those_of_the_workers(corpus):
    from funasr_mooer.data.batch import Example, collate
    from funasr_mooer.data.device_features import DeviceFeatures
    from funasr_mooer.data.features import Features
    from funasr_mooer.data.shards import Pack

    pack, features = Pack(corpus[1]), Features({"lfr_m": 7, "lfr_n": 6})
    examples = [Example(str(i), i, pack.samples(i), pack.tokens(i)) for i in range(12)]
    made, shipped = (collate(examples, features, None, 0, on_device=flag) for flag in (False, True))
    assert shipped.inputs["waves"].dtype == torch.int16
    found = DeviceFeatures(features, devices.resolve("musa"))(shipped).inputs["feats"]
    assert found.device.type == "musa"
    torch.testing.assert_close(found.cpu(), made.inputs["feats"], atol=1e-3, rtol=0)  # log mel energies, up to 20


@pytest.mark.slow
def test_training_on_features_made_on_the_device_gives_the_weights_of_the_cpu(start, on_cpu):
    status, exp = start("device-features", "auto", "++dataset_conf.features=device")
    assert status == 0
    assert_same_weights(on_cpu / "last", exp / "last", rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(start, on_musa):
    status, exp = start("resumed", "musa", "++train_conf.stages.1.steps=1")
    assert status == 0
    assert (exp / "last").resolve().name == "step-3"
    assert start("resumed", "musa")[0] == 0
    assert_same_weights(on_musa / "last", exp / "last", **({"rtol": 0, "atol": 0} if SIMULATED else CLOSE))


@pytest.mark.slow
def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(start, on_cpu):
    assert start("moved", "musa", "++train_conf.stages.1.steps=1")[0] == 0
    status, exp = start("moved", "cpu")
    assert status == 0
    assert_same_weights(on_cpu / "last", exp / "last", **CLOSE)


@pytest.mark.slow
def test_bfloat16_trains_with_losses_near_those_of_float32(start, on_musa):
    before = kernels()
    status, exp = start("bf16", "musa", "++train_conf.dtype=bfloat16")
    assert status == 0
    assert kernels() > before or not SIMULATED
    found, exact = np.array(losses(exp)), np.array(losses(on_musa))
    assert 0 < np.abs(found / exact - 1).max() < 0.05
    assert all(tensor.dtype == torch.float32 for tensor in parameters(exp / "last").values())


@only_simulated
@pytest.mark.slow
def test_a_full_device_is_one_error_that_names_the_batch(start, monkeypatch, capsys):
    from funasr_mooer.train import update

    micro_step = update.Engine.micro_step

    def in_little_memory(engine, *args, **kwargs):
        monkeypatch.setenv("FAKE_MUSA_BYTES", str(torch.musa.memory_allocated() + 10_000))
        return micro_step(engine, *args, **kwargs)

    monkeypatch.setattr(update.Engine, "micro_step", in_little_memory)
    assert start("full", "musa")[0] != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 1: out of memory on musa" in error
    assert "utt" in error


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_automodel_gives_the_ids_of_the_cpu(beams, model_dir, corpus):
    from funasr_mooer import AutoModel

    waves = [str(path) for path in sorted(corpus[0].parent.glob("wav*.wav"))]
    answers = []
    for device in ("cpu", "musa"):
        model = AutoModel(model=str(model_dir), device=device)
        assert next(model.model.parameters()).device.type == device
        # Left alone, an untrained model says one token again and again.
        call = {"task": "asr", "num_beams": beams, "no_repeat_ngram_size": 1, "return_token_ids": True}
        answers.append([result["token_ids"] for result in model.generate(waves, batch_size=4, **call)])
    assert answers[0] == answers[1]
    assert all(len(ids) > 2 for ids in answers[0])


def test_the_decode_command_writes_the_answers_of_the_cpu(model_dir, corpus, tmp_path):
    for device in ("cpu", "musa"):
        argv = ["--model", str(model_dir), "--data", str(corpus[0]), "--task", "ast", "++no_repeat_ngram_size=1"]
        assert decode.main([*argv, "--out", str(tmp_path / device), "--device", device]) == 0
    cpu, musa = ((tmp_path / device / "text").read_text() for device in ("cpu", "musa"))
    assert cpu == musa
    assert len(cpu.splitlines()) == 12


# -- many processes, DeepSpeed ----------------------------------------------------------------------------------------


@pytest.fixture
def command(config, corpus, tmp_path):
    """Like ``start``, in processes of its own: DeepSpeed and process groups outlive a run."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def run(name, device, *more):
        argv = ["--config", str(tmp_path / "config.yaml"), "--exp", str(tmp_path / name), "--device", device]
        argv += ["--train", str(corpus[1]), "--dev", str(corpus[1]), *more]
        done = subprocess.run(
            [sys.executable, "-m", "funasr_mooer.bin.train", *argv], capture_output=True, text=True, timeout=550
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return tmp_path / name

    return run


def zero_2(tmp_path, **more):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}, **more}))
    return ["++train_conf.use_deepspeed=true", f"++train_conf.deepspeed_config={file}"]


@pytest.mark.slow
def test_zero_2_gives_the_weights_of_plain_training_and_resumes(command, on_cpu, tmp_path):
    pytest.importorskip("deepspeed")
    command("zero", "musa", *zero_2(tmp_path), "++train_conf.stages.1.steps=2")
    exp = command("zero", "musa", *zero_2(tmp_path))
    assert_same_weights(on_cpu / "last", exp / "last", rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_zero_2_in_bfloat16_trains(command, on_cpu, tmp_path):
    pytest.importorskip("deepspeed")
    exp = command("zero16", "musa", *zero_2(tmp_path, bf16={"enabled": True}), "++train_conf.dtype=bfloat16")
    np.testing.assert_allclose(losses(exp), losses(on_cpu), rtol=0.1)


@pytest.mark.slow
def test_two_devices_give_the_weights_of_two_cpu_processes(command, tmp_path, monkeypatch):
    if SIMULATED:
        monkeypatch.setenv("FAKE_MUSA_DEVICES", "2")
    elif torch.musa.device_count() < 2:
        pytest.skip("one device only")
    cpu = command("cpu", "cpu", "--nproc", "2")
    ddp = command("ddp", "musa", "--nproc", "2")
    assert_same_weights(cpu / "last", ddp / "last", rtol=1e-3, atol=1e-4)
    pytest.importorskip("deepspeed")
    zero = command("zero", "musa", "--nproc", "2", *zero_2(tmp_path))
    assert_same_weights(cpu / "last", zero / "last", rtol=1e-3, atol=1e-4)
