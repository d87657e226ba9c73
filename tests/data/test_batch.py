"""Batches: the layout of a row, the draw of tasks, the loader's order and its errors."""

import shutil

import numpy as np
import pytest
import torch

from funasr_mooer.config import section
from funasr_mooer.data.augment import Augment, AugmentConf
from funasr_mooer.data.batch import Example, TaskDraw, collate, uniform
from funasr_mooer.data.corpus import Corpus, DatasetConf
from funasr_mooer.data.features import Features
from funasr_mooer.data.loader import build_loader, build_sampler
from funasr_mooer.data.shards import Pack
from funasr_mooer.errors import ConfigError, DataError

FEATURES = Features()


def audio_lengths(samples):
    return FEATURES.num_frames(np.asarray(samples)) // 2


def conf(**values):
    return section(
        DatasetConf, {"budget": 200, "num_workers": 0, "tasks": {"asr": 1, "ast": 1}, **values}, "dataset_conf"
    )


@pytest.fixture
def load(fakes, pack_dir):
    def build(packs=(pack_dir,), prompt=True, seed=0, training=True, **values):
        prompt = fakes.Prompt() if prompt else None
        return build_loader(
            conf(**values), packs, FEATURES, fakes.Tokenizer(), prompt, audio_lengths, seed=seed, training=training
        )

    return build


def same(a, b):
    assert a.utt_ids == b.utt_ids
    assert a.tasks == b.tasks
    for name in a.inputs:
        assert torch.equal(a.inputs[name], b.inputs[name]), name


