"""Resuming: whatever ends a run, the same command brings it to the same weights."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import assert_equal, make_trainer, run, weights

from funasr_mooer.errors import CheckpointError, ConfigError
from funasr_mooer.train.average import average
from funasr_mooer.train.checkpoint import Checkpoints, TrainState
from funasr_mooer.train.launch import STOPPED

STAGES = [
    {"name": "adapter", "train": ["adapter"], "steps": 4, "optim": {"lr": 0.02}},
    {"name": "both", "epochs": 1, "optim": {"lr": 0.01, "weight_decay": 0.01}, "accum": 2, "clip": 1.0,
     "schedule": {"type": "cosine", "warmup_steps": 3}},
]  # fmt: skip
CONF = {"stages": STAGES, "validate_interval": 3, "save_checkpoint_interval": 3, "keep_nbest_models": 2}
OPTIONS = {"conf": CONF, "dropout": 0.3, "dev": True}  # 4 + 12 updates


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed."""
    exp = tmp_path_factory.mktemp("straight")
    assert make_trainer(exp, **OPTIONS).run()
    return exp


@pytest.mark.parametrize(
    ("trap", "left"),
    [
        ({"kill_at": 3}, "step-3"),  # in the first stage, at its fourth batch
        ({"kill_at": 14}, "step-9"),  # in the second
        ({"kill_in_save": 3}, None),  # while the first checkpoint is being written
        ({"kill_in_save": 9}, "step-6"),
    ],
)
def test_a_killed_run_ends_with_the_same_weights_to_the_last_bit(tmp_path, straight, trap, left):
    assert run(exp=str(tmp_path), **OPTIONS, **trap) == [-signal.SIGKILL]
    whole = [path for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert max((path.name for path in whole), default=None) == left
    assert make_trainer(tmp_path, **OPTIONS).run()
    assert_equal(tmp_path / "last", straight / "last")
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert TrainState.read(tmp_path / "last").metrics == TrainState.read(straight / "last").metrics


def test_two_processes_resume_to_the_same_weights(tmp_path):
    assert run(2, exp=str(tmp_path / "a"), **OPTIONS) == [0, 0]
    assert run(2, exp=str(tmp_path / "b"), **OPTIONS, term_at=5) == [STOPPED, STOPPED]
    assert run(2, exp=str(tmp_path / "b"), **OPTIONS) == [0, 0]
    assert_equal(tmp_path / "a/last", tmp_path / "b/last")


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, straight):
    assert run(exp=str(tmp_path), **OPTIONS, term_at=3) == [STOPPED]
    assert (tmp_path / "last").resolve().name == "step-4"
    assert make_trainer(tmp_path, **OPTIONS).run()
    assert_equal(tmp_path / "last", straight / "last")


def test_ema_survives_a_kill_between_and_inside_stages(tmp_path):
    options = {**OPTIONS, "conf": {**CONF, "ema": 0.8}}
    assert make_trainer(tmp_path / "a", **options).run()
    for number, step in enumerate((3, 9)):
        exp = tmp_path / f"b{number}"
        assert run(exp=str(exp), **options, kill_in_save=step) == [-signal.SIGKILL]
        assert make_trainer(exp, **options).run()
        assert_equal(tmp_path / "a/last", exp / "last")


def test_another_number_of_processes_goes_on_at_the_same_place_in_the_data(tmp_path):
    assert run(2, exp=str(tmp_path), conf={"max_steps": 3, "validate_interval": 3}) == [0, 0]
    assert TrainState.read(tmp_path / "last").epoch_batches == 6
    seen = []
    trainer = make_trainer(tmp_path, {"max_steps": 4}, hook=lambda epoch, number, batch: seen.append(number) or batch)
    assert trainer.run()
    assert seen == [6]


def test_a_finished_run_started_again_changes_nothing(straight):
    before = weights(straight / "last")
    assert make_trainer(straight, **OPTIONS).run()
    assert torch.equal(before["lora"]["weight"], weights(straight / "last")["lora"]["weight"])
    assert (straight / "last").resolve().name == "step-16"


