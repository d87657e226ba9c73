"""The loop: one gradient however it is split, stages, and three different ends."""

import json
import math

import pytest
import torch
from toy_training import ToyModel, assert_equal, make_trainer, run, weights

from funasr_mooer.errors import ConfigError, DataError, TrainingError
from funasr_mooer.train.checkpoint import TrainState
from funasr_mooer.train.progress import Decoded
from funasr_mooer.train.stages import build_optimizer, read_stages

LR = {"optim_conf": {"lr": 0.01}}


def test_one_large_batch_accumulation_and_two_processes_give_the_same_weights(tmp_path):
    # 48 utterances: 3 updates of 16, of 4 x 4, and of 2 processes x 2 x 4; lengths differ, so tokens must weigh.
    conf = {"max_steps": 3, "validate_interval": 3}
    assert make_trainer(tmp_path / "big", conf, size=16, **LR).run()
    assert make_trainer(tmp_path / "accum", {**conf, "accum_grad": 4}, size=4, **LR).run()
    assert run(2, exp=str(tmp_path / "two"), conf={**conf, "accum_grad": 2}, size=4, **LR) == [0, 0]
    assert_equal(tmp_path / "big/last", tmp_path / "accum/last", rtol=0, atol=1e-6)
    assert_equal(tmp_path / "big/last", tmp_path / "two/last", rtol=0, atol=1e-6)


def test_a_mean_of_batch_means_would_be_another_gradient(tmp_path):
    trainer = make_trainer(tmp_path, {"max_steps": 1})
    weights = [batch.weight for batch in trainer.loader.epoch(0, rank=0, world=1, start_batch=0)]
    assert len(set(weights)) > 3  # otherwise the test above would show nothing


def test_stages_train_their_own_parts_at_their_own_rates(tmp_path):
    stages = [
        {"name": "adapter", "train": ["adapter"], "steps": 4, "optim": {"lr": 0.1}},
        {"train": ["adapter", "lora"], "steps": 4, "optim": {"lr": {"adapter": 0.0, "lora": 0.1}}, "clip": 1.0},
    ]
    conf = {"stages": stages, "validate_interval": 4, "seed": 3}
    trainer = make_trainer(tmp_path, conf)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.run()
    one, two = weights(tmp_path / "checkpoints/step-4"), weights(tmp_path / "last")
    assert torch.equal(one["lora"]["weight"], start["lora.weight"])
    assert not torch.equal(one["adapter"]["weight"], start["adapter.weight"])
    assert torch.equal(two["adapter"]["weight"], one["adapter"]["weight"])
    assert not torch.equal(two["lora"]["weight"], one["lora"]["weight"])
    assert TrainState.read(tmp_path / "last").epoch == 1  # the second stage began a new epoch
    assert torch.equal(trainer.model.encoder.weight, start["encoder.weight"])


def test_epochs_end_when_all_batches_came_and_the_last_group_may_be_smaller(tmp_path):
    trainer = make_trainer(tmp_path, {"max_epoch": 2, "accum_grad": 5, "validate_interval": 0}, dev=True)
    assert trainer.run()  # 24 batches: 5 updates an epoch, the last of 4 batches
    state = TrainState.read(tmp_path / "last")
    assert (state.step, state.epoch, state.epoch_batches) == (10, 2, 0)
    assert state.metrics.keys() == {"loss", "acc"}


def test_validation_is_the_mean_over_tokens_on_any_number_of_processes(tmp_path):
    conf = {"max_steps": 1, "validate_interval": 1}
    assert make_trainer(tmp_path / "one", conf, size=4, dev=True).run()
    assert run(2, exp=str(tmp_path / "two"), conf=conf, size=2, dev=True) == [0, 0]
    one, two = (TrainState.read(tmp_path / name / "last").metrics for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-6)
    assert one["loss"] > 1


