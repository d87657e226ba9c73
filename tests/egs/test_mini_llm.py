"""The mini recipe's tokenizer and language model: texts survive, training learns, the gate counts what is right."""

import argparse
import importlib
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from funasr_mooer.modules.splice import IGNORE_INDEX
from funasr_mooer.mooer.prompt import Prompt
from funasr_mooer.mooer.tokenizer import MooerTokenizer

RECIPE = Path(__file__).resolve().parents[2] / "egs/mini"


@pytest.fixture(scope="module")
def local():
    """Imports a module of the recipe's local/ by name."""
    sys.path.insert(0, str(RECIPE / "local"))
    yield importlib.import_module
    sys.path.remove(str(RECIPE / "local"))


@pytest.fixture(scope="module")
def conf():
    return yaml.safe_load((RECIPE / "mooer/conf/mooer.yaml").read_text(encoding="utf-8"))["prompt_conf"]


@pytest.fixture(scope="module")
def tokenizer(local, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tokenizer.py", "--out", str(folder)])
        local("make_tokenizer").main()
    return MooerTokenizer(str(folder))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("打开客厅的灯", 6), ("turn on the light", 4), ("", 0)],
)
def test_hanzi_come_back_without_spaces_and_words_with_one(tokenizer, text, tokens):
    ids = tokenizer.encode(text)
    assert len(ids) == tokens
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["播放music给妈妈", "播放 music 给妈妈", "音乐\nplay music", "play音乐"])
def test_mixed_text_keeps_its_tokens_and_line_breaks(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(ids).count("\n") == text.count("\n")


def test_the_templates_use_no_unknown_word(local, tokenizer):
    rng = random.Random(11)
    for _ in range(2000):
        pair = local("sentences").sample(rng)
        for text, count in ((pair.zh, len(pair.zh)), (pair.en, len(pair.en.split()))):
            ids = tokenizer.encode(text)
            assert len(ids) == count
            assert tokenizer.unk_id not in ids
            assert tokenizer.decode(ids) == text


def test_a_word_that_no_template_says_is_unknown(tokenizer):
    assert tokenizer.encode("打开xylophone") == [*tokenizer.encode("打开"), tokenizer.unk_id]


def test_blank_is_zero_and_the_vocabulary_has_a_round_size(tokenizer):
    assert (tokenizer.pad_id, tokenizer.get_vocab()["<|endoftext|>"]) == (0, 0)
    assert tokenizer.eos_id == tokenizer.get_vocab()["<|im_end|>"]
    assert len(tokenizer.get_vocab()) % 16 == 0


def test_prompts_are_short_and_known(tokenizer, conf):
    for task in ("asr", "ast"):
        ids = Prompt(tokenizer, conf).ids(task)[1:]
        assert len(ids) <= 13
        assert tokenizer.unk_id not in ids


@pytest.fixture
def rows(local, tokenizer, conf):
    return local("pretrain_llm").Rows(tokenizer, Prompt(tokenizer, conf), seed=0)


def test_text_rows_hold_no_heldout_sentence_and_label_the_answer_alone(local, tokenizer, rows):
    held = local("sentences").heldout()
    ids, labels = next(rows.batches(64))
    for row, wanted in zip(ids, labels):
        answer = wanted[wanted != IGNORE_INDEX]
        assert answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(answer) not in held
        torch.testing.assert_close(row[wanted != IGNORE_INDEX], answer)


def test_a_heard_sentence_without_blanks_and_repeats_is_the_sentence(tokenizer, rows):
    ids = tokenizer.encode("打开客厅的灯")
    for _ in range(50):
        heard = rows.heard(ids, "zh")
        kept = [token for i, token in enumerate(heard) if token and (i == 0 or heard[i - 1] != token)]
        assert kept == ids


def tiny_qwen2(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer.get_vocab()), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def test_twenty_steps_lower_the_loss(local, tokenizer, rows):
    model = tiny_qwen2(tokenizer)
    ids, labels = next(rows.batches(32))

    def loss():
        with torch.no_grad():
            return float(model(input_ids=ids, labels=labels).loss)

    before = loss()
    local("pretrain_llm").train(
        model, rows, argparse.Namespace(steps=20, batch=16, lr=5e-2)
    )  # the first fifth of the warm-up
    assert loss() < 0.9 * before


def test_the_gate_counts_exact_answers(local, tokenizer, rows, monkeypatch):
    module = local("pretrain_llm")
    monkeypatch.setattr(module, "GATED", 5)
    model = tiny_qwen2(tokenizer).eval()
    assert module.gate(model, rows) == {"copy zh": 0, "copy en": 0, "translate": 0}

    dev = local("sentences").heldout_pairs()[1]
    answers = iter([[p.zh for p in dev[:5]], [p.en for p in dev[:4]] + ["turn on"], [p.zh for p in dev[:5]]])

    def generate(input_ids, **_):
        said = [[*tokenizer.encode(text), tokenizer.eos_id] for text in next(answers)]
        longest = max(map(len, said))
        ends = torch.tensor([ids + [tokenizer.pad_id] * (longest - len(ids)) for ids in said])
        return torch.cat([input_ids, ends], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert module.gate(model, rows) == {"copy zh": 5, "copy en": 4, "translate": 0}
