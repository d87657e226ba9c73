"""What a model tells of itself gets to the log, the metrics and the boards, and the loop needs to know none of it."""

import logging

from toy_training import make_trainer

from funasr_mooer.train.progress import Progress, read_metrics


def test_a_model_that_counts_is_asked_at_each_log_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer, asked = make_trainer(tmp_path, {"max_steps": 4, "log_interval": 2}), []

    def take(total):
        asked.append(total)
        return {"expert_entropy": 0.94, "expert_max": 0.312}, {"experts/layer/share_0": 0.5}

    trainer.model.take_figures = take
    assert trainer.run()
    assert asked == [trainer.engine.sum] * 3
    assert caplog.messages.count("model        expert entropy 0.94 | expert max 0.31") == 3
    told = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "model"]
    assert [(record["step"], record["expert_max"]) for record in told] == [(1, 0.312), (2, 0.312), (4, 0.312)]


def test_details_go_to_the_boards_alone(tmp_path):
    class Board:
        seen = {}

        def scalars(self, step, values):
            self.seen.update(values)

        def close(self):
            pass

    progress = Progress(tmp_path, total=1, tensorboard=False)
    progress.boards = [Board()]
    progress.figures(1, {"expert_max": 0.3}, {"experts/layer/share_0": 0.5})
    progress.figures(2, {}, {})
    progress.close()
    assert Board.seen == {"model/expert_max": 0.3, "experts/layer/share_0": 0.5}
    assert "share_0" not in (tmp_path / "metrics.jsonl").read_text()