def test_a_row_is_audio_prompt_answer_and_only_the_answer_is_labelled(fakes):
    x = fakes.tone(1)
    examples = [
        Example("a", 0, x, {"text": np.array([10, 11, 12], np.uint32)}, "asr"),
        Example("b", 1, x[:8000], {"text": np.array([20]), "text.en": np.array([30, 31])}, "ast"),
    ]
    batch = collate(examples, FEATURES, fakes.Prompt(), pad_id=0)
    prompt = [-1, 300, 301, 302, 303, 304, 305]
    no = [-100] * len(prompt)
    assert batch.inputs["input_ids"].tolist() == [[*prompt, 10, 11, 12, 1], [*prompt, 30, 31, 1, 0]]
    assert batch.inputs["labels"].tolist() == [[*no, 10, 11, 12, 1], [*no, 30, 31, 1, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[True] * 11, [True] * 10 + [False]]
    assert batch.inputs["transcript_ids"].tolist() == [[10, 11, 12], [20, 0, 0]]
    assert batch.inputs["transcript_lengths"].tolist() == [3, 1]
    assert batch.inputs["feat_lengths"].tolist() == [17, 8]
    assert torch.equal(batch.inputs["feats"][0], FEATURES(x))
    assert (batch.weight, batch.audio_s, batch.frames, batch.padded_frames) == (7, 1.5, 25, 34)


def test_lengths_are_rounded_up_and_change_nothing_else(fakes):
    examples = [Example("a", 0, fakes.tone(1), {"text": np.array([10])}, "asr")]
    a, b = (collate(examples, FEATURES, fakes.Prompt(), 0, multiple=m) for m in (1, 16))
    assert b.inputs["feats"].shape[1] % 16 == b.inputs["input_ids"].shape[1] % 16 == 0
    assert torch.equal(b.inputs["feats"][:, : a.frames], a.inputs["feats"])
    assert a.weight == b.weight


def test_a_packed_batch_is_one_row_without_padding(fakes):
    words = {"text": np.array([10, 11]), "text.en": np.array([12])}
    examples = [Example("a", 0, fakes.tone(1), words, "asr"), Example("b", 1, fakes.tone(0.5), words, "ast")]
    rows = collate(examples, FEATURES, fakes.Prompt(), pad_id=0).inputs
    packed = collate(examples, FEATURES, fakes.Prompt(), pad_id=0, multiple=16, packed=True).inputs
    mask = rows["attention_mask"]
    assert packed["input_ids"].tolist() == [rows["input_ids"][mask].tolist()]
    assert packed["labels"].tolist() == [rows["labels"][mask].tolist()]
    assert packed["segments"].tolist() == [[1] * int(mask[0].sum()) + [2] * int(mask[1].sum())]
    assert packed["attention_mask"].all()
    assert packed["feats"].shape[:2] == (2, 32)


def test_packed_rows_fill_the_budget_and_lose_no_utterance(load):
    loader = load(packing=True, budget=300)
    batches = list(loader.epoch(1))
    assert sorted(u for batch in batches for u in batch.utt_ids) == [f"utt{i:03d}" for i in range(24)]
    positions = [b.inputs["input_ids"].shape[1] + int((b.inputs["feat_lengths"] // 2 - 1).sum()) for b in batches]
    assert max(positions) <= 300
    for a, b in zip(batches[1:], load(packing=True, budget=300).epoch(1, start_step=1), strict=True):
        same(a, b)
    with pytest.raises(ConfigError, match="packing: needs a model with an LLM"):
        load(packing=True, prompt=False)
    with pytest.raises(ConfigError, match="packing: a row is filled with positions"):
        conf(packing=True, budget_unit="frames")


def test_ctc_batches_hold_features_and_transcripts_only(load):
    batch = next(iter(load(prompt=False)))
    assert set(batch.inputs) == {"feats", "feat_lengths", "transcript_ids", "transcript_lengths"}
    assert batch.weight == batch.inputs["transcript_lengths"].sum()


def test_tasks_are_drawn_by_weight_among_those_an_utterance_can_have(fakes):
    draw = TaskDraw(fakes.Prompt(), {"asr": 3.0, "ast": 1.0}, seed=1)
    drawn = [draw(["text", "text.en"], 0, i) for i in range(4000)]
    assert drawn.count("asr") / 4000 == pytest.approx(0.75, abs=0.03)
    assert {draw(["text"], 0, i) for i in range(50)} == {"asr"}
    assert drawn == [draw(["text", "text.en"], 0, i) for i in range(4000)]
    assert drawn != [draw(["text", "text.en"], 1, i) for i in range(4000)]
    with pytest.raises(ConfigError, match=r"dataset_conf.tasks.asrr: not a task.*did you mean 'asr'"):
        TaskDraw(fakes.Prompt(), {"asrr": 1.0})


def test_the_cheap_random_numbers_are_uniform():
    x = np.array([uniform(s, e, i) for s in range(3) for e in range(3) for i in range(1000)])
    assert 0 <= x.min() < x.max() < 1
    counts = np.histogram(x, 10, (0, 1))[0]
    assert counts.min() > 800
    assert counts.max() < 1000
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.03


def test_an_epoch_visits_every_utterance_once_inside_the_budget(load):
    loader = load(tasks={"asr": 1, "ast": 1, "asr_ast": 1})
    seen = []
    for batch in loader.epoch(1):
        seen += batch.utt_ids
        positions = (
            batch.inputs["attention_mask"].sum(1) - 1 + torch.from_numpy(batch.inputs["feat_lengths"].numpy() // 2)
        )
        assert len(batch.utt_ids) * int(positions.max()) <= 200
        assert batch.weight == (batch.inputs["labels"] != -100).sum()
    assert sorted(seen) == [f"utt{i:03d}" for i in range(24)]
    assert loader.steps(1) == len(list(loader.epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_continues_in_the_middle_of_an_epoch_exactly(load, workers):
    augment = {"speed": [0.9, 1.1], "gain_db": 3, "freq_masks": 1, "time_masks": 1}
    whole = list(load(augment=augment).epoch(2))
    loader = load(augment=augment, num_workers=workers)
    next(iter(loader.epoch(0)))  # abandoned
    rest = list(loader.epoch(2, start_step=3))
    assert len(rest) == len(whole) - 3
    for a, b in zip(whole[3:], rest, strict=True):
        same(a, b)


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"freq_masks": 2, "time_masks": 2, "sub_spans": 2, "trim_ms": 300},
        {"speed": [0.9, 1.1], "gain_db": 3, "noise_snr_db": [5, 20], "time_masks": 1},
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_features_made_on_the_device_are_those_of_the_workers(load, augment, workers):
    batches = [
        list(load(augment=augment, features=where, num_workers=workers, length_multiple=8).epoch(1))
        for where in ("worker", "device")
    ]
    for a, b in zip(*batches, strict=True):
        assert set(a.inputs) == set(b.inputs)
        assert (a.utt_ids, a.tasks, a.frames, a.padded_frames) == (b.utt_ids, b.tasks, b.frames, b.padded_frames)
        torch.testing.assert_close(a.inputs["feats"], b.inputs["feats"], atol=1e-4, rtol=0)
        assert ((a.inputs["feats"] == 0) == (b.inputs["feats"] == 0)).all()
        for name in set(a.inputs) - {"feats"}:
            assert torch.equal(a.inputs[name], b.inputs[name]), name


def test_workers_ship_16_bit_samples_when_a_device_makes_the_features(load):
    plain, changed = load(features="device"), load(features="device", augment={"gain_db": 3})
    indices = next(plain.sampler.batches(0))
    batch = plain.corpus[0, indices]
    assert batch.inputs["waves"].dtype == torch.int16
    assert batch.audio_s == batch.inputs["wave_lengths"].sum() / 16000
    assert changed.corpus[0, indices].inputs["waves"].dtype == torch.float32


def test_ranks_share_the_epoch_and_the_world_may_change(load):
    loader = load()
    first = [b for rank in range(2) for b in list(loader.epoch(0, 0, rank, 2))[:2]]
    rest = [b for rank in range(3) for b in loader.epoch(0, rank=rank, world=3, start_batch=4)]
    assert sorted(u for b in first + rest for u in b.utt_ids) == [f"utt{i:03d}" for i in range(24)]
    assert len(list(loader.epoch(0, 1, 0, 2))) == loader.steps(0, 2) - 1


def test_epochs_and_seeds_differ_and_validation_does_not(load):
    ids = [[b.utt_ids for b in load(seed=seed).epoch(epoch)] for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert ids[0] != ids[1]
    assert ids[0] != ids[2]
    dev = load(training=False, augment={"gain_db": 3})
    assert [b.utt_ids for b in dev.epoch(0)] == [b.utt_ids for b in dev.epoch(1)]


def test_packs_are_mixed_by_weight_and_task(load, pack_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    packs = [shutil.copytree(pack_dir, tmp_path / name / "train") for name in ("clean", "pseudo")]
    corpora = {"clean/train": 2, "pseudo/train": {"weight": 0.5, "tasks": {"asr": 1}}}
    epochs = [list(load(packs, corpora=corpora).epoch(epoch)) for epoch in range(2)]
    assert [len([u for b in epoch for u in b.utt_ids]) for epoch in epochs] == [2 * 24 + 12] * 2
    tasks = [task for epoch in epochs for b in epoch for task in b.tasks]
    assert 0 < tasks.count("ast") < 48  # of the clean ones, half of which have English
    assert "clean/train 0.01 h x 2: 80.0 % of an epoch" in caplog.text
    assert [u for b in load(packs, corpora={"pseudo/train": 0}) for u in b.utt_ids].count("utt001") == 1
    assert len([u for b in load(packs, corpora=corpora, training=False) for u in b.utt_ids]) == 48


def test_names_of_corpora_that_fit_nothing_or_too_much_are_refused(load, pack_dir, tmp_path):
    packs = [shutil.copytree(pack_dir, tmp_path / name / "train") for name in ("clean", "pseudo")]
    with pytest.raises(ConfigError, match=r"corpora\.trian: no pack ends like that; did you mean 'train'"):
        load(packs, corpora={"trian": 1})
    with pytest.raises(ConfigError, match=r"corpora\.train: fits .*clean.*pseudo.*; write more of the path"):
        load(packs, corpora={"train": 1})
    with pytest.raises(ConfigError, match=r"clean/train and .* are one pack"):
        load(packs, corpora={"clean/train": 1, f"{tmp_path.name}/clean/train": 2})
    with pytest.raises(ConfigError, match="weight -1"):
        load(packs, corpora={"clean/train": -1})
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        load(packs, corpora={"clean/train": {"wieght": 2}})


def test_what_cannot_be_trained_on_is_left_out_and_named(load, caplog):
    caplog.set_level("INFO")
    kept = [u for b in load(max_duration_s=2, tasks={"ast": 1}) for u in b.utt_ids]
    assert 0 < len(kept) < 12
    assert all(int(u[-3:]) % 2 == 0 for u in kept)
    assert f"train {len(kept)} utts" in caplog.text
    assert "utt001" in caplog.text
    with pytest.raises(ConfigError, match="no utterances to sample"):
        load(max_duration_s=0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_audio_is_named_replaced_and_stops_above_the_limit(load, pack_dir, tmp_path, workers):
    copy = tmp_path / "pack"
    shutil.copytree(pack_dir, copy)
    pack = Pack(copy)
    with open(copy / "shard_000000.tar", "r+b") as file:
        file.seek(int(pack.records[4]["offset"]) * 512)
        file.write(b"damaged audio")
    loader = load([copy], max_bad=0.1, num_workers=workers)
    seen = [u for b in loader for u in b.utt_ids]
    assert len(seen) == 24
    assert "utt004" not in seen
    assert list(loader.bad)[0].startswith("utterance 4: ")
    with pytest.raises(DataError, match=r"loading: 1 problems in 24(.|\n)*utterance 4"):
        list(load([copy], max_bad=0.01, num_workers=workers))


def test_costs_are_the_positions_of_the_longest_possible_row(fakes, pack_dir):
    corpus = Corpus(conf(tasks={"asr": 1, "asr_ast": 1}), [pack_dir], FEATURES, fakes.Tokenizer(), fakes.Prompt())
    costs, pack = corpus.costs(audio_lengths)[:], corpus.packs[0]
    for i in range(24):
        tokens = {k: v.tolist() for k, v in pack.tokens(i).items()}
        rows = [
            len(corpus.prompt.ids(task)) - 1 + len(corpus.prompt.answer_ids(task, tokens))
            for task in corpus.draws[0].possible(tokens)
        ]
        assert costs[i] == max(rows) + audio_lengths(len(pack.samples(i)))
    assert build_sampler(corpus, audio_lengths).num_batches > 1


def test_doors(fakes, pack_dir, load):
    with pytest.raises(ConfigError, match=r"budget_unit=tokens; use auto"):
        conf(budget_unit="tokens")
    with pytest.raises(ConfigError, match=r"features=gpu; use worker or device"):
        conf(features="gpu")
    with pytest.raises(ConfigError, match="dataset_conf.length_multiple=0: must be at least 1"):
        conf(length_multiple=0)
    with pytest.raises(ConfigError, match=r"dataset_conf.tasks.asr: expected a number, found 'often'"):
        conf(tasks={"asr": "often"})
    with pytest.raises(ConfigError, match="unknown key; did you mean 'freq_masks'"):
        conf(augment={"freq_mask": 2})
    with pytest.raises(ConfigError, match="no packs"):
        load([])
    with pytest.raises(ConfigError, match="needs a model with an LLM"):
        load(prompt=False, budget_unit="positions")


def test_what_spec_trim_cuts_off_is_gone_from_lengths_features_and_padding(fakes):
    examples = [Example(name, i, fakes.tone(s), {"text": [10]}) for i, (name, s) in enumerate((("a", 2), ("b", 3)))]
    augment = Augment(AugmentConf(trim_ms=600))
    whole, cut = (collate(examples, FEATURES, None, 0, 5, each, multiple=4) for each in (None, augment))
    lengths = whole.inputs["feat_lengths"].tolist()
    kept = [augment.kept(length, 5, i) for i, length in enumerate(lengths)]
    assert cut.inputs["feat_lengths"].tolist() == kept
    assert all(a < b for a, b in zip(kept, lengths))
    feats = cut.inputs["feats"]
    assert feats.shape[1] == -(-max(kept) // 4) * 4
    for row, expected, length in zip(feats, whole.inputs["feats"], kept):
        assert torch.equal(row[:length], expected[:length])
        assert not row[length:].any()
    assert (cut.frames, cut.padded_frames) == (sum(kept), feats.shape[0] * feats.shape[1])


def test_batches_say_languages_where_they_are_asked_for(fakes, pack_dir):
    corpus = Corpus(conf(), [pack_dir], FEATURES, fakes.Tokenizer(), None, with_languages=True)
    pack, indices = corpus.packs[0], np.arange(4)
    named = [corpus.languages[i] for i in corpus[0, indices].inputs["languages"].tolist()]
    assert named == [pack.lang(i) for i in range(4)]
    assert corpus.languages[0] == ""
    assert "languages" not in Corpus(conf(), [pack_dir], FEATURES, fakes.Tokenizer(), None)[0, indices].inputs
