"""Features on the model's device: workers ship padded waveforms, an accelerator makes the features of a whole batch.

A worker then only copies samples. What the model gets is what the worker would have computed: features in float32, SpecAug
and its kin included; changes of the waveform itself (speed, gain, noise) stay with the worker, which then ships float samples.
"""

# Shapes: B rows, N samples, U stacked frames, F feature size.

from __future__ import annotations

import dataclasses

import torch

from funasr_mooer.data.augment import change_
from funasr_mooer.data.batch import Batch
from funasr_mooer.data.features import Features


class DeviceFeatures:
    """Turns the waveforms of a batch into features, on ``device``.

    Args:
        features: the frontend.
        device: where the model is.
    """

    def __init__(self, features: Features, device: torch.device):
        self.features, self.device = features.to(device), device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with ``feats`` (B, U, F) in place of ``waves`` (B, N) and ``wave_lengths`` (B,)."""
        inputs = dict(batch.inputs)
        waves = inputs.pop("waves").to(self.device, non_blocking=True)
        lengths = inputs.pop("wave_lengths").to(self.device, non_blocking=True)
        feats = self.features.padded(waves, lengths, batch.padded_frames // len(lengths))
        for row, changes in zip(feats, batch.changes):
            change_(row, changes, self.features.conf.n_mels)
        return dataclasses.replace(batch, inputs={"feats": feats, **inputs}, changes=[])
