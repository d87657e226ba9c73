"""What a person sees of a run."""

import json
import logging
import sys
import types

import pytest
from toy_training import ToyModel, make_trainer

from funasr_mooer.errors import DependencyError
from funasr_mooer.train.progress import (
    Decoded,
    Progress,
    describe_parts,
    draw_curves,
    read_metrics,
    show_count,
    show_time,
)

VALUES = {"acc": 0.5, "loss": 1.25, "grad_norm": 1.0, "audio_s_per_s": 214.4, "tokens_per_s": 900.0, "data_wait": 0.03,
          "padding": 0.11, "lr": 9.8e-5, "gib": 61.2, "epoch": 0}  # fmt: skip


def test_a_step_line_shows_the_figures_that_matter(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(tmp_path, total=10, tensorboard=False)
    progress.started -= 4  # seconds, for the first two updates
    progress.step(2, VALUES)
    progress.step(4, {**VALUES, "lr/adapter": 1e-3, "lr/lora": 2e-4})
    line = "step 2/10 | loss 1.250 | acc 0.500 | lr 9.8e-05 | 214 audio-s/s | 900 tokens/s | data wait 3 % | padding 11 % | 61.2 GiB"
    assert caplog.messages[0] == f"{line} | left 16 s"
    progress.step(4, {**VALUES, "mfu": 0.414})
    assert "900 tokens/s | MFU 41 % | data wait" in caplog.messages.pop()
    assert "adapter 0.001, lora 0.0002" in caplog.messages[1]


def test_a_sample_is_shown_and_all_of_it_is_on_the_boards(tmp_path, caplog, monkeypatch):
    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    def init(**settings):
        assert settings["name"] == tmp_path.name
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    caplog.set_level(logging.INFO)
    progress = Progress(tmp_path, total=10, tensorboard=False, wandb=True)
    progress.sample(3, [Decoded("asr", f"utt{i}", "turn on", f"turn {i}") for i in range(9)])
    progress.valid(3, {"cer": 12.5})
    progress.close()
    assert [line for line in caplog.messages if "ref:" in line] == [
        f"sample       asr | ref: turn on | hyp: turn {i}" for i in (0, 3, 6)
    ]
    assert told[0][1]["valid/sample"].count("\n") == 10
    assert told[1:] == [(3, {"valid/cer": 12.5}), "finished"]


def test_wandb_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DependencyError, match=r"pip install 'funasr-mooer\[wandb\]'"):
        Progress(tmp_path, total=1, tensorboard=False, wandb=True)


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