def test_decoding_a_sample_adds_error_rates_and_ranks_checkpoints(tmp_path):
    class Sample:
        rates = iter([30.0, 10.0, 20.0])

        def __call__(self, model, rank, world):
            return [Decoded("asr", "utt1", "one", "two")]

        def score(self, texts):
            assert [text.ref for text in texts] == ["one"]
            return {"cer": next(self.rates)}

    conf = {"max_steps": 6, "validate_interval": 2, "decode_utts": 9}
    trainer = make_trainer(tmp_path, conf, decode=Sample())
    assert trainer.run()
    assert (tmp_path / "best").resolve().name == "step-4"
    assert (tmp_path / "model").resolve().name == "step-4"
    assert TrainState.read(tmp_path / "best").metrics == {"cer": 10.0}


def test_a_loss_that_is_no_number_stops_with_names_and_leaves_the_last_checkpoint(tmp_path):
    def poison(epoch, number, batch):
        if number == 5:
            batch.inputs["feats"][0, 0, 0] = float("nan")
        return batch

    trainer = make_trainer(tmp_path, {"max_steps": 12, "validate_interval": 4}, hook=poison)
    with pytest.raises(TrainingError, match=r"step 6: the loss is not a number; its batch: utt\d+, utt\d+"):
        trainer.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]
    assert all(tensor.isfinite().all() for part in weights(tmp_path / "last").values() for tensor in part.values())


def test_data_that_cannot_be_read_or_ends_early_is_not_taken_for_the_end_of_the_epoch(tmp_path):
    def broken(epoch, number, batch):
        if number == 5:
            raise DataError(f"{batch.utt_ids[0]}: cannot be read")
        return batch

    trainer = make_trainer(tmp_path, {"max_epoch": 1, "validate_interval": 4}, hook=broken)
    with pytest.raises(DataError, match="cannot be read"):
        trainer.run()
    assert (tmp_path / "last").resolve().name == "step-4"
    trainer = make_trainer(tmp_path, {"max_epoch": 1})
    trainer.loader.epoch = lambda *_, **__: iter([trainer.loader.batch([0, 1])])
    with pytest.raises(DataError, match="epoch 0: the data ended early, 1 batches are missing"):
        trainer.run()


def test_out_of_memory_names_the_batch_and_what_to_lower(tmp_path):
    def greedy(epoch, number, batch):
        if number == 2:
            batch.inputs["feats"] = torch.zeros(1, 1, 1).expand(1, 1 << 50, 8)
        return batch

    trainer = make_trainer(tmp_path, {"max_steps": 5}, hook=greedy)
    with pytest.raises(TrainingError, match=r"step 3: out of memory on cpu for a batch of 2 utterances.*dataset_conf"):
        trainer.run()


def test_ema_is_what_is_validated_and_saved_while_training_goes_on_undisturbed(tmp_path):
    conf = {"max_steps": 6, "validate_interval": 3}
    plain, averaged = make_trainer(tmp_path / "a", conf, **LR), make_trainer(tmp_path / "b", {**conf, "ema": 0.5}, **LR)
    assert plain.run()
    assert averaged.run()
    saved = torch.load(tmp_path / "b/last/optimizer.pt", weights_only=True)["ema"]
    assert_equal(tmp_path / "a/last", tmp_path / "a/model")
    torch.testing.assert_close(saved["trained"][0], plain.model.adapter.weight.data, rtol=0, atol=0)
    torch.testing.assert_close(weights(tmp_path / "b/last")["adapter"]["weight"], saved["averages"][0], rtol=0, atol=0)
    assert not torch.equal(saved["averages"][0], saved["trained"][0])


def test_metrics_have_a_line_per_log_interval(tmp_path):
    assert make_trainer(tmp_path, {"max_steps": 8, "log_interval": 4}, **LR).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 8]
    assert lines[-1].keys() >= {"loss", "acc", "lr", "audio_s_per_s", "data_wait", "padding", "gib", "grad_norm"}


