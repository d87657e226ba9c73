"""MooER as a whole, tiny and random: training contract, freezing, decoding, and what is refused."""

import logging

import numpy as np
import pytest
import torch

from funasr_mooer import weights
from funasr_mooer.border.build import build_model, load_model
from funasr_mooer.data.batch import one_row
from funasr_mooer.errors import CheckpointError, ConfigError, DataError
from funasr_mooer.model_dir import read_model_dir, write_model_dir
from funasr_mooer.modules.splice import IGNORE_INDEX


def speech(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(1)
    return build_model(tiny_config)


def batch(model, texts=("turn on the light", "zero one")):
    prompt = model.prompt.ids("asr")
    answers = [model.tokenizer.encode(text) + [model.tokenizer.eos_id] for text in texts]
    L = len(prompt) + max(map(len, answers))
    ids = torch.full((len(texts), L), model.tokenizer.pad_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids).bool()
    for row, answer in enumerate(answers):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        mask[row, : len(prompt) + len(answer)] = True
    feats, lengths = model.features.batch([speech(1.5, row) for row in range(len(texts))])
    transcript = torch.nn.utils.rnn.pad_sequence([torch.tensor(a[:-1]) for a in answers], batch_first=True)
    return {
        "feats": feats,
        "feat_lengths": lengths,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "transcript_ids": transcript,
        "transcript_lengths": torch.tensor([len(a) - 1 for a in answers]),
    }


def test_loss_is_the_mean_over_labels(model):
    inputs = batch(model)
    loss, stats, weight = model(**inputs)
    assert int(weight) == int((inputs["labels"] != IGNORE_INDEX).sum())
    assert set(stats) == {"loss", "acc"}
    assert not stats["loss"].requires_grad
    alone = [model(**{k: v[row : row + 1] for k, v in inputs.items()}) for row in range(2)]
    torch.testing.assert_close(loss, sum(part * w for part, _, w in alone) / weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [["adapter"], ["adapter", "lora", "encoder"]])
def test_a_packed_row_has_the_loss_and_gradients_of_the_padded_batch(tiny_config, parts, checkpointing):
    tiny_config["llm_conf"] |= {"gradient_checkpointing": checkpointing}
    tiny_config["encoder_conf"] |= {"gradient_checkpointing": checkpointing}
    tiny_config["encoder_conf"] |= {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    tiny_config["llm_conf"]["lora"] |= {"dropout": 0.0}
    torch.manual_seed(1)
    model = build_model(tiny_config).double()  # the encoder's positions and the loss stay float32
    for parameter in model.parts["lora"]:
        torch.nn.init.normal_(parameter, std=0.1)
    model.train_parts(parts)
    model.train()
    padded = batch(model, ["turn on the light", "zero", "one two zero one two zero"])
    rows = {name: padded[name] for name in ("input_ids", "attention_mask", "labels")}
    packed = {**padded, **one_row(rows)}
    found = []
    for inputs in (padded, packed):
        model.zero_grad(set_to_none=True)
        loss, stats, weight = model(**inputs)
        loss.backward()
        found.append([loss, stats["acc"], weight, *[p.grad for part in parts for p in model.parts[part]]])
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_in_bfloat16_features_positions_loras_and_the_loss_stay_float32(tiny_config):
    tiny_config["llm_conf"] |= {"dtype": "bfloat16"}
    model, seen = build_model(tiny_config).train(), {}
    model.encoder.embed.register_forward_hook(lambda _, given, out: seen.update(feats=given[0].dtype, places=out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = model(**batch(model))
    loss.backward()
    assert seen == {"feats": torch.float32, "places": torch.float32}
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parts["lora"] + model.parts["adapter"]} == {torch.float32}


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_decoding_compiles_nothing_more(tiny_config):
    from funasr_mooer.train.validate import compiling_nothing

    tiny_config["llm_conf"]["lora"] |= {"dropout": 0.0}
    model = build_model(tiny_config).train()
    padded = batch(model)
    packed = {**padded, **one_row({name: padded[name] for name in ("input_ids", "attention_mask", "labels")})}

    def gradients():
        model.zero_grad(set_to_none=True)
        model(**packed)[0].backward()
        model(**padded)[0].backward()
        return [p.grad for p in model.parts["adapter"] + model.parts["lora"]]

    expected = gradients()
    text = model.eval().inference([speech(1)], task="asr")[0]
    model.train().compile_layers()
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)
    with compiling_nothing():
        assert model.eval().inference([speech(1)], task="asr")[0] == text


def test_a_packed_row_is_refused_by_kernels_that_would_mix_its_utterances(tiny_config):
    tiny_config["llm_conf"] |= {"attention": "eager"}
    model = build_model(tiny_config)
    inputs = batch(model)
    inputs |= one_row({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
    with pytest.raises(ConfigError, match="llm_conf.attention: eager; use sdpa or flash_attention_2"):
        model(**inputs)


@pytest.mark.parametrize("part", ["adapter", "lora"])
def test_gradient_checkpointing_of_the_llm_works_while_it_is_frozen_too(tiny_config, part):
    tiny_config["llm_conf"] |= {"gradient_checkpointing": True}
    model = build_model(tiny_config)
    model.train_parts([part])
    model.train()
    calls = []
    mlp = model.llm.model.base_model.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(mlp.training))
    loss, _, _ = model(**batch(model))
    assert len(calls) == 1
    loss.backward()
    assert calls == [part == "lora"] * 2  # computed again, and without dropout where nothing of the LLM is trained


def test_only_the_chosen_parts_train_and_frozen_ones_stay_in_evaluation_mode(model):
    model.train_parts(["adapter", "lora"])
    model.train()
    assert not model.encoder.training
    assert model.adapter.training
    assert model.llm.training
    model(**batch(model))[0].backward()
    assert all(p.grad is not None for p in model.parts["adapter"] + model.parts["lora"])
    assert all(p.grad is None for p in model.parts["encoder"] + model.parts["llm"])
    model.train_parts(["adapter"])
    model.train()
    assert not model.llm.training


def test_a_part_that_does_not_exist_is_named(model):
    with pytest.raises(ConfigError, match="cannot train part 'adaptor'; did you mean 'adapter'"):
        model.train_parts(["adaptor"])


def test_adapter_warm_up_teaches_the_adapter_alone(model):
    model.set_objective("adapter_ctc")
    model.train_parts(["adapter"])
    optimizer = torch.optim.AdamW(model.parts["adapter"], lr=3e-3)
    inputs, losses = batch(model), []
    for _ in range(30):
        loss, _, _ = model(**inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ConfigError, match="did you mean 'adapter_ctc'"):
        model.set_objective("adapter-ctc")


def test_batch_decoding_equals_single_decoding(model):
    waves = [speech(0.8, 1), speech(2.1, 2), speech(1.3, 3)]
    for beams in (1, 3):
        together, _ = model.inference(waves, key=list("abc"), task="asr", num_beams=beams, return_token_ids=True)
        for wave, result in zip(waves, together):
            alone, _ = model.inference([wave], key=[result["key"]], task="asr", num_beams=beams, return_token_ids=True)
            assert alone[0]["token_ids"] == result["token_ids"]


def test_silence_and_audio_too_short_are_answered_empty_with_a_reason(model):
    results, _ = model.inference([np.zeros(16000, np.float32), speech(0.06), speech(0.01), speech(1)], task="asr")
    assert [r["text"] for r in results[:3]] == ["", "", ""]
    assert "silence" in results[0]["warning"]
    assert "shorter than one embedding of 120 ms" in results[1]["warning"]
    assert "shorter than" in results[2]["warning"]
    assert "warning" not in results[3]


def test_long_audio_is_refused_with_the_way_out(model):
    with pytest.raises(DataError, match=r'long: lasts 31.0 s, .* at most 30 s .*vad_model="silero-vad"'):
        model.inference([speech(31)], key=["long"], task="asr")


def test_a_task_must_be_named_where_there_are_several(model):
    with pytest.raises(ConfigError, match="task=one of asr, ast"):
        model.inference([speech(1)])


def test_text_is_streamed_while_it_is_decoded(model):
    seen = []
    results, _ = model.inference([speech(1)], task="asr", on_text=seen.append, num_beams=1, max_new_tokens=4)
    assert 1 <= len(seen) <= 4
    assert seen[-1][0].strip() == results[0]["text"]
    with pytest.raises(ConfigError, match="num_beams=1, not 2"):
        model.inference([speech(1)], task="asr", on_text=seen.append, num_beams=2)


@pytest.mark.parametrize(
    "audio",
    [speech(1), torch.tensor(speech(1)), np.stack([speech(1), speech(1)]), (speech(1) * 32767).astype(np.int16)],
)
def test_audio_comes_in_many_shapes(model, audio):
    (result,), _ = model.inference([audio], task="asr")
    assert isinstance(result["text"], str)
    with pytest.raises(DataError, match="cannot take audio from a dict"):
        model.inference([{}], task="asr")


# -- model directories ----------------------------------------------------------------------------------------


def test_a_model_directory_gives_the_same_logits_wherever_it_lies(model, tmp_path):
    write_model_dir(model, tmp_path / "a" / "dir", ["encoder", "adapter", "lora"])
    (tmp_path / "a").rename(tmp_path / "b")
    again = load_model(tmp_path / "b" / "dir", "cpu")
    inputs = batch(model)
    torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0], atol=0, rtol=0)


def test_lora_that_is_loaded_goes_on_training(model, tmp_path):
    write_model_dir(model, tmp_path, ["encoder", "adapter", "lora"])
    again = load_model(tmp_path, "cpu")
    assert sum(p.requires_grad for p in again.parts["lora"]) == len(model.parts["lora"]) > 0
    before = [p.clone() for p in again.parts["lora"]]
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    again(**batch(again))[0].backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, again.parts["lora"]))


