"""``average``: which checkpoints it takes, and what it says where there are none or fewer."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from funasr_mooer.bin import average
from funasr_mooer.train.checkpoint import TrainState

METRICS = {1: {"loss": 3.0, "acc": 0.2}, 2: {"loss": 1.0, "acc": 0.6}, 3: {"loss": 2.0, "acc": 0.9}, 4: {}}


@pytest.fixture
def exp(tmp_path):
    """Checkpoint k holds the number 10 ** k."""
    (tmp_path / "config.yaml").write_text("train_conf: {}\n")
    for step, metrics in METRICS.items():
        folder = tmp_path / f"checkpoints/step-{step}"
        folder.mkdir(parents=True)
        save_file({"weight": torch.tensor([10.0**step])}, folder / "encoder.safetensors")
        (folder / "config.yaml").write_text("model: Toy\n")
        TrainState(step=step, metrics=metrics).write(folder)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--num", "2"], (2, 3)),  # by the loss on the dev set
        (["--num", "2", "--metric", "acc"], (3, 2)),
        (["--num", "1", "--metric", "acc"], (3,)),
        (["--num", "2", "--by", "last"], (4, 3)),
        (["--num", "9"], (2, 3, 1)),
    ],
)
def test_the_best_by_a_metric_or_the_last_are_averaged(exp, options, steps, capsys):
    assert average.main(["--exp", str(exp), "--out", str(exp / "mean"), *options]) == 0
    mean = load_file(exp / "mean/encoder.safetensors")["weight"]
    assert mean.item() == pytest.approx(sum(10.0**step for step in steps) / len(steps))
    said = capsys.readouterr().out
    assert f"mean of {', '.join(f'step-{step}' for step in steps)}" in said
    assert ("(there are no 9)" in said) == ("9" in options)


def test_a_metric_that_nobody_measured_and_an_empty_experiment_are_errors(exp, tmp_path, capsys):
    assert average.main(["--exp", str(exp), "--out", str(exp / "mean"), "--metric", "cer"]) != 0
    assert "none was validated with 'cer'; use --by last, or --metric acc or loss" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").write_text("train_conf: {}\n")
    assert average.main(["--exp", str(tmp_path / "new"), "--out", str(exp / "mean")]) != 0
    assert "no checkpoint to average, there is none; train first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        average.main(["--exp", str(exp), "--out", str(exp / "mean"), "--num", "0"])
    assert not (exp / "mean").exists()
