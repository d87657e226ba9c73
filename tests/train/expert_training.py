"""A layer of experts of which some see no frame, trained on two processes with plain torch's gradients to compare."""

import gc
import multiprocessing
import os
from pathlib import Path

import torch
from torch import nn

from funasr_mooer.modules.moe_ffn import MoEFFN
from funasr_mooer.train.engine import Engine
from funasr_mooer.train.launch import free_port
from funasr_mooer.train.zero import ZeroEngine

LR, STEPS = 0.1, 2
USED = [[0], [0, 1]]  # experts whose frames each process has; nobody has any for 2 and 3


class Experts(nn.Module):
    """Frame x goes to the expert that is numbered like its largest value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = MoEFFN(4, 6, nn.SiLU(), num_experts=4, top_k=1)
        self.layer.gate.weight.data = 9 * torch.eye(4)

    def forward(self, x):
        loss = self.layer(x).pow(2).mean()
        return loss, {"loss": loss.detach()}, torch.tensor(x.shape[1])


def frames(rank):
    """(1, T, 4) for one process."""
    noise = torch.randn(2, len(USED[rank]), 4, generator=torch.Generator().manual_seed(rank)) * 0.1
    return (noise + nn.functional.one_hot(torch.tensor(USED[rank]), 4)).flatten(0, 1)[None]


def by_hand():
    """Gradients of the first step and weights after the last, in one process without any engine."""
    model, grads = Experts(), {}
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(model(frames(rank))[0] for rank in range(2)) / 2).backward()
        if step == 0:
            grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
    return grads, model.state_dict()


def train(rank, env, config, out):
    """One of the two processes; writes its gradients and weights."""
    gc.freeze()  # as in toy_training.py
    os.environ.update({**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    engine = ZeroEngine("cpu", torch.float32, config) if config else Engine("cpu", torch.float32)
    model = engine.place(Experts())
    engine.start(torch.optim.SGD(model.parameters(), LR), clip=0.0)
    grads = {}
    for step in range(STEPS):
        engine.micro_step({"x": frames(rank)}, torch.tensor(0.5), last=True)
        if step == 0:
            grads = {name: gradient(param, bool(config)) for name, param in model.named_parameters()}
        engine.step()
    torch.save((grads, model.state_dict()), Path(out) / f"{rank}.pt")
    engine.close()


def gradient(param, split):
    """A copy, or None; ``split``: put together from the processes that hold shares of it."""
    if split:
        from deepspeed.utils import safe_get_full_grad

        grad = safe_get_full_grad(param)
    else:
        grad = param.grad
    return None if grad is None else grad.detach().clone()


def run(config, out):
    """Train on two processes; what each found, and their exit codes (None for one that hung)."""
    folders = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training", "accelerate.utils", "torch._dynamo"])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [context.Process(target=train, args=(rank, env, config, str(out))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
