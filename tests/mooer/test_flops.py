"""The arithmetic of a step, against the figures for a 7B model and against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from funasr_mooer.border.build import build_model
from funasr_mooer.mooer.flops import Flops, flops_of

QWEN2_7B = {"encoder": 157_975_648, "adapter": 9_442_816, "lora": 161_480_704, "head": 544_997_376}


def test_an_hour_of_audio_through_7b_is_one_and_a_half_petaflop():
    layers = 7_615_616_512 - 2 * QWEN2_7B["head"]
    flops = Flops({**QWEN2_7B, "layers": layers}, ["adapter", "lora"])
    hour = {"frames": 60_000, "audio": 30_000, "positions": 15.3 * 3600, "labels": 2.2 * 3600}
    assert flops.step(**hour) == pytest.approx(1.53e15, rel=0.01)
    assert flops.step(**hour) + flops.recomputed(hour["positions"]) == pytest.approx(2.25e15, rel=0.01)


@pytest.mark.parametrize("parts", [["adapter"], ["adapter", "lora"], ["encoder", "adapter", "lora"], ["lora"]])
def test_the_count_is_that_of_torch(tiny_config, parts):
    model = build_model(tiny_config)
    model.train_parts(parts)
    model.train()
    frames, prompt, answer = 60, model.prompt.ids("asr"), [3, 4, 5, model.tokenizer.eos_id]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, frames, 560), torch.tensor([frames]), ids, torch.ones_like(ids), labels)[0].backward()
    expected = flops_of(model).step(frames, frames // 2, ids.shape[1] - 1 + frames // 2, len(answer))
    between = ("attention", "bmm", "convolution")  # positions
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if any(name in str(op) for name in between))
    # Norms' vectors count as matrices here, which is more of a tiny model than of a real one.
    assert counter.get_total_flops() - attention == pytest.approx(expected, rel=0.1)
