"""A MooER of a few thousand parameters and a pack of noise, made on the fly: for benchmarks of what surrounds a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from funasr_mooer.bin import pack
from funasr_mooer.data.audio import SAMPLE_RATE, write_wav
from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir

WORDS = "turn on off the light zero one two three four".split()
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <unk>".split()
CHAT = "system user assistant You are a helpful Transcribe speech to text .".split()


def make_llm(folder: Path) -> Path:
    """Write a random Qwen2 of two layers with a tokenizer of whole words; returns ``folder``."""
    words = [*SPECIAL, *CHAT, "\n", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    splits = [pre_tokenizers.Split(text, "removed" if text == " " else "isolated") for text in (" ", "\n", ".")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    special = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "unk_token": SPECIAL[3]}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[SPECIAL[1]], **special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=32, intermediate_size=64, **sizes)).save_pretrained(folder)
    return folder


def make_pack(folder: Path, llm: Path, utts: int, seed: int = 0) -> Path:
    """Write ``utts`` noises of 0.5 to 4 s with random words, as a pack below ``folder``; returns the pack."""
    random, entries = np.random.default_rng(seed), []
    for number in range(utts):
        path = folder / "wav" / f"utt{number:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = int(random.uniform(0.5, 4.0) * SAMPLE_RATE)
        write_wav(path, random.normal(0, 0.1, samples).astype(np.float32))
        words = random.choice(WORDS, random.integers(1, 7))
        entries.append(Utterance(path.stem, str(path), {"text": " ".join(words)}))
    write_kaldi_dir(folder / "kaldi", entries)
    out = folder / "pack"
    if pack.main(["--data", str(folder / "kaldi"), "--out", str(out), "--tokenizer", str(llm)]):
        raise SystemExit("packing failed")
    return out


def mooer_config(llm: Path) -> dict[str, Any]:
    """A MooER over ``llm``, everything random; the caller adds how it is trained."""
    return {
        "model": "MooER",
        "frontend": "WavFrontend",
        "frontend_conf": {"dither": 0.0, "lfr_m": 7, "lfr_n": 6},
        "tokenizer": "MooerTokenizer",
        "tokenizer_conf": {"init": str(llm)},
        "encoder": "MooerParaformerEncoder",
        "encoder_conf": {"output_size": 16, "linear_units": 32, "num_blocks": 2},
        "adapter": "MooerLinearAdapter",
        "adapter_conf": {"granularity_ms": 120, "hidden_dim": 24},
        "llm": "LoRAQwenDecoder",
        "llm_conf": {"init": str(llm), "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "prompt_conf": {"tasks": ["asr"]},
        "decode_conf": {"num_beams": 1, "max_new_tokens": 8},
    }
