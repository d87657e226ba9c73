"""A toy model and a toy corpus that honour the contracts of the training loop, and runs of it that may be killed."""

import gc
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from funasr_mooer import device as devices
from funasr_mooer.train import loop
from funasr_mooer.train.engine import build_engine
from funasr_mooer.train.launch import STOPPED, free_port
from funasr_mooer.train.loop import Trainer
from funasr_mooer.train.stages import read_stages

VOCAB, DIM = 11, 8


class ToyModel(nn.Module):
    """feats -> encoder (frozen) -> adapter -> lora -> a token per frame."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder, self.adapter = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.lora, self.dropout = nn.Linear(DIM, VOCAB), nn.Dropout(dropout)
        self.objective = "llm"
        self.train_parts(["adapter", "lora"])

    @property
    def parts(self):
        return {name: list(getattr(self, name).parameters()) for name in ("encoder", "adapter", "lora")}

    def train_parts(self, names):
        for name, params in self.parts.items():
            for param in params:
                param.requires_grad_(name in names)

    def forward(self, feats, labels):
        hidden = self.dropout(torch.tanh(self.adapter(torch.tanh(self.encoder(feats)))))
        logits = self.lora(hidden).float()
        count = (labels != -100).sum()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count.clamp(min=1)
        hits = ((logits.argmax(-1) == labels) & (labels != -100)).sum()
        return loss, {"loss": loss.detach(), "acc": hits / count.clamp(min=1)}, count

    def save_parts(self, directory, names):
        for name in names:
            save_file(getattr(self, name).state_dict(), Path(directory) / f"{name}.safetensors")

    def load_parts(self, directory, names):
        for name in names:
            getattr(self, name).load_state_dict(load_file(Path(directory) / f"{name}.safetensors"))


@dataclass
class ToyBatch:
    inputs: dict
    weight: int
    audio_s: float
    frames: int
    padded_frames: int
    utt_ids: list


class ToyLoader:
    """``utts`` utterances of 2 to 9 frames; batches of ``size`` in an order drawn per epoch."""

    def __init__(self, utts=48, size=2, seed=0, hook=None):
        random = torch.Generator().manual_seed(7)
        self.lengths = torch.randint(2, 10, (utts,), generator=random).tolist()
        self.feats = [torch.randn(n, DIM, generator=random) for n in self.lengths]
        self.labels = [torch.randint(0, VOCAB, (n,), generator=random) for n in self.lengths]
        self.size, self.seed, self.hook = size, seed, hook

    def steps(self, epoch, world):
        return len(self.lengths) // self.size // world

    def epoch(self, epoch, *, rank, world, start_batch):
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for number in range(start_batch + rank, self.steps(epoch, world) * world, world):
            batch = self.batch(order[number * self.size : (number + 1) * self.size])
            yield self.hook(epoch, number, batch) if self.hook else batch

    def batch(self, utts):
        pad = nn.utils.rnn.pad_sequence
        feats = pad([self.feats[u] for u in utts], batch_first=True)
        labels = pad([self.labels[u] for u in utts], batch_first=True, padding_value=-100)
        frames = sum(self.lengths[u] for u in utts)
        inputs = {"feats": feats, "labels": labels}
        return ToyBatch(
            inputs, frames, frames * 0.06, frames, feats.shape[0] * feats.shape[1], [f"utt{u}" for u in utts]
        )


def write_toy(model, directory, names):
    """A model directory of the toy: its parts."""
    model.save_parts(directory, names)
    (directory / "config.yaml").write_text("model: Toy\n")


def make_trainer(
    exp,
    conf,
    *,
    dropout=0.0,
    size=2,
    utts=48,
    hook=None,
    dev=False,
    decode=None,
    write=write_toy,
    **sections,
):
    """A trainer of the toy; ``conf`` is train_conf, ``sections`` are the other sections of a config."""
    defaults = {"tensorboard": False, "log_interval": 4, "dtype": "float32"}
    conf, stages = read_stages({"train_conf": {**defaults, **conf}, **sections})
    engine = build_engine("cpu", conf)
    devices.seed_all(conf.seed)
    loader = ToyLoader(utts, size, hook=hook)
    dev = ToyLoader(12, 2) if dev else None
    return Trainer(ToyModel(dropout), loader, engine, conf, stages, Path(exp), write, dev, decode)


def weights(directory):
    """The trained tensors of a model directory."""
    return {part: load_file(Path(directory) / f"{part}.safetensors") for part in ("adapter", "lora")}


def assert_equal(left, right, **tolerance):
    """Weights of two model directories are equal: to the last bit, unless a tolerance is given."""
    for part, tensors in weights(left).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(weights(right)[part][name], tensor, **(tolerance or {"rtol": 0, "atol": 0}))


def run_process(options, env):
    """One process of a run; dies where ``kill_at`` or ``kill_in_save`` says. Exits with the status of a run."""
    gc.freeze()  # what was imported before the fork stays: a collection that visits it copies all its pages
    os.environ.update(env)
    torch.set_num_threads(1)
    loop.draw_curves = lambda *_: None
    options = dict(options)
    traps = {name: options.pop(name, None) for name in ("kill_at", "term_at", "kill_in_save")}

    def hook(epoch, number, batch):
        if number in (traps["kill_at"], traps["term_at"]):
            os.kill(os.getpid(), signal.SIGKILL if number == traps["kill_at"] else signal.SIGTERM)
        return batch

    def write(model, directory, names):
        write_toy(model, directory, names[:1])
        if directory.name.endswith(f"step-{traps['kill_in_save']}"):
            os.kill(os.getpid(), signal.SIGKILL)
        write_toy(model, directory, names)

    trainer = make_trainer(**options, hook=hook, write=write)
    finished = trainer.run()
    trainer.engine.close()
    assert nn.parallel.DistributedDataParallel not in map(type, gc.get_objects())
    sys.exit(0 if finished else STOPPED)


def run(nproc=1, **options):
    """Exit status of each of ``nproc`` processes that train together; options as :func:`make_trainer`, and traps."""
    context = multiprocessing.get_context("forkserver")  # imports once, then forks: a start takes no time
    context.set_forkserver_preload(["toy_training", "accelerate.utils", "torch._dynamo"])
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(path).split(os.pathsep)))
    env = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if nproc > 1 else {}
    processes = []
    for rank in range(nproc):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), **env} if env else {}
        processes.append(context.Process(target=run_process, args=(options, ranks)))
        processes[-1].start()
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]  # None: it hangs
    for process in processes:
        process.kill()  # else pytest would wait for it for ever
    return codes
