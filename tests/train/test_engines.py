"""DDP, ZeRO and FSDP2 make the same updates, and each goes on from what another has saved."""

from pathlib import Path

import pytest
import torch
from toy_training import assert_equal, run, weights

from funasr_mooer.errors import ConfigError
from funasr_mooer.train.launch import STOPPED
from funasr_mooer.train.stages import read_stages

DEEPSPEED = Path(__file__).resolve().parents[2] / "conf/deepspeed"
ENGINES = {
    "plain": {},
    "zero2": {"use_deepspeed": True, "deepspeed_config": str(DEEPSPEED / "zero2.json")},
    "zero3": {"use_deepspeed": True, "deepspeed_config": str(DEEPSPEED / "zero3.json")},
    "fsdp": {"use_fsdp": True},
}
SPLIT = [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("zero")) for name in ENGINES if name != "plain"]
# The second stage trains what the first had frozen, and the first's checkpoints hold both parts.
STAGES = [
    {"name": "adapter", "train": ["adapter"], "steps": 3, "optim": {"lr": 0.02}},
    {
        "name": "both",
        "train": ["adapter", "lora"],
        "steps": 5,
        "optim": {"lr": 0.01, "weight_decay": 0.01},
        "clip": 0.5,
    },
]


def options(exp, engine, accum=2, **more):
    conf = {"stages": STAGES, "validate_interval": 2, "accum_grad": accum, **ENGINES[engine]}
    return {"exp": str(exp), "conf": conf, "size": 4, "dev": True, **more}


@pytest.fixture(autouse=True)
def needs_deepspeed(request):
    names = getattr(request.node, "callspec", None)
    if names and any(str(value).startswith("zero") for value in names.params.values()):
        pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two processes of DDP."""
    exp = tmp_path_factory.mktemp("plain")
    assert run(2, **options(exp, "plain", dropout=0.3)) == [0, 0]
    return exp


@pytest.mark.parametrize("engine", SPLIT)
def test_a_split_model_is_trained_as_a_whole_one_and_resumes_to_the_same_bits(tmp_path, plain, engine):
    assert run(2, **options(tmp_path / "a", engine, dropout=0.3)) == [0, 0]
    assert_equal(plain / "last", tmp_path / "a/last", rtol=0, atol=1e-5)
    assert_equal(plain / "checkpoints/step-3", tmp_path / "a/checkpoints/step-3", rtol=0, atol=1e-5)
    assert run(2, **options(tmp_path / "b", engine, dropout=0.3), term_at=7) == [STOPPED, STOPPED]
    assert run(2, **options(tmp_path / "b", engine, dropout=0.3)) == [0, 0]
    assert_equal(tmp_path / "a/last", tmp_path / "b/last")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("fsdp", "plain"),
        ("plain", "fsdp"),
        *[pytest.param(*pair, marks=pytest.mark.slow) for pair in
          [("zero2", "plain"), ("zero2", "zero2"), ("zero3", "zero3"), ("zero3", "zero2"), ("fsdp", "zero2"),
           ("zero2", "fsdp"), ("fsdp", "fsdp"), ("plain", "zero3")]],
    ],
)  # fmt: skip
def test_one_process_goes_on_where_two_stopped_with_any_engine(tmp_path, first, then):
    assert run(2, **options(tmp_path / "a", "plain", utts=96)) == [0, 0]
    # The first stage takes 12 of its epoch's batches, the second 20 of its own: it has made three updates.
    assert run(2, **options(tmp_path / "b", first, utts=96), term_at=14) == [STOPPED, STOPPED]
    assert run(1, **options(tmp_path / "b", then, accum=4, utts=96)) == [0]
    assert_equal(tmp_path / "a/last", tmp_path / "b/last", rtol=0, atol=1e-5)
    states = [torch.load(tmp_path / name / "last/optimizer.pt")["optimizer"]["state"] for name in "ab"]
    for number, moments in states[0].items():
        for key, value in moments.items():
            torch.testing.assert_close(states[1][number][key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "then"), [("zero2", "zero2"), ("zero3", "plain")])
def test_bfloat16_under_zero_keeps_its_float32_weights_over_a_restart(tmp_path, engine, then):
    conf = {"max_steps": 6, "validate_interval": 3, "dtype": "bfloat16"}
    base = {
        "conf": {**conf, **ENGINES[engine]},
        "size": 4,
        "optim_conf": {"lr": 1e-4},
    }  # too small a change for bfloat16
    assert run(2, exp=str(tmp_path / "a"), **base) == [0, 0]
    assert run(2, exp=str(tmp_path / "b"), **base, term_at=6) == [STOPPED, STOPPED]
    again = {**base, "conf": {**conf, **ENGINES[then]}}
    assert run(2, exp=str(tmp_path / "b"), **again) == [0, 0]
    if engine == then:
        assert_equal(tmp_path / "a/last", tmp_path / "b/last")
    else:
        for part, tensors in weights(tmp_path / "a/last").items():
            for name, tensor in tensors.items():
                other = weights(tmp_path / "b/last")[part][name]
                torch.testing.assert_close(other, tensor.float(), rtol=0, atol=5e-3)  # one ulp of bfloat16 near 0.5


@pytest.mark.slow
def test_optimiser_states_may_live_in_the_hosts_memory(tmp_path, plain):
    pytest.importorskip("deepspeed")
    file = tmp_path / "offload.json"
    file.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    conf = {**options(tmp_path, "plain")["conf"], "use_deepspeed": True, "deepspeed_config": str(file)}
    more = {**options(tmp_path / "a", "plain", dropout=0.3), "conf": conf}
    assert run(2, **more) == [0, 0]
    assert_equal(plain / "last", tmp_path / "a/last", rtol=0, atol=1e-5)


def test_two_ways_to_split_at_once_are_an_error():
    with pytest.raises(ConfigError, match="use_deepspeed and use_fsdp are two ways"):
        read_stages({"train_conf": {"use_deepspeed": True, "use_fsdp": True}})


def test_an_average_of_split_weights_is_refused(tmp_path):
    assert run(2, exp=str(tmp_path), conf={"max_steps": 1, "ema": 0.9, "use_fsdp": True}) == [1, 1]
