"""U2ppMoE: learns, decodes alike in batches and in chunks, saves and loads, streams through AutoModel."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from funasr_mooer.auto import AutoModel
from funasr_mooer.border.build import build_model
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.model_dir import read_model_dir, write_model_dir
from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.u2pp_moe.search import METHODS

DENSE = {"mlp_type": "position_wise_feed_forward"}


def test_it_learns_to_hear_with_every_search_in_every_chunk(config, batch):
    torch.manual_seed(0)
    small = {f"{part}_conf": {**config[f"{part}_conf"], "num_blocks": 1} for part in ("encoder", "decoder")}
    model = build_model({**config, **small, "model_conf": {"lsm_weight": 0.0}}).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(200):
        loss, stats, tokens = model(**batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.05:
            break
    assert int(tokens) == 9
    assert set(stats) == {"loss", "loss_ctc", "loss_att", "acc"}
    model.eval()
    for method in METHODS:
        for chunk in (-1, 16, 4):
            results = model.decode(batch["feats"], batch["feat_lengths"], method=method, decoding_chunk_size=chunk)
            assert [result["text"] for result in results] == ["abc", "bb", "caad"], (method, chunk)
            for result in results:
                times = result["timestamp"]
                assert len(times) == len(result["tokens"]) == len(result["times"]) == len(result["tokens_confidence"])
                assert all(a < b for a, b in times)
                assert all(first[1] <= second[0] for first, second in zip(times, times[1:]))
                assert 0 < result["confidence"] <= 1


def test_a_batch_gives_what_its_utterances_give_in_any_order(config, batch):
    for encoder in ({}, {"causal": False, "use_dynamic_chunk": False, "cnn_module_norm": "batch_norm"}, DENSE):
        torch.manual_seed(0)
        model = build_model({**config, "encoder_conf": {**config["encoder_conf"], **encoder}})
        feats, lengths = batch["feats"], batch["feat_lengths"]
        turned = torch.tensor([2, 0, 1])
        for method in METHODS:
            together = model.decode(feats, lengths, method=method, beam_size=3)
            permuted = model.decode(feats[turned], lengths[turned], method=method, beam_size=3)
            for row, place in zip(range(3), (1, 2, 0)):
                (alone,) = model.decode(
                    feats[row : row + 1, : lengths[row]], lengths[row : row + 1], method=method, beam_size=3
                )
                for other in (together[row], permuted[place]):
                    assert other["nbest"] == alone["nbest"]
                    assert other["timestamp"] == alone["timestamp"]
                    assert other["score"] == pytest.approx(alone["score"], abs=1e-4)


def test_losses_of_parts_of_a_batch_add_up_by_tokens(model, batch):
    model.encoder.use_dynamic_chunk = False
    model.train()
    whole = model(**batch)[0]
    parts = [model(**{key: value[rows] for key, value in batch.items()}) for rows in (slice(0, 1), slice(1, 3))]
    total = sum(loss * count for loss, _, count in parts) / 9
    torch.testing.assert_close(total, whole, atol=1e-4, rtol=1e-5)


def test_experts_that_saw_nothing_have_a_gradient_of_zeros(model, batch):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoEFFN):
                module.gate.weight[2:] = 0
                module.gate.weight[:2] = 50 * torch.randn(1, module.gate.in_features)
                module.gate.weight[1] *= -1  # two of them win or lose together
    model.train()
    model(**batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    idle = [
        not module.w_1.grad[expert].any()
        for module in model.modules()
        if isinstance(module, MoEFFN)
        for expert in range(4)
    ]
    assert any(idle)


def test_gradient_checkpointing_routes_alike(config, batch):
    gradients = []
    for on in (False, True):
        for part in ("encoder", "decoder"):
            config[f"{part}_conf"]["gradient_checkpointing"] = on
        torch.manual_seed(0)
        model = build_model(config).train()
        torch.manual_seed(1)
        model(**batch)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_ctc_alone_is_an_objective(model, batch):
    model.set_objective("ctc")
    loss, stats, _ = model(**batch)
    assert loss == stats["loss_ctc"]
    assert "acc" not in stats
    with pytest.raises(ConfigError, match="objective 'llm' is unknown to U2ppMoE"):
        model.set_objective("llm")


def test_a_model_directory_is_whole_and_goes_on_training(model, batch, tmp_path):
    write_model_dir(model, tmp_path / "model", model.part_names)
    (tmp_path / "model").rename(tmp_path / "moved")
    other = build_model(read_model_dir(tmp_path / "moved"))
    assert other.tokenizer.file.parent == tmp_path / "moved"
    assert all(parameter.requires_grad for parameter in other.parameters())
    first, second = (m.decode(batch["feats"], batch["feat_lengths"]) for m in (model, other))
    assert first == second


@pytest.fixture
def wave():
    return np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def test_automodel_decodes_files_and_streams(model, tmp_path, wave):
    write_model_dir(model, tmp_path, model.part_names)
    auto = AutoModel(model=tmp_path)
    settings = {"method": "ctc_prefix_beam_search", "decoding_chunk_size": 4, "num_decoding_left_chunks": 2}
    (whole,) = auto.generate(input=[wave], **settings)
    assert set(whole) == {"key", "text", "timestamp", "confidence"}
    cache: dict = {}
    for start in range(0, 16000, 2000):
        (piece,) = auto.generate(input=wave[start : start + 2000], cache=cache, is_final=start == 14000, **settings)
        assert piece["is_final"] == (start == 14000)
        assert len(piece["timestamp"]) == 0 or piece["timestamp"][-1][1] <= (start + 2000) / 16
    assert (piece["text"], piece["timestamp"]) == (whole["text"], whole["timestamp"])
    with pytest.raises(DataError, match="the stream has ended"):
        auto.generate(input=wave[:2000], cache=cache, is_final=True, **settings)
    with pytest.raises(DataError, match="must have 16000 Hz"):
        auto.generate(input=wave[:2000], cache={}, fs=8000)
    with pytest.raises(ConfigError, match=r"generate\(beam_sise=...\): unknown setting; did you mean 'beam_size'"):
        auto.generate(input=[wave], beam_sise=3)


def test_audio_that_holds_nothing_gets_an_empty_text_and_says_why(model, wave):
    silence, click = np.zeros(16000, np.float32), wave[:160]  # 10 ms
    results, _ = model.inference([wave, silence, click], key=["noise", "silence", "click"], return_token_ids=True)
    assert [result["key"] for result in results] == ["noise", "silence", "click"]
    assert results[0]["token_ids"] == results[0]["tokens"]
    assert "silence" in results[1]["warning"]
    assert "shorter than one encoder frame of 40 ms" in results[2]["warning"]


def test_settings_that_cannot_work_are_errors(config, model, batch):
    audio = (batch["feats"], batch["feat_lengths"])
    with pytest.raises(ConfigError, match="decoding_chunk_size=0: a chunk holds at least 1 frame"):
        model.decode(*audio, decoding_chunk_size=0)
    with pytest.raises(ConfigError, match=r"decode\(beem_size=...\): unknown setting; did you mean 'beam_size'"):
        model.decode(*audio, beem_size=3)
    for change, message in (
        ({"encoder_conf": {"n_expert": 2, "n_expert_activated": 3}}, "n_expert_activated=3 must lie between 1 and"),
        ({"model_conf": {"ctc_weight": 1.5}}, "model_conf.ctc_weight=1.5 must lie between 0 and 1"),
        ({"model_conf": {"ctc_wait": 0.3}}, "did you mean 'ctc_weight'"),
        ({"decoder": "MoETransformerDecode"}, "did you mean 'MoETransformerDecoder'"),
        ({"tokenizer": "MooerTokenizer"}, "this model needs tokenizer: MooerUnitsTokenizer"),
        ({"decoder": "MoETransformerDecoder", "model_conf": {"reverse_weight": 0.3}}, "needs decoder: MoEBi"),
    ):
        changed = {**config, **{k: {**config.get(k, {}), **v} if isinstance(v, dict) else v for k, v in change.items()}}
        if changed["decoder"] == "MoETransformerDecoder":
            changed["decoder_conf"] = {k: v for k, v in config["decoder_conf"].items() if k != "r_num_blocks"}
        with pytest.raises(ConfigError, match=message):
            build_model(changed)
    config["encoder_conf"] |= {"use_dynamic_chunk": False}
    with pytest.raises(ConfigError, match="chunk_size=4: this encoder was made for full context"):
        build_model(config).decode(*audio, decoding_chunk_size=4)


@pytest.mark.parametrize("name", ["llm_conf", "prompt_conf", "adapter"])
def test_a_section_that_the_model_does_not_read_is_an_error(config, name):
    config[name] = {"tasks": ["asr"]} if name.endswith("_conf") else "MooerLinearAdapter"
    with pytest.raises(ConfigError, match=f"{name}: U2ppMoE does not read it; remove it, .* reads ctc_conf, decoder"):
        build_model(config)


def test_a_cache_that_holds_no_stream_is_an_error(model):
    for cache, found in (([], "list"), ("", "str"), ({"stream": 3}, "int"), (model, "U2ppMoEModel")):
        with pytest.raises(DataError, match=f"cache: pass an empty dict .* found one of type {found}"):
            model.inference([np.zeros(160, np.float32)], cache=cache)


def test_where_memory_is_short_the_config_leaves_the_packed_experts_out(config, model):
    def packs(each):
        return {module.pack for module in each.modules() if isinstance(module, MoEFFN)}

    assert packs(model) == {True}
    assert packs(build_model({**config, "model_conf": {"pack_experts": False}})) == {False}


@pytest.mark.slow
def test_stock_funasr_streams_from_a_model_directory_without_importing_us(model, tmp_path):
    write_model_dir(model, tmp_path, model.part_names)
    code = (
        "import numpy as np, funasr\n"
        f"model = funasr.AutoModel(model={str(tmp_path)!r}, device='cpu', disable_update=True, disable_pbar=True)\n"
        "wave, cache = np.random.default_rng(0).normal(0, 0.1, 16000).astype('float32'), {}\n"
        "for i in range(4):\n"
        "    result = model.generate(input=wave[4000 * i : 4000 * i + 4000], cache=cache, is_final=i == 3)\n"
        "    print('RESULT', result[0]['is_final'], repr(result[0]['text']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines == ["False", "False", "False", "True"]
