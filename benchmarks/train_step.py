#!/usr/bin/env python3
"""One training step, forward and backward: ours beside the plain step of the original MooER, in one run.

    python benchmarks/train_step.py [--json FILE] [--small]

All train the same utterances (random features of 2-15 s, mean 7.5 s; 26 tokens of prompt; answers of 1.6 tokens per
second for half of them and 2.9 for the others) with the same weights: SANM x6 frozen, adapter, Qwen2 of 512 x 8 with a
vocabulary of 151646, LoRA r 64 without dropout. Accelerator, CPU with native bfloat16 or float32, whatever is there.

    plain    as the original: random batches of 8, padded; logits at all positions, and their argmax for the accuracy
    padded   batches filled to a token budget with utterances of like length; logits only where there is a label
    packed   the same, each batch in one row without padding

The budget is that of 8 utterances. Repetitions alternate, ratios are medians, of wall times; on a CPU of process CPU times,
which other work on the machine changes less. Peak memory is what a
step holds beyond the weights: of the device, or on a CPU the resident memory of a process for each step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.timing import Times, alternate, write_json
from torch import Tensor

from funasr_mooer import device as devices
from funasr_mooer.border.build import build_model
from funasr_mooer.data.batch import one_row, pad_rows
from funasr_mooer.data.sampler import TokenBudgetSampler
from funasr_mooer.modules.splice import AUDIO_ID, IGNORE_INDEX, splice_audio

VOCAB, PROMPT, PER_BATCH = 151646, 26, 8
LLM = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
}
REPETITIONS = 3
Step = Callable[[], tuple[float, float]]  # forward and backward of all batches -> mean loss, accuracy


class Corpus:
    """Utterances that need no audio: random features and random tokens."""

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        seconds = np.clip(rng.lognormal(1.9, 0.5, count), 2, 15)
        self.frames = (seconds / 0.06).astype(int)
        answers = (seconds * np.where(np.arange(count) % 2, 1.6, 2.9)).astype(int)
        self.answers = [rng.integers(0, VOCAB, n).tolist() for n in answers]
        self.prompt = [AUDIO_ID, *rng.integers(0, VOCAB, PROMPT).tolist()]
        self.feats = [torch.from_numpy(rng.normal(0, 1, (n, 560)).astype(np.float32)) for n in self.frames]
        self.positions = self.frames // 2 + PROMPT + answers  # that the LLM reads

    def batch(self, utterances: Sequence[int], packed: bool = False) -> dict[str, Tensor]:
        """Arguments of ``model.forward``."""
        feats = torch.nn.utils.rnn.pad_sequence([self.feats[u] for u in utterances], batch_first=True)
        ids = [self.prompt + self.answers[u] for u in utterances]
        labels = [[IGNORE_INDEX] * len(self.prompt) + self.answers[u] for u in utterances]
        rows = {"input_ids": pad_rows(ids, 0), "labels": pad_rows(labels, IGNORE_INDEX)}
        rows["attention_mask"] = (
            torch.arange(rows["labels"].shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        )
        lengths = torch.from_numpy(self.frames[list(utterances)])
        return {"feats": feats, "feat_lengths": lengths, **(one_row(rows) if packed else rows)}

    def batches(self, name: str) -> list[np.ndarray]:
        """Utterances of each batch of a step."""
        if name == "plain":
            return np.split(np.random.default_rng(1).permutation(len(self.frames)), len(self.frames) // PER_BATCH)
        budget = int(self.positions.mean() * PER_BATCH)
        sampler = TokenBudgetSampler(self.positions, max(budget, self.positions.max()), packed=name == "packed")
        return list(sampler.batches(0))


def main() -> None:
    args = parse()
    device = devices.resolve("auto")
    corpus = Corpus(args.utts)
    with tempfile.TemporaryDirectory() as folder:
        llm = args.llm or make_llm(Path(folder))
        model = devices.place(make_model(Path(llm), device), device)
        steps = {name: make_step(name, model, corpus, device) for name in ("plain", "padded", "packed")}
        if args.peak:
            print(json.dumps(peak_mib(steps[args.peak], model, device)))
            return
        losses = {name: step()[0] for name, step in steps.items()}  # warms up, too
        times = alternate(steps, REPETITIONS, warm_up=0)
        peaks = {name: measure_peak(name, steps[name], model, device, folder, args.utts) for name in steps}
    seconds = times["plain"].cpu_s if device.type == "cpu" else times["plain"].wall_s
    figures = {"utts": args.utts, "plain_s": round(seconds, 2), "plain_peak_mib": round(peaks["plain"])}
    for name, suffix in (("packed", ""), ("padded", "_padded")):
        batches = corpus.batches(name)
        width = {u: corpus.positions[batch].max() for batch in batches for u in batch}
        read = corpus.positions.sum() if name == "packed" else sum(width.values())
        figures |= {
            f"step_speedup{suffix}": round(ratio(times["plain"], times[name], device), 2),
            f"step_peak{suffix}": round(peaks[name] / peaks["plain"], 3),
            f"loss_diff{suffix}": float(f"{abs(losses[name] / losses['plain'] - 1):.2g}"),
            f"lm_positions{suffix}": round(float(read / corpus.positions.sum()), 3),
        }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    if args.json:
        write_json(args.json, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--utts", type=int, default=16, help="utterances of a step, a multiple of 8")
    parser.add_argument("--small", action="store_const", dest="utts", const=8, help="8 utterances: for a slow CPU")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what the processes that measure memory are told
    parser.add_argument("--llm", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_llm(folder: Path) -> Path:
    """A random Qwen2 with a tokenizer of a few words, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCAB, tie_word_embeddings=True, **LLM)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_model(llm: Path, device: torch.device) -> torch.nn.Module:
    """MooER with random weights; without dropout, so that losses can be compared."""
    torch.manual_seed(0)
    dtype = "bfloat16" if devices.supports_bf16(device) else "float32"
    config = {"model": "MooER", "frontend_conf": {"lfr_m": 7, "lfr_n": 6}, "tokenizer_conf": {"init": str(llm)}}
    config |= {"encoder": "MooerParaformerEncoder", "encoder_conf": {"num_blocks": 6, "freeze": True}}
    config |= {"adapter": "MooerLinearAdapter", "llm": "LoRAQwenDecoder"}
    config |= {"llm_conf": {"init": str(llm), "dtype": dtype, "lora": {"r": 64, "alpha": 16, "dropout": 0.0}}}
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_step(name: str, model: torch.nn.Module, corpus: Corpus, device: torch.device) -> Step:
    """Forward and backward of all batches; gradients add up to those of the mean over all labels."""
    forward = plain_forward if name == "plain" else lambda model, batch: model(**batch)
    batches = [corpus.batch(utts, name == "packed") for utts in corpus.batches(name)]
    labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    dtype = torch.bfloat16 if devices.supports_bf16(device) else torch.float32

    def step() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        sums = np.zeros(2)
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            with devices.autocast(device, dtype):
                loss, stats, weight = forward(model, batch)
            share = float(weight) / labels
            (loss * share).backward()
            sums += share * np.array([float(loss), float(stats["acc"])])
        return float(sums[0]), float(sums[1])

    return step


