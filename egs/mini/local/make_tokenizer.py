#!/usr/bin/env python3
"""A tokenizer with one token per hanzi and per English word, as a Hugging Face folder.

    python ../local/make_tokenizer.py --out exp/llm

Words come from everything that the templates can say and from the chat prompt. Token 0, <|endoftext|>, pads rows and
is the blank of CTC heads.
"""

import argparse
import random
import re
from pathlib import Path

import sentences
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
# A word carries the space before it, so that decoding is joining.
TOKEN = r" [a-z']+|[一-鿿]|\n|."
CONFIG = Path(__file__).parents[1] / "mooer/conf/mooer.yaml"
DRAWS = 20000  # of random sentences; the rarest word has been seen long before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--config", type=Path, default=CONFIG, help="its prompt_conf is read")
    args = parser.parse_args()

    rng = random.Random(0)
    texts = prompts(args.config)
    for _ in range(DRAWS):
        pair = sentences.sample(rng)
        texts += [pair.zh, pair.en]
    tokenizer = build(texts)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    print(f"tokenizer    {len(tokenizer)} tokens -> {args.out}")


def build(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every hanzi and word of ``texts``."""
    words = {word for text in texts for word in re.findall(TOKEN, spaced(strip_special(text)))} - {" "}
    vocab = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    for number in range(len(vocab), -(-len(vocab) // 16) * 16):  # matrix kernels like round sizes
        vocab[f"<unused{number}>"] = number
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(WORD_START), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True),
            pre_tokenizers.Split(Regex(r"^ $"), "removed"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        additional_special_tokens=[SPECIAL[1]],
        clean_up_tokenization_spaces=False,
    )


WORD_START = r"(?<![a-z' ])(?=[a-z'])"


def spaced(text: str) -> str:
    """A space before every word, also before one that follows a hanzi or begins the text."""
    return re.sub(WORD_START, " ", text)


def strip_special(text: str) -> str:
    """``text`` without control tokens."""
    return re.sub(r"<\|[a-z_]+\|>", "", text)


def prompts(config: Path) -> list[str]:
    """Every prompt that the recipe's model is asked with."""
    conf = yaml.safe_load(config.read_text(encoding="utf-8"))["prompt_conf"]
    return [conf["template"].replace("{}", task["instruction"]) for task in conf["tasks"].values()]


if __name__ == "__main__":
    main()