@pytest.mark.parametrize("part", ["encoder", "adapter"])
def test_a_missing_tensor_is_never_left_random(model, tmp_path, part):
    write_model_dir(model, tmp_path, ["encoder", "adapter", "lora"])
    file = tmp_path / f"{part}.safetensors"
    tensors = weights.read_tensors(file)
    name = sorted(tensors)[0]
    del tensors[name]
    weights.save_tensors(tensors, file)
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        load_model(tmp_path, "cpu")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{part}_conf.init: .* does not exist"):
        load_model(tmp_path, "cpu")


def test_lora_of_another_rank_says_which(model, tmp_path):
    model.llm.save_lora(tmp_path)
    conf = tmp_path / "adapter_config.json"
    conf.write_text(conf.read_text().replace('"r": 4', '"r": 2'))
    config = read_config(model)
    config["llm_conf"]["lora"] = {"init": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"LoRA tensors have r=4, the model has r=2; set llm_conf.lora.r: 4"):
        build_model(config)


def test_base_weights_other_than_those_trained_on_are_refused(model, tmp_path):
    config = read_config(model)
    config["llm_conf"]["fingerprint"] = "0123456789abcdef"
    with pytest.raises(CheckpointError, match="the model was trained on 0123456789abcdef"):
        build_model(config)


