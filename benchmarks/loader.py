#!/usr/bin/env python3
"""Loading data: ours beside the plain pipeline of the original MooER, in one run.

    python benchmarks/loader.py [--json FILE] [--utts 200] [--index-utts 60000000]

Speech from espeak-ng (noise where it is missing) of 2-15 s, log-normal, mean about 7.5 s, -50 dB of noise added; as wav
and as FLAC shards. One process, one thread; repetitions alternate; ratios are medians of CPU time.

    plain    common/plain_loader.py: per-utterance fbank, Python loops, a shuffle buffer of features, random batches of 8
    cpu      our loader: features made once, from mapped samples into the padded batch
    pcm      our loader with dataset_conf.features: device: 16-bit samples; the device's own work is not counted

Then: that all give the same features, ids and labels; what a worker process holds; how well batches are filled, on 200,000
lengths; and with --index-utts, how long a pack of so many utterances takes from opening to the first batch of indices.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import plain_loader
from common.timing import alternate, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from funasr_mooer.data.audio import SAMPLE_RATE, write_wav
from funasr_mooer.data.cmvn import compute_cmvn
from funasr_mooer.data.corpus import Corpus, DatasetConf
from funasr_mooer.data.features import Features
from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir, write_kaldi_dir
from funasr_mooer.data.loader import Loader, build_loader, build_sampler
from funasr_mooer.data.pack_format import RECORD, VERSION
from funasr_mooer.data.pack_writer import write_pack
from funasr_mooer.data.sampler import TokenBudgetSampler
from funasr_mooer.data.shards import Pack
from funasr_mooer.mooer.prompt import Prompt
from funasr_mooer.mooer.tokenizer import MooerTokenizer

SPEECH = Path(__file__).resolve().parents[1] / "egs/mini/local"
REPETITIONS = 3
MIB = 1 << 20


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.utts)
        figures = {"utts": args.utts, "hours": round(bench.hours, 3), **bench.speed(), **bench.parity()}
        figures |= {"worker_mib": round(bench.worker_mib(), 1), "index_bytes": RECORD.itemsize, **filling()}
        if args.index_utts:
            figures |= large_index(Path(folder) / "large", args.index_utts, bench)
    for name, value in figures.items():
        print(f"{name:24} {value}")
    if args.json:
        write_json(args.json, figures)


class Bench:
    """A corpus as wav and as FLAC shards, and everything that loads it.

    Args:
        folder: where to make it.
        utts: how many utterances.
    """

    def __init__(self, folder: Path, utts: int):
        texts = make_corpus(folder / "kaldi", utts)
        self.tokenizer = make_tokenizer(folder / "llm", texts)
        self.prompt = Prompt(self.tokenizer, {"tasks": ["asr"]})
        self.packs = {}
        for form in ("wav", "flac"):
            data, out = read_kaldi_dir(folder / "kaldi"), folder / form
            write_pack(data, out, self.tokenizer, form=form, shard_utts=100)
            self.packs[form] = Pack(out)
        wav, plain = self.packs["wav"], Features()
        self.hours = wav.hours
        self.features = Features(cmvn=compute_cmvn(plain(wav.samples(i)) for i in range(len(wav))))

    def loader(self, form: str, features: str, workers: int = 0) -> Loader:
        """Ours."""
        conf = DatasetConf(features=features, num_workers=workers)
        given = (self.features, self.tokenizer, self.prompt, self.audio_lengths)
        return build_loader(conf, [self.packs[form]], *given)

    def audio_lengths(self, samples: np.ndarray) -> np.ndarray:
        """Audio embeddings of 120 ms."""
        return self.features.num_frames(samples) // 2

    def ours(self, form: str, features: str) -> Callable[[], None]:
        """An epoch of a worker's work."""
        loader, epochs = self.loader(form, features), iter(range(1000))

        def run() -> None:
            epoch = next(epochs)
            for indices in loader.sampler.batches(epoch):
                loader.corpus[epoch, indices]

        return run

    def plain(self, form: str) -> Iterator[dict]:
        """An epoch of the baseline."""
        pack = self.packs[form]
        tars = [pack.path / name for name in pack.meta["shards"]]
        template = self.prompt.template.format(self.prompt.tasks["asr"].instruction)
        return plain_loader.batches(tars, self.tokenizer.encode, template, "<|im_end|>", self.features.cmvn)

    def speed(self) -> dict[str, float]:
        """Ratios of CPU time to the baseline's on the same files."""
        figures = {}
        for form in ("wav", "flac"):
            runs: dict[str, Callable[[], object]] = {
                "plain": lambda form=form: sum(1 for _ in self.plain(form)),
                "cpu": self.ours(form, "worker"),
                "pcm": self.ours(form, "device"),
            }
            times = alternate(runs, REPETITIONS)
            figures |= {f"{name}_{form}": round(times["plain"].cpu_ratio(times[name]), 2) for name in ("cpu", "pcm")}
            figures[f"plain_{form}_audio_h_per_core_h"] = round(self.hours * 3600 / times["plain"].cpu_s)
        return figures

    def parity(self) -> dict[str, float]:
        """Differences of features after CMVN, and utterances whose ids or labels differ, of both our ways.

        The largest difference is what float32 leaves of a quiet mel bin beside a loud one: each pipeline is as far from
        float64.
        """
        rows = {key: row for batch in self.plain("wav") for key, row in by_key(batch, batch["keys"])}
        worst, squares, count, unequal = 0.0, 0.0, 0, 0
        for where in ("worker", "device"):
            for batch in self.loader("flac", where):
                for key, (feats, ids, labels) in by_key(batch.inputs, batch.utt_ids):
                    difference = rows[key][0] - feats
                    worst, count = max(worst, float(difference.abs().max())), count + difference.numel()
                    squares += float(difference.square().sum())
                    # ours begins with a place for the audio
                    unequal += not (torch.equal(rows[key][1], ids[1:]) and torch.equal(rows[key][2], labels[1:]))
        rms = (squares / count) ** 0.5
        return {"feature_diff": float(f"{worst:.2g}"), "feature_diff_rms": float(f"{rms:.2g}"), "row_diff": unequal}

    def worker_mib(self) -> float:
        """Most private memory of a worker process while it loads two epochs, MiB."""
        loader, most = self.loader("flac", "worker", workers=1), 0.0
        for epoch in range(2):
            for _ in loader.epoch(epoch):
                most = max(most, private_mib(loader.worker_pids[0]))
        return most