def test_the_best_and_the_last_two_are_kept_and_only_these_can_be_resumed(straight):
    kept = {path.name for path in (straight / "checkpoints").iterdir()}
    assert {"step-15", "step-16"} <= kept
    assert len(kept) <= 4
    resumable = {path.parent.name for path in (straight / "checkpoints").rglob("optimizer.pt")}
    assert resumable == {"step-15", "step-16"}
    assert not os.path.isabs(os.readlink(straight / "best"))
    assert (straight / "last" / "train_state.json").is_file()


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    trainer, save = make_trainer(tmp_path, **OPTIONS), torch.save

    def full(state, file):
        if "step-6" in str(file):
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step-6: cannot be written .*No space left.*step-4 is intact"):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_a_process_that_is_lost_while_a_checkpoint_is_written_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def lost(state, file):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9629: Connection reset by peer")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(RuntimeError, match="^.gloo.*Connection reset by peer$"):
        make_trainer(tmp_path, **OPTIONS).run()


def test_what_torch_says_of_a_full_disk_is_said_in_plain_words(tmp_path, monkeypatch):
    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 26240 vs 26132")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(\[enforce fail"):
        make_trainer(tmp_path, **OPTIONS).run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(
        CheckpointError, match=r"cannot be written \(No space left on device\); there is no earlier one"
    ):
        make_trainer(tmp_path, **OPTIONS).run()


def test_another_seed_or_damaged_state_is_refused(tmp_path):
    assert make_trainer(tmp_path, {"max_steps": 2, "validate_interval": 2}).run()
    with pytest.raises(ConfigError, match="trained with seed 42, train_conf.seed is 1"):
        make_trainer(tmp_path, {"max_steps": 3, "seed": 1}).run()
    with pytest.raises(CheckpointError, match="were stages or parts changed"):
        make_trainer(tmp_path, {"max_steps": 3, "train": ["lora"]}).run()
    (tmp_path / "last" / "optimizer.pt").write_bytes(b"PK half")
    with pytest.raises(CheckpointError, match=r"optimizer.pt: does not fit this run"):
        make_trainer(tmp_path, {"max_steps": 3}).run()


def test_checkpoints_without_optimiser_states_are_not_trained_over(tmp_path):
    make_trainer(tmp_path, {"max_steps": 2}).run()
    for file in tmp_path.glob("checkpoints/*/optimizer.pt"):
        file.unlink()
    kept = shutil.copytree(tmp_path / "last", tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"none holds optimizer.pt.*start another --exp"):
        make_trainer(tmp_path, {"max_steps": 4}).run()
    assert_equal(tmp_path / "last", kept)


def test_processes_that_see_different_checkpoints_stop(tmp_path):
    assert make_trainer(tmp_path, {"max_steps": 1}).run()
    trainer = make_trainer(tmp_path, {"max_steps": 2})
    trainer.engine.gather = lambda name: [name, None]
    with pytest.raises(CheckpointError, match="on a file system that all hosts share"):
        trainer.run()


def test_the_average_is_the_mean_of_each_tensor_and_holds_no_optimiser(straight, tmp_path):
    checkpoints = [straight / "checkpoints/step-15", straight / "checkpoints/step-16"]
    out = average(checkpoints, tmp_path / "mean")
    one, two, mean = weights(checkpoints[0]), weights(checkpoints[1]), weights(out)
    for part, tensors in mean.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, (one[part][name] + two[part][name]) / 2, rtol=0, atol=1e-7)
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "config.yaml", "lora.safetensors"]


def test_an_average_replaces_an_earlier_one_and_nothing_else(straight, tmp_path):
    checkpoints = [straight / "checkpoints/step-15", straight / "checkpoints/step-16"]
    for _ in range(2):
        average(checkpoints, tmp_path / "mean")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    for out in (straight, straight / "checkpoints/step-15", straight / "best", tmp_path / "mine"):
        kept = sorted(out.rglob("*"))
        with pytest.raises(CheckpointError, match="give a new folder"):
            average(checkpoints, out)
        assert sorted(out.rglob("*")) == kept


def test_a_copy_beside_the_checkpoints_is_none(tmp_path):
    for name in ("step-2", "step-10", "step-10.copy", "step-best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-2", "step-10"]


def test_the_final_model_can_be_the_mean_of_the_best(tmp_path):
    conf = {"max_steps": 6, "validate_interval": 2, "avg_nbest_model": 2}
    assert make_trainer(tmp_path, conf, dev=True, optim_conf={"lr": 0.01}).run()
    assert (tmp_path / "model").resolve() == tmp_path / "averaged"
    assert weights(tmp_path / "model")["lora"]["weight"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1-plain", "2-zero2"])
def test_the_command_itself_survives_kills(case):
    benchmark = Path(__file__).resolve().parents[2] / "benchmarks/resume.py"
    told = subprocess.run(
        [sys.executable, str(benchmark), "--kills", "3", "--cases", case], capture_output=True, text=True, timeout=500
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "3 kills" in told.stdout
