"""MooER against the original implementation, number by number.

Reads every size, key and setting from the folder of reference numbers, so another folder of the same layout runs
through unchanged. Tolerances are those that the folder's README states.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from funasr_mooer.data.audio import read_audio
from funasr_mooer.data.features import Features
from funasr_mooer.modules.adapter import LinearAdapter
from funasr_mooer.modules.splice import IGNORE_INDEX, splice_audio

FBANK, LFR, CMVN = 1e-3, 1e-3, 3e-4
FROM_FEATURES, FROM_WAVEFORM = 1e-5, 2e-4
LOSS, GRADIENT = 1e-5, 1e-5


def close(ours, reference, atol, rtol=0.0):
    torch.testing.assert_close(ours.float(), reference.float(), atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def ref(golden):
    """Every file of the folder by its name, texts and keys."""
    root = golden / "mooer"
    found = SimpleNamespace(root=root, text=json.loads((root / "text.json").read_text()))
    found.keys = found.text["keys"]
    for path in sorted((root / "golden").iterdir()):
        if path.suffix == ".safetensors":
            setattr(found, path.stem, load_file(path))
        elif path.suffix == ".json":
            setattr(found, path.stem + "_json", json.loads(path.read_text()))
    return found


@pytest.fixture(scope="module")
def model(ref, tmp_path_factory):
    """The released model of the folder, converted and loaded."""
    from funasr_mooer.border.build import load_model
    from funasr_mooer.mooer.release import to_model_dir

    out = tmp_path_factory.mktemp("released")
    to_model_dir(ref.root / "release", out, "asr", ["asr", "ast"])
    return load_model(out, "cpu")


@pytest.fixture(scope="module")
def stored(ref):
    """(feats, lengths) as the original computed them, in the order of the keys."""
    feats = [ref.frontend[f"{key}.cmvn"] for key in ref.keys]
    lengths = torch.tensor([len(f) for f in feats])
    return torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), lengths


@pytest.fixture(scope="module")
def heard(ref, model):
    """(feats, lengths) as we compute them from the waveforms."""
    return model.features.batch([read_audio(ref.root / "wav" / f"{key}.wav") for key in ref.keys])


# -- front end ------------------------------------------------------------------------------------------------


def test_front_end_equals_the_original(ref):
    plain = Features({"dither": 0.0})
    normal = Features({"dither": 0.0, "cmvn_file": str(ref.root / "release/paraformer_encoder/am.mvn")})
    for key in ref.keys:
        wave = read_audio(ref.root / "wav" / f"{key}.wav")
        fbank = plain.fbank(wave)
        close(fbank, ref.frontend[f"{key}.fbank"], FBANK)
        close(plain.lfr(fbank), ref.frontend[f"{key}.lfr"], LFR)
        close(normal(wave), ref.frontend[f"{key}.cmvn"], CMVN)


def test_stereo_at_another_rate_is_resampled_and_averaged(ref, model):
    wave = read_audio(ref.root / "wav/stereo_22k.wav")
    close(torch.as_tensor(wave), ref.frontend["stereo_22k.mono16k"], 1e-4)
    close(model.features(wave), ref.frontend["stereo_22k.cmvn"], CMVN)


def test_low_frame_rate_stacking_of_every_short_length(ref):
    for name, expected in ref.frontend.items():
        if name.startswith("lfr_toy.T"):
            T = int(name.removeprefix("lfr_toy.T"))
            close(Features({"n_mels": 2}).lfr(torch.arange(2.0 * T).view(T, 2)), expected, 0)


# -- encoder and adapter --------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(encoder):
    """Inner states of the encoder by the names that the folder gives them."""
    states = {}
    hooks = [
        encoder.embed.register_forward_hook(lambda *a: states.update(after_embed=a[-1])),
        encoder.encoders0[0].register_forward_hook(lambda *a: states.update(after_encoders0=a[-1][0])),
    ]
    yield states
    for hook in hooks:
        hook.remove()


def test_encoder_and_adapter_in_a_batch(ref, model, stored, heard):
    for (feats, lengths), atol in ((stored, FROM_FEATURES), (heard, FROM_WAVEFORM)):
        with torch.no_grad(), recorded(model.encoder) as states:
            encoder_out, encoder_lengths = model.encode(feats, lengths)
            audio_embeds, audio_lengths = model.adapter(encoder_out, encoder_lengths)
        assert encoder_lengths.tolist() == ref.infer["batch.encoder_olens"].tolist()
        for name, state in states.items():
            for row, n in enumerate(lengths):
                # embed's output is multiplied by sqrt(D), and with it the difference of the features
                scale = math.sqrt(model.encoder.output_size) if name == "after_embed" else 1
                close(state[row, :n], ref.infer[f"batch.{name}"][row, :n], atol * scale + 3e-4 * scale * (atol > 1e-4))
        close(encoder_out, ref.infer["batch.encoder_out"], atol)
        close(audio_embeds, ref.infer["batch.adapter_out"], atol)
        assert audio_lengths.tolist() == ref.train_json["batches"]["asr"]["audio_length"]


def test_encoder_and_adapter_one_by_one(ref, model):
    for key in ref.keys:
        feats = ref.frontend[f"{key}.cmvn"][None]
        with torch.no_grad():
            encoder_out, lengths = model.encode(feats, torch.tensor([feats.shape[1]]))
            audio_embeds, _ = model.adapter(encoder_out, lengths)
        close(encoder_out[0], ref.infer[f"{key}.encoder_out"], FROM_FEATURES)
        close(audio_embeds[0], ref.infer[f"{key}.adapter_out"], FROM_FEATURES)


def test_adapter_at_other_granularities(ref, golden):
    numbers = load_file(golden / "mooer/extra/granularity.safetensors")
    encoder_out, encoder_lengths = ref.infer["batch.encoder_out"], ref.infer["batch.encoder_olens"]
    for k in sorted({int(name.split(".")[0][1:]) for name in numbers}):
        expected = numbers[f"k{k}.adapter_out"]
        adapter = LinearAdapter(encoder_out.shape[-1], expected.shape[-1], frame_ms=60, granularity_ms=60 * k)
        with torch.no_grad():
            for layer, scale in ((adapter.linear1, 0.25), (adapter.linear2, 0.05)):
                i, j = (torch.arange(n, dtype=torch.float64) for n in layer.weight.shape)
                layer.weight.copy_(scale * torch.sin(0.37 * i[:, None] + 1.31 * j[None] + 0.11 * k))
                layer.bias.copy_(0.1 * torch.cos(0.7 * i))
            out, lengths = adapter(encoder_out, encoder_lengths)
        assert lengths.tolist() == numbers[f"k{k}.audio_length"].tolist()
        close(out, expected, FROM_FEATURES)


# -- prompt, masks, labels ------------------------------------------------------------------------------------


def rows(model, task, answers=None):
    """(input_ids, attention_mask, labels) of one batch: ``[audio][prompt]`` and answers, padded on the right."""
    prompt = model.prompt.ids(task)
    rows = [prompt + answer for answer in answers or [[]]]
    L = max(map(len, rows))
    ids = torch.tensor([row + [model.tokenizer.pad_id] * (L - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (L - len(row)) for row in rows]).bool()
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, : len(prompt)] = IGNORE_INDEX
    return ids, mask, labels


def answers_of(model, ref, name):
    """Answer ids of one training mode of the original, and the task whose prompt it uses."""
    encode, eos = model.tokenizer.encode, [model.tokenizer.eos_id]
    asr, ast = ([encode(ref.text[task][key]) for key in ref.keys] for task in ("asr", "ast"))
    if name == "train_asr":
        return "asr", [a + eos for a in asr]
    if name == "train_ast":
        return "ast", [b + eos for b in ast]
    pairs = zip(asr, ast) if name == "train_asr_then_ast_concat" else zip(ast, asr)
    return "ast", [a + eos + b + eos for a, b in pairs]


def spliced_ids(ids, mask, lengths, side, labels=None):
    """Splice with the ids themselves as embeddings, audio as -1: the layout that the LLM sees."""
    audio = torch.full((len(lengths), int(max(lengths)), 1), -1.0)
    out = splice_audio(ids, mask, ids[..., None].float(), audio, torch.tensor(lengths), labels, side)
    return out.inputs_embeds[..., 0].long(), out.attention_mask, out.labels


@pytest.mark.parametrize("task", ["asr", "ast"])
def test_prompts_and_masks_for_decoding(ref, model, task):
    ids, mask, _ = rows(model, task, [[]] * len(ref.keys))
    lengths = ref.train_json["batches"][task]["audio_length"]
    ids, mask, _ = spliced_ids(ids, mask, lengths, "left")
    expected = ref.collate[f"infer_{task}.input_ids"]
    assert torch.equal(mask, ref.collate[f"infer_{task}.attention_mask"])
    assert torch.equal(ids[mask], expected[mask])
    assert torch.equal((ids == -1) & mask, ref.collate[f"infer_{task}.modality_mask"])


@pytest.mark.parametrize("name", ["train_asr", "train_ast", "train_asr_then_ast_concat", "train_ast_then_asr_concat_r"])
def test_rows_and_labels_for_training(ref, model, name):
    """The original pads prompts on the left and answers on the right, we pad on the right: rows are equal."""
    task, answers = answers_of(model, ref, name)
    ids, mask, labels = rows(model, task, answers)
    lengths = ref.train_json["batches"]["asr"]["audio_length"]
    ids, mask, labels = spliced_ids(ids, mask, lengths, "right", labels)
    theirs = ref.collate[f"{name}.attention_mask"]
    assert mask.sum(1).tolist() == theirs.sum(1).tolist()
    for row in range(len(ref.keys)):
        assert ids[row][mask[row]].tolist() == ref.collate[f"{name}.input_ids"][row][theirs[row]].tolist()
        assert labels[row][mask[row]].tolist() == ref.collate[f"{name}.labels"][row][theirs[row]].tolist()
        assert (labels[row][~mask[row]] == IGNORE_INDEX).all()
    assert ref.collate[f"{name}.audio_mel_reallen"].tolist() == [len(ref.frontend[f"{k}.cmvn"]) for k in ref.keys]


# -- the LLM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["asr", "ast"])
def test_embeddings_and_logits_for_decoding(ref, model, stored, heard, task):
    for (feats, lengths), atol in ((stored, FROM_FEATURES), (heard, FROM_WAVEFORM)):
        ids, mask, _ = rows(model, task, [[]] * len(ref.keys))
        with torch.no_grad():
            audio, audio_lengths = model.hear(feats, lengths)
            out = splice_audio(ids, mask, model.llm.embed(ids), audio, audio_lengths, padding_side="left")
            logits = model.llm.model(inputs_embeds=out.inputs_embeds, attention_mask=out.attention_mask.long()).logits
        where = ref.infer[f"{task}.attention_mask"]
        assert torch.equal(out.attention_mask, where)
        close(out.inputs_embeds[where], ref.infer[f"{task}.inputs_embeds"][where], atol)
        # merged and unmerged LoRA differ by rounding: the README allows the logits that much more
        merged = json.loads((ref.root / "manifest.json").read_text())["max_abs_diff_merged_vs_unmerged_logits"]
        expected = ref.infer[f"{task}.logits"]
        if expected.dim() == 3:
            close(logits[where], expected[where], 2 * atol + merged)
        close(logits[:, -1], ref.infer[f"{task}.next_token_logits"], 2 * atol + merged)


def training_batch(ref, model, stored, name="train_asr"):
    task, answers = answers_of(model, ref, name)
    ids, mask, labels = rows(model, task, answers)
    feats, lengths = stored
    return {"feats": feats, "feat_lengths": lengths, "input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def trainable(ref, tmp_path):
    """A fresh model whose LoRA and adapter train; dropout off, as where the reference was made."""
    from funasr_mooer.border.build import load_model
    from funasr_mooer.mooer.release import to_model_dir

    to_model_dir(ref.root / "release", tmp_path, "asr", ["asr", "ast"])
    model = load_model(tmp_path, "cpu")
    model.train_parts(["adapter", "lora"])
    return model.eval()


@pytest.mark.parametrize("task", ["asr", "ast"])
def test_loss_and_accuracy(ref, trainable, stored, task):
    loss, stats, weight = trainable(**training_batch(ref, trainable, stored, f"train_{task}"))
    assert loss.item() == pytest.approx(ref.train_json[task]["loss"], abs=LOSS)
    assert stats["acc"].item() == pytest.approx(ref.train_json[task]["acc"], abs=1e-6)
    assert int(weight) == ref.train_json[task]["target_tokens"]


def test_training_logits_at_labels(ref, trainable, stored):
    batch = training_batch(ref, trainable, stored)
    with torch.no_grad():
        audio, audio_lengths = trainable.hear(batch["feats"], batch["feat_lengths"])
        out = splice_audio(
            batch["input_ids"],
            batch["attention_mask"],
            trainable.llm.embed(batch["input_ids"]),
            audio,
            audio_lengths,
            batch["labels"],
        )
        hidden, targets = trainable.llm.labelled_states(out.inputs_embeds, out.labels)
        logits = trainable.llm.model.get_output_embeddings()(hidden)
    labels = ref.collate["train_asr.labels"]
    chosen = labels[:, 1:] != IGNORE_INDEX
    assert torch.equal(targets, labels[:, 1:][chosen])
    close(logits, ref.train["asr.logits"][:, :-1][chosen], 2 * FROM_FEATURES)


def original_name(name):
    """Our parameter names as the original's."""
    return name.replace("llm.model.", "llm.").replace("adapter.linear", "encoder_projector.linear")