def test_the_optimiser_has_a_group_per_part_and_no_decay_for_biases():
    _, [stage] = read_stages({"optim_conf": {"lr": {"adapter": "3e-3", "lora": 1e-3}, "weight_decay": 0.1}})
    groups = build_optimizer(ToyModel(), ["adapter", "lora"], stage.optim).param_groups
    assert [(g["part"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("adapter", 3e-3, 0.1), ("adapter", 3e-3, 0.0), ("lora", 1e-3, 0.1), ("lora", 1e-3, 0.0)
    ]  # fmt: skip


def test_lora_plus_lets_b_learn_faster_than_a():
    layer = torch.nn.ModuleDict({"lora_A": ToyModel().lora, "lora_B": ToyModel().lora})
    model = torch.nn.Module()
    model.layer, model.parts = layer, {"lora": [p for p in layer.parameters() if p.ndim > 1]}
    _, [stage] = read_stages({"optim_conf": {"lr": 1e-4, "lora_plus": 16}})
    a, b = build_optimizer(model, ["lora"], stage.optim).param_groups
    assert (a["params"][0] is layer["lora_A"].weight, a["lr"]) == (True, 1e-4)
    assert (b["params"][0] is layer["lora_B"].weight, b["full_lr"]) == (True, 16e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_conf": {"acum_grad": 2}}, r"train_conf.acum_grad: unknown key; did you mean 'accum_grad'"),
        (
            {"train_conf": {"stages": [{"stpes": 3}]}},
            r"train_conf.stages\[0\].stpes: unknown key; did you mean 'steps'",
        ),
        ({"train_conf": {"stages": [{"name": "a"}]}}, "stage 'a': give steps or epochs"),
        ({"train_conf": {"max_steps": 0}}, "stage 'train': give steps or epochs, more than 0"),
        ({"optim_conf": {"betas": [0.9]}}, r"optim.betas=\[0.9\]: give two numbers"),
        ({"train_conf": {"stages": [{"steps": 3}], "train": ["lora"]}}, "train_conf.train: belongs to the one-stage"),
        ({"train_conf": {"grad_clip": -1.0}}, "stage 'train': clip=-1.0 must be at least 0"),
        ({"train_conf": {"seed": -1}}, "train_conf.seed=-1: must be at least 0"),
        ({"train_conf": {"best_metric": "wer"}}, r"best_metric: 'wer' is not measured; set train_conf.decode_utts"),
        ({"train_conf": {"ema": 1.0}}, "train_conf.ema=1.0 must be in"),
        ({"train_conf": {"deepspeed_config": "zero2.json"}}, "deepspeed_config: zero2.json .*use_deepspeed: true"),
        ({"optim": "lion"}, "optim: 'lion' is not supported; use adamw"),
    ],
)
def test_settings_that_cannot_work_are_errors_with_their_place(config, message):
    with pytest.raises(ConfigError, match=message):
        read_stages(config)


def test_a_part_that_the_model_does_not_have_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no part 'adaptor'; did you mean 'adapter'"):
        make_trainer(tmp_path, {"train": ["adaptor"]})
    with pytest.raises(ConfigError, match="optim.lr: no rate for part 'lora'"):
        make_trainer(tmp_path, {"max_steps": 1}, optim_conf={"lr": {"adapter": 1e-3}}).run()
    for lr in (-1e-3, math.nan, "fast"):
        with pytest.raises(ConfigError, match=r"optim.lr: expected a number from 0 on for part 'adapter'"):
            make_trainer(tmp_path, {"max_steps": 1}, optim_conf={"lr": lr}).run()


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, {"max_steps": 2, "dtype": "bfloat16"})
    seen = []
    trainer.model.lora.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert weights(tmp_path / "last")["lora"]["weight"].dtype == torch.float32


@pytest.mark.parametrize("length", [{"steps": 4}, {"epochs": 1}])
def test_a_stage_ends_with_a_validation_also_where_a_checkpoint_is_due(tmp_path, length):
    conf = {"stages": [{"name": "short", **length}], "save_checkpoint_interval": 2, "validate_interval": 0}
    trainer = make_trainer(tmp_path, conf, dev=True)
    assert trainer.run()
    assert trainer.state.metrics
    assert (tmp_path / "best").resolve() == (tmp_path / "last").resolve()
