#!/usr/bin/env python3
"""A tiny Qwen2 that copies and translates, learnt from text alone: the base model of the mini recipe.

    python ../local/pretrain_llm.py --llm exp/llm --steps 900 --seed 0

Reads the tokenizer in --llm and adds the weights. What it reads imitates what an adapter will give it: a token where
the encoder would hear a word, blanks between, at one position per 120 ms; then the recipe's prompt; then the answer.
Sentences of dev and test are never used. At the end it answers held-out sentences: fewer than --gate of 60 right in
any of the three tasks is an error. A stopped run starts again; it takes minutes.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import sentences
import torch
import torch.nn.functional as F
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from funasr_mooer.errors import MooerError
from funasr_mooer.modules.splice import AUDIO_ID, IGNORE_INDEX
from funasr_mooer.mooer.prompt import Prompt
from funasr_mooer.mooer.tokenizer import MooerTokenizer

CONFIG = Path(__file__).parents[1] / "mooer/conf/mooer.yaml"
SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GATED = 60  # held-out sentences per task
# How long a word is heard, in positions of 120 ms, at normal speed.
SPAN = {"zh": (2, 2, 2, 3, 3, 3, 4), "en": (1, 1, 2, 2, 3, 3, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, type=Path, help="folder with the tokenizer; gets the weights")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=32, help="sentences per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate", type=int, default=35, help=f"right answers out of {GATED} below which it has failed")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = MooerTokenizer(str(args.llm))
    prompt = Prompt(tokenizer, yaml.safe_load(args.config.read_text(encoding="utf-8"))["prompt_conf"])
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer.get_vocab()),
            intermediate_size=768,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
            bos_token_id=None,
            **SIZES,
        )
    )
    rows = Rows(tokenizer, prompt, args.seed)
    train(model, rows, args)
    model.eval().save_pretrained(args.llm)
    right = gate(model, rows)
    (args.llm / "result.json").write_text(
        json.dumps({"steps": args.steps, "seed": args.seed, "of": GATED, **right}) + "\n"
    )
    print("right of 60  " + " | ".join(f"{name} {count}" for name, count in right.items()))
    if min(right.values()) < args.gate:
        print(f"the language model has not learnt its tasks (gate {args.gate}); more --steps", file=sys.stderr)
        return 1
    return 0


class Rows:
    """Rows of token ids: imitated audio, prompt, answer.

    Args:
        tokenizer: one token per hanzi and word.
        prompt: the recipe's.
        seed: of everything drawn.
    """

    def __init__(self, tokenizer: MooerTokenizer, prompt: Prompt, seed: int):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.rng = random.Random(seed)
        self.held = sentences.heldout()
        self.prompts = {task: [i for i in prompt.ids(task) if i != AUDIO_ID] for task in prompt.tasks}

    def draw(self) -> tuple[list[int], list[int]]:
        """(source and prompt, answer): copy Mandarin 35 %, copy English 25 %, translate 40 %."""
        pair = sentences.sample(self.rng)
        while pair.is_in(self.held):
            pair = sentences.sample(self.rng)
        kind = self.rng.random()
        if kind < 0.35:
            return self.row(pair.zh, "zh", "asr", pair.zh)
        if kind < 0.60:
            return self.row(pair.en, "en", "asr", pair.en)
        return self.row(pair.zh, "zh", "ast", pair.en)

    def row(self, source: str, lang: str, task: str, answer: str) -> tuple[list[int], list[int]]:
        """One row of the task."""
        heard = self.heard(self.tokenizer.encode(source), lang)
        return heard + self.prompts[task], [*self.tokenizer.encode(answer), self.tokenizer.eos_id]

    def heard(self, ids: list[int], lang: str) -> list[int]:
        """Tokens as an adapter would give them: blanks before and between, some tokens twice."""
        rng, blank = self.rng, self.tokenizer.pad_id
        slots = [blank] * rng.randint(0, 2)
        pace = rng.uniform(0.6, 1.3)
        for token in ids:
            times = 1 + (rng.random() < (0.06 if lang == "zh" else 0.15))
            span = max(times, round(pace * rng.choice(SPAN[lang])))
            slots += [token] * times + [blank] * (span - times)
        return slots

    def batches(self, size: int):
        """Batches of rows of similar length, endlessly; (ids, labels), padded on the right to a multiple of 16."""
        while True:
            pool = sorted((self.draw() for _ in range(size * 32)), key=lambda row: len(row[0]) + len(row[1]))
            chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
            self.rng.shuffle(chunks)
            for chunk in chunks:
                longest = -(-max(len(a) + len(b) for a, b in chunk) // 16) * 16
                ids = torch.full((len(chunk), longest), self.tokenizer.pad_id)
                labels = torch.full_like(ids, IGNORE_INDEX)
                for row, (source, answer) in enumerate(chunk):
                    end = len(source) + len(answer)
                    ids[row, :end] = torch.tensor(source + answer)
                    labels[row, len(source) : end] = torch.tensor(answer)
                yield ids, labels


def train(model: Qwen2ForCausalLM, rows: Rows, args: argparse.Namespace) -> None:
    """AdamW, cosine, loss on the answers alone."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.98), weight_decay=0.01)
    batches, losses, begin = rows.batches(args.batch), [], time.perf_counter()
    for step in range(1, args.steps + 1):
        rate = min(step / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * step / args.steps)) / 2)
        optimizer.param_groups[0]["lr"] = args.lr * rate
        ids, labels = next(batches)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        predicts = labels[:, 1:] != IGNORE_INDEX
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][predicts]), labels[:, 1:][predicts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == args.steps:
            spent = time.perf_counter() - begin
            left = spent / step * (args.steps - step)
            print(
                f"text step {step}/{args.steps} | loss {sum(losses[-100:]) / len(losses[-100:]):.3f} "
                f"| {spent:.0f} s | left {left:.0f} s",
                flush=True,
            )


@torch.no_grad()
def gate(model: Qwen2ForCausalLM, rows: Rows) -> dict[str, int]:
    """Held-out dev sentences answered exactly: copied in each language, and translated."""
    _, dev = sentences.heldout_pairs()
    asked = {
        "copy zh": [(p.zh, "zh", "asr", p.zh) for p in dev[:GATED]],
        "copy en": [(p.en, "en", "asr", p.en) for p in dev[:GATED]],
        "translate": [(p.zh, "zh", "ast", p.en) for p in dev[:GATED]],
    }
    right = {}
    for name, questions in asked.items():
        made = [rows.row(*question)[0] for question in questions]
        S = max(map(len, made))
        pad = rows.tokenizer.pad_id
        ids = torch.tensor([[pad] * (S - len(row)) + row for row in made])
        mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in made])
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=30, eos_token_id=rows.tokenizer.eos_id
        )
        answers = [rows.tokenizer.decode(row[S:]) for row in out.tolist()]
        right[name] = sum(answer == wanted for answer, (*_, wanted) in zip(answers, questions))
    return right


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MooerError as error:
        sys.exit(f"{type(error).__name__}: {error}")