def by_key(inputs: dict, keys: list[str]) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Features, ids and labels of each row, without padding."""
    for n, key in enumerate(keys):
        kept = inputs["attention_mask"][n]
        feats = inputs["feats"][n, : inputs["feat_lengths"][n]]
        yield key, (feats.clone(), inputs["input_ids"][n][kept], inputs["labels"][n][kept])


def private_mib(pid: int | str = "self", kind: str = "Private_") -> float:
    """Memory that a process shares with nobody, MiB (Linux); with ``Anonymous:`` what no file backs."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def filling(count: int = 200_000, budget: int = 8000) -> dict[str, float]:
    """How well batches are filled: what is read over what is real, and how steady their size is."""
    rng = np.random.default_rng(0)
    seconds = lengths(rng, count)
    frames = np.ceil(seconds / 0.06).astype(np.int64)
    positions = frames // 2 + 26 + (seconds * np.where(rng.random(count) < 0.5, 1.6, 2.9)).astype(np.int64)
    figures = {}
    for name, packed in (("", False), ("_packed", True)):
        made = list(TokenBudgetSampler(positions, budget, packed=packed).batches(0))
        tokens = np.array([positions[batch].sum() for batch in made])
        read = tokens.sum() if packed else sum(len(batch) * positions[batch].max() for batch in made)
        heard = sum(len(batch) * frames[batch].max() for batch in made)
        figures |= {
            f"lm_positions{name}": round(float(read / positions.sum()), 3),
            f"encoder_frames{name}": round(float(heard / frames.sum()), 3),
            f"token_cv{name}": round(float(tokens.std() / tokens.mean()), 3),
        }
    return figures


