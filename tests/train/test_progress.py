"""What a person sees of a run."""

import json
import logging

import pytest
from toy_training import ToyModel, make_trainer

from funasr_mooer.train.progress import Progress, describe_parts, draw_curves, read_metrics, show_count, show_time

VALUES = {"acc": 0.5, "loss": 1.25, "grad_norm": 1.0, "audio_s_per_s": 214.4, "tokens_per_s": 900.0, "data_wait": 0.03,
          "padding": 0.11, "lr": 9.8e-5, "gib": 61.2, "epoch": 0}  # fmt: skip


def test_a_step_line_shows_the_figures_that_matter(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(tmp_path, total=10, tensorboard=False)
    progress.started -= 4  # seconds, for the first two updates
    progress.step(2, VALUES)
    progress.step(4, {**VALUES, "lr/adapter": 1e-3, "lr/lora": 2e-4})
    line = "step 2/10 | loss 1.250 | acc 0.500 | lr 9.8e-05 | 214 audio-s/s | data wait 3 % | padding 11 % | 61.2 GiB | left 16 s"
    assert caplog.messages[0] == line
    assert "adapter 0.001, lora 0.0002" in caplog.messages[1]


def test_the_parts_line_tells_frozen_from_trained():
    line = describe_parts(ToyModel(), ["adapter"])
    assert line == "encoder 72 frozen | adapter 72 trained | lora 99 frozen | 29.6 % of 243 trained"


def test_numbers_and_times_are_short():
    assert [show_count(n) for n in (99, 4_100, 158_100_000, 7_600_000_000)] == ["99", "4.1 k", "158 M", "7.6 B"]
    assert [show_time(s) for s in (12, 200, 34_800)] == ["12 s", "3 m 20 s", "9 h 40 m"]


def test_a_resumed_run_measures_again_what_came_after_its_checkpoint(tmp_path):
    lines = [json.dumps({"kind": "train", "step": step, "loss": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')  # the last one cut by a kill
    Progress(tmp_path, total=5, step=2, tensorboard=False).close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_curves_are_drawn_from_the_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"kind": "train", "step": s, "loss": 1 / s, "lr/adapter": 1e-3} for s in (1, 2)]
    records += [{"kind": "valid", "step": 2, "loss": 0.4, "cer": 12.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_is_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    assert make_trainer(tmp_path, {"max_steps": 1, "tensorboard": True}).run()
    assert list((tmp_path / "tensorboard").iterdir())