def test_wrong_paths_stop_at_the_door(tiny_config, tmp_path):
    for section, key in (("llm_conf", "init"), ("tokenizer_conf", "init"), ("encoder_conf", "init")):
        config = {**tiny_config, section: {**tiny_config[section], key: str(tmp_path / "nowhere")}}
        with pytest.raises(CheckpointError, match="nowhere"):
            build_model(config)


def test_misspelt_keys_are_suggested(tiny_config):
    config = {**tiny_config, "adapter_conf": {"granularty_ms": 120}}
    with pytest.raises(ConfigError, match=r"adapter_conf.granularty_ms: unknown key; did you mean 'granularity_ms'"):
        build_model(config)
    with pytest.raises(ConfigError, match="dataset_cnf: is no section of a config; did you mean 'dataset_conf'"):
        build_model({**tiny_config, "dataset_cnf": {}})
    with pytest.raises(ConfigError, match="endpoint_conf: MooER does not read it; remove it"):
        build_model({**tiny_config, "endpoint_conf": {}})
    with pytest.raises(ConfigError, match="decode_conf.num_beam: unknown key; did you mean 'num_beams'"):
        build_model({**tiny_config, "decode_conf": {"num_beam": 4}})
    with pytest.raises(ConfigError, match="encoder_conf.init: expected a path, found 7"):
        build_model({**tiny_config, "encoder_conf": {"init": 7}})
    with pytest.raises(ConfigError, match="encoder: 'MooerParaformer' is not registered; did you mean"):
        build_model({**tiny_config, "encoder": "MooerParaformer"})


def test_a_pickle_with_code_is_refused(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("pwned",))

    torch.save({"linear1.weight": Evil()}, tmp_path / "adapter_project.pt")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        weights.read_tensors(tmp_path / "adapter_project.pt")


def read_config(model):
    import copy

    return copy.deepcopy(model.config)


def test_config_of_a_model_directory_can_be_overridden(model, tmp_path):
    write_model_dir(model, tmp_path, ["adapter", "lora"])
    config = read_model_dir(tmp_path, ["++decode_conf.num_beams=2"])
    assert config["decode_conf"]["num_beams"] == 2


def test_warnings_reach_the_log(model, caplog):
    with caplog.at_level(logging.WARNING, "funasr_mooer"):
        model.inference([np.zeros(16000, np.float32)], key=["quiet"], task="asr")
    assert "quiet: silence" in caplog.text


def test_other_language_models_of_transformers_work_as_well(tiny_config, tiny_llm, tmp_path):
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    for file in tiny_llm.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=48, intermediate_size=64, head_dim=8, **sizes)).save_pretrained(tmp_path)
    model = build_model({**tiny_config, "llm_conf": {"init": str(tmp_path), "lora": {"r": 2}}})
    model(**batch(model))[0].backward()
    assert all(p.grad is not None for p in model.parts["lora"])
    assert model.inference([speech(1)], task="asr", num_beams=2)[0][0]["text"] is not None