def large_index(folder: Path, count: int, bench: Bench) -> dict[str, float]:
    """Open an index of so many utterances and take the first batch of indices; the files are deleted afterwards."""
    folder.mkdir()
    write_index(folder, count, bench.tokenizer.fingerprint)
    before, start = private_mib(kind="Anonymous:"), time.perf_counter()
    pack = Pack(folder)
    opened = time.perf_counter()
    conf = DatasetConf(num_workers=0)
    corpus = Corpus(conf, [pack], bench.features, bench.tokenizer, bench.prompt)
    sampler = build_sampler(corpus, bench.audio_lengths)
    first = sampler.batch(0, 0)
    done = time.perf_counter()
    sampler.batch(5, sampler.num_batches - 1)
    figures = {
        "index_utts": count,
        "index_open_ms": round(1e3 * (opened - start), 1),
        "index_first_batch_s": round(done - start, 2),
        "index_any_batch_s": round(time.perf_counter() - done, 2),
        "index_private_mib": round(private_mib(kind="Anonymous:") - before, 1),
        "index_batches": sampler.num_batches,
    }
    assert len(np.unique(first)) == len(first)
    for name in ("index.bin", "tokens.bin", "meta.json"):
        (folder / name).unlink()
    return figures


def write_index(folder: Path, count: int, fingerprint: str, block: int = 1 << 20) -> None:
    """A pack without audio: lengths and token counts of ``count`` utterances."""
    rng = np.random.default_rng(0)
    seconds = lengths(rng, block)
    records = np.zeros(block, RECORD)
    records["samples"] = seconds * SAMPLE_RATE
    records["token_count"] = 1 + seconds * np.where(rng.random(block) < 0.5, 1.6, 2.9)
    records["fields"] = 1
    with open(folder / "index.bin", "wb") as file:
        for start in range(0, count, block):
            file.write(records[: min(block, count - start)].tobytes())
    (folder / "tokens.bin").touch()
    meta = {"version": VERSION, "fields": ["text"], "langs": [""], "utterances": count, "tokens": 0}
    meta |= {"hours": count * float(seconds.mean()) / 3600, "tokenizer": fingerprint, "shards": [], "shard_bytes": []}
    (folder / "meta.json").write_text(json.dumps(meta))


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Seconds: log-normal, clipped to 2-15 s, mean about 7.5 s."""
    return np.clip(rng.lognormal(1.9, 0.5, count), 2, 15)


def make_corpus(folder: Path, utts: int) -> list[str]:
    """Write a Kaldi directory of sentences said one after the other; returns their texts."""
    rng, entries = np.random.default_rng(0), []
    say = speaker()
    for number, seconds in enumerate(lengths(rng, utts)):
        samples, words = np.zeros(0, np.float32), []
        while len(samples) < seconds * SAMPLE_RATE:
            piece, text = say(rng)
            samples, words = np.concatenate([samples, piece]), [*words, text]
        samples = samples[: int(seconds * SAMPLE_RATE)] + rng.normal(0, 10 ** (-50 / 20), int(seconds * SAMPLE_RATE))
        path = folder.parent / "audio" / f"utt{number:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, samples.astype(np.float32))
        entries.append(Utterance(path.stem, str(path), {"text": " ".join(words)}))
    write_kaldi_dir(folder, entries)
    return [entry.texts["text"] for entry in entries]


def speaker() -> Callable[[np.random.Generator], tuple[np.ndarray, str]]:
    """Says a random sentence, in Chinese or English: waveform and text; noise where there is no espeak-ng."""
    sys.path.insert(0, str(SPEECH))
    import random

    import sentences
    import speech

    pairs = sentences.draw_training(60, random.Random(0))
    if importlib.util.find_spec("espeakng_loader") is None:
        return lambda rng: (rng.normal(0, 0.1, 3 * SAMPLE_RATE).astype(np.float32), pairs[rng.integers(60)].en)
    voice = speech.espeak()
    said = [(p.zh, "cmn") if k % 2 else (p.en, "en") for k, p in enumerate(pairs)]
    waves = [(voice.synthesise(text, language, "m1", 160, 50), text) for text, language in said]
    return lambda rng: waves[rng.integers(len(waves))]


def make_tokenizer(folder: Path, texts: list[str]) -> MooerTokenizer:
    """A byte-level BPE of the corpus, like Qwen's but small."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], additional_special_tokens=[special[1]]
    )
    fast.save_pretrained(folder)
    return MooerTokenizer(str(folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--utts", type=int, default=200, help="utterances of the corpus")
    parser.add_argument("--index-utts", type=int, default=0, help="utterances of an index without audio, 26 bytes each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