def test_every_gradient(ref, trainable, stored):
    loss, _, _ = trainable(**training_batch(ref, trainable, stored))
    loss.backward()
    ours = {original_name(name): p.grad for name, p in trainable.named_parameters() if p.requires_grad}
    theirs = {name.removeprefix("asr.grad."): g for name, g in ref.train.items() if name.startswith("asr.grad.")}
    norms = ref.train_json["grad_norm_per_parameter_asr"]
    assert sorted(ours) == sorted(ref.train_json["trainable_parameter_names"]) == sorted(norms)
    assert theirs
    for name, gradient in theirs.items():
        close(ours[name], gradient, GRADIENT, rtol=1e-4)
    for name, norm in norms.items():  # of those too whose values are not in the folder
        assert ours[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    assert sum(g.numel() for g in ours.values()) == ref.train_json["trainable_parameters"]


def test_adamw_trajectory(ref, trainable, stored):
    expected = ref.train_json["adamw_trajectory_asr"]
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    settings = {key: expected[key] for key in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, betas=tuple(expected["betas"]), **settings)
    batch = training_batch(ref, trainable, stored)
    for step in expected["before_each_step"]:
        loss, stats, _ = trainable(**batch)
        assert loss.item() == pytest.approx(step["loss"], abs=LOSS)
        assert stats["acc"].item() == pytest.approx(step["acc"], abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- decoding -------------------------------------------------------------------------------------------------


def decoded(ref, name):
    """Ids without padding and texts of one entry of generate.json, as lists over utterances."""
    entry = ref.generate_json[name]
    ids = entry["ids"] if isinstance(entry["ids"][0], list) else [entry["ids"]]
    eos = ref.generate_json["settings"]["eos_token_id"]
    ids = [row[: row.index(eos) + 1] if eos in row else row for row in ids]
    text = entry.get("text")
    return ids, [text] if isinstance(text, str) else text, entry.get("sequences_scores")


def settings_of(ref, beams, **changed):
    settings = ref.generate_json["settings"]
    conf = {key: settings[key] for key in ("max_new_tokens", "min_length", "repetition_penalty", "length_penalty")}
    return {**conf, "eos_bias": settings["sequence_bias"][0][1], "num_beams": beams, **changed}


@pytest.mark.parametrize("source", ["stored", "heard"])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("task", ["asr", "ast"])
def test_decoding_gives_the_same_ids(ref, model, request, task, beams, source):
    from funasr_mooer.mooer.generate import decode_conf

    feats, lengths = request.getfixturevalue(source)
    conf = decode_conf(settings_of(ref, beams))
    results = model.decode(feats, lengths, task, conf)
    ids, texts, scores = decoded(ref, f"{task}.batch.beam{beams}")
    assert [r["token_ids"] for r in results] == ids
    assert [r["text"] for r in results] == [text.strip() for text in texts]
    if scores is not None:
        assert [r["score"] for r in results] == pytest.approx(scores, abs=1e-4)
    for row, key in enumerate(ref.keys):
        n = int(lengths[row])
        (single,) = model.decode(feats[row : row + 1, :n], lengths[row : row + 1], task, conf)
        assert [single["token_ids"]] == decoded(ref, f"{task}.{key}.beam{beams}")[0] == [ids[row]]


def test_beam_search_without_bias_for_contrast(ref, model, stored):
    from funasr_mooer.mooer.generate import decode_conf

    for name in ref.generate_json:
        if name.endswith("beam4_no_bias_lp1"):
            conf = decode_conf(settings_of(ref, 4, eos_bias=0.0, length_penalty=1.0))
            results = model.decode(*stored, name.split(".")[0], conf)
            assert [r["token_ids"] for r in results] == decoded(ref, name)[0]


# -- stock FunASR ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("task", ["asr", "ast"])
def test_stock_automodel_gives_the_same_ids(ref, stock_model, task, beams):
    wavs = [str(ref.root / "wav" / f"{key}.wav") for key in ref.keys]
    results = stock_model.generate(
        input=wavs, task=task, num_beams=beams, max_new_tokens=24, batch_size=3, return_token_ids=True
    )
    ids, texts, _ = decoded(ref, f"{task}.batch.beam{beams}")
    assert [r["key"] for r in results] == ref.keys
    assert [r["token_ids"] for r in results] == ids
    assert [r["text"] for r in results] == [text.strip() for text in texts]


@pytest.fixture(scope="module")
def stock_model(ref, tmp_path_factory):
    """The converted release in FunASR's own AutoModel."""
    import funasr

    from funasr_mooer.mooer.release import to_model_dir

    out = tmp_path_factory.mktemp("stock")
    to_model_dir(ref.root / "release", out, "asr", ["asr", "ast"])
    return funasr.AutoModel(model=str(out), device="cpu", disable_update=True, disable_pbar=True)


def test_release_survives_the_way_there_and_back(ref, model, tmp_path):
    from funasr_mooer import weights
    from funasr_mooer.mooer.release import to_model_dir, to_release

    to_model_dir(ref.root / "release", tmp_path / "dir", "asr")
    assert to_release(tmp_path / "dir", tmp_path / "release") == "asr"
    for original in sorted((ref.root / "release").rglob("*")):
        if original.suffix in (".pth", ".pt", ".bin"):
            back = tmp_path / "release" / original.relative_to(ref.root / "release")
            ours, theirs = weights.read_tensors(back), weights.read_tensors(original)
            assert list(ours) == list(theirs) or sorted(ours) == sorted(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), original
    assert (tmp_path / "release/paraformer_encoder/am.mvn").read_bytes() == (
        ref.root / "release/paraformer_encoder/am.mvn"
    ).read_bytes()


def test_names_are_the_originals(ref, model):
    names = json.loads((ref.root / "manifest.json").read_text())["names"]
    assert sorted(model.encoder.state_dict()) == sorted(names["paraformer_encoder_pth"])
    ours = {original_name(n) for n, _ in model.named_parameters() if ".lora_" in n}
    assert ours >= set(names["lora_trainable_parameters_inside_MooerModel"]) - {
        n for n in names["lora_trainable_parameters_inside_MooerModel"] if "lora_" not in n
    }
    assert Path(model.llm.init).is_dir()
