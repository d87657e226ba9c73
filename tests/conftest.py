"""Fixtures that several rooms need: reference numbers, real speech, a tiny model, a simulated MUSA device."""

import copy
import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads cost more than tiny models gain


def pytest_collection_finish() -> None:
    """What the test files have imported stays until the end: no garbage collection need visit it again."""
    gc.collect()
    gc.freeze()


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, HERE.parent / ".." / "shared" / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set ${variable} to the folder of {default} material")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers of the original implementations ($FUNASR_MOOER_GOLDEN)."""
    return _folder("FUNASR_MOOER_GOLDEN", "golden")


@pytest.fixture(scope="session")
def speech_data() -> Path:
    """Real speech in Kaldi directories ($FUNASR_MOOER_DATA)."""
    return _folder("FUNASR_MOOER_DATA", "data")


@pytest.fixture(scope="session")
def fake_musa() -> dict[str, str]:
    """Environment of a process whose torch has a simulated MUSA device (tests/fake_musa; compiled at its first import)."""
    if importlib.util.find_spec("torch_musa"):
        pytest.skip("torch_musa is installed: run pytest -m gpu tests/test_musa.py on the device itself")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("c++", "ninja") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} to compile tests/fake_musa with")
    folders = [str(HERE / "fake_musa"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(folders)}


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """A random Qwen2 of two layers with a word tokenizer and Qwen's chat tokens, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llm")
    words = "<|endoftext|> <|im_start|> <|im_end|> <unk> system user assistant You are a helpful . \n".split(" ")
    words += (
        "Transcribe Translate speech to text english turn on off the light zero one two 打 开 关 灯 零 一 二".split()
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            split(" ", "removed"),
            split("\n", "isolated"),
            split(".", "isolated"),
            *[split(w, "isolated") for w in words[-7:]],
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=48, intermediate_size=64, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_system) -> dict:
    """``tiny_system`` for one test, which may change it."""
    return copy.deepcopy(tiny_system)


@pytest.fixture(scope="session")
def tiny_system(tiny_llm) -> dict:
    """The config of a MooER of a few thousand parameters over ``tiny_llm``, everything random."""
    return {
        "model": "MooER",
        "frontend": "WavFrontend",
        "frontend_conf": {"dither": 0.0, "lfr_m": 7, "lfr_n": 6},
        "tokenizer": "MooerTokenizer",
        "tokenizer_conf": {"init": str(tiny_llm)},
        "encoder": "MooerParaformerEncoder",
        "encoder_conf": {"output_size": 16, "linear_units": 32, "num_blocks": 2, "freeze": True},
        "adapter": "MooerLinearAdapter",
        "adapter_conf": {"granularity_ms": 120, "hidden_dim": 24},
        "llm": "LoRAQwenDecoder",
        "llm_conf": {"init": str(tiny_llm), "lora": {"r": 4, "alpha": 8}},
        "prompt_conf": {"tasks": ["asr", "ast"]},
        "decode_conf": {"num_beams": 1, "max_new_tokens": 5},
    }
