"""Experts that no frame came to, on one process or on all: gradients of zeros, and the weights of one process."""

from pathlib import Path

import pytest
import torch
from expert_training import by_hand, run

ZERO2 = Path(__file__).resolve().parents[2] / "conf/deepspeed/zero2.json"


@pytest.mark.parametrize("config", [None, pytest.param(str(ZERO2), marks=pytest.mark.slow)], ids=["ddp", "zero2"])
def test_idle_experts_have_gradients_of_zeros_and_every_process_goes_on_alike(config, tmp_path):
    if config:
        pytest.importorskip("deepspeed")
    assert run(config, tmp_path) == [0, 0]
    grads, weights = by_hand()
    for rank in range(2):
        found, after = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in grads.items():
            assert found[name] is not None, name
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
            if name != "layer.gate.weight":
                assert not found[name][2:].any(), name  # experts 2 and 3 saw nothing anywhere
                assert found[name][1].any(), name  # expert 1 saw frames on one process only
        for name, expected in weights.items():
            torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)