def plain_forward(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The original's way after its splice: logits of every position, cross-entropy and argmax over all of them."""
    audio, lengths = model.hear(batch["feats"], batch["feat_lengths"])
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    spliced = splice_audio(ids, mask, model.llm.embed(ids), audio, lengths, labels)
    embeds = spliced.inputs_embeds.to(model.llm.embedding.weight.dtype)
    logits = model.llm.model(inputs_embeds=embeds, attention_mask=spliced.attention_mask, use_cache=False).logits
    targets = F.pad(spliced.labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # what each position has to predict
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    labelled = targets != IGNORE_INDEX
    hits = (logits.detach().argmax(-1) == targets) & labelled
    return loss, {"acc": hits.sum() / labelled.sum()}, labelled.sum()


def ratio(one: Times, other: Times, device: torch.device) -> float:
    """How many times as long ``one`` takes as ``other``."""
    return one.cpu_ratio(other) if device.type == "cpu" else one.wall_ratio(other)


def measure_peak(name: str, step: Step, model: torch.nn.Module, device: torch.device, llm: str, utts: int) -> float:
    """Peak memory of a step, MiB; on a CPU in a process of its own, whose allocator has no history."""
    if device.type != "cpu":
        return peak_mib(step, model, device)
    command = [sys.executable, __file__, "--utts", str(utts), "--peak", name, "--llm", llm]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_mib(step: Step, model: torch.nn.Module, device: torch.device) -> float:
    """What a step holds beyond the weights, at most, MiB."""
    if device.type != "cpu":
        backend = devices.backend(device.type)
        model.zero_grad(set_to_none=True)
        before = backend.memory_allocated(device)
        backend.reset_peak_memory_stats(device)
        step()
        return (backend.max_memory_allocated(device) - before) / 2**20
    for parameter in model.parameters():
        parameter.sum()  # weights come from a mapped file: all of it counts as there before the step
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_mib("VmRSS")
    step()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """Resident memory of this process, MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
