"""The plain data pipeline that the original MooER describes, as a baseline: written from its description, without tricks.

Tars are streamed; each wav or flac is decoded in memory; fbank is made per utterance the way torchaudio does, window and mel
filters included; seven frames are stacked in a Python loop; CMVN works on tiled statistics; prompt and answer are tokenised
when they are read, and the prompt again to know where labels begin; a buffer of features is shuffled; batches are random.
"""

# Shapes: N samples, T frames of 10 ms, U stacked frames of 60 ms.

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from funasr_mooer.data.fbank import mel_filters
from funasr_mooer.modules.splice import IGNORE_INDEX

Row = tuple[str, Tensor, Tensor, Tensor]  # key, features (U, 560), input ids, labels


def batches(
    tars: Sequence[Path],
    encode: Callable[[str], list[int]],
    prompt: str,
    end: str,
    cmvn: Tensor,
    size: int = 8,
    buffer: int = 20000,
) -> Iterator[dict[str, Tensor | list[str]]]:
    """One epoch of padded batches."""
    rows = shuffled((row(*item, encode, prompt, end, cmvn) for item in stream(tars)), buffer)
    group: list[Row] = []
    for each in rows:
        group.append(each)
        if len(group) == size:
            yield pad(group)
            group = []
    if group:
        yield pad(group)


def stream(tars: Sequence[Path]) -> Iterator[tuple[str, str, bytes]]:
    """Key, text and audio file of each utterance, from the tars as they come."""
    for path in tars:
        text = ""
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                data = tar.extractfile(member).read()
                if kind == "txt":
                    text = data.decode()
                else:
                    yield key, text, data


def row(key: str, text: str, audio: bytes, encode, prompt: str, end: str, cmvn: Tensor) -> Row:
    """One utterance, ready to be padded."""
    samples, rate = soundfile.read(io.BytesIO(audio), dtype="float32")
    feats = normalise(stack(fbank(torch.from_numpy(samples)[None] * (1 << 15), rate)), cmvn)
    before = len(encode(prompt))
    ids = torch.tensor(encode(prompt + text + end))
    labels = ids.clone()
    labels[:before] = IGNORE_INDEX
    return key, feats, ids, labels


def fbank(waveform: Tensor, rate: int, bins: int = 80) -> Tensor:
    """(1, N) -> Kaldi's log mel energies (T, bins), step by step."""
    frame, hop = int(rate * 0.025), int(rate * 0.010)
    frames = waveform[0].unfold(0, frame, hop)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = F.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    frames = (frames - 0.97 * before) * torch.hamming_window(frame, periodic=False)[None]
    fft = 1 << (frame - 1).bit_length()
    power = torch.fft.rfft(F.pad(frames, (0, fft - frame))).abs().pow(2.0)
    energies = torch.mm(power, mel_filters(bins, fft, rate))
    return torch.max(energies, torch.tensor(torch.finfo(torch.float32).eps)).log()


def stack(fbank: Tensor, m: int = 7, n: int = 6) -> Tensor:
    """(T, bins) -> (U, m * bins), one stacked frame at a time."""
    count = -(-len(fbank) // n)
    fbank = torch.vstack([fbank[:1].repeat((m - 1) // 2, 1), fbank])
    found = []
    for i in range(count):
        if m <= len(fbank) - i * n:
            found.append(fbank[i * n : i * n + m].reshape(1, -1))
        else:
            last = fbank[i * n :].reshape(-1)
            for _ in range(m - (len(fbank) - i * n)):
                last = torch.hstack([last, fbank[-1]])
            found.append(last[None])
    return torch.vstack(found)


def normalise(feats: Tensor, cmvn: Tensor) -> Tensor:
    """Shift and scale of (U, 560), by statistics tiled to that size."""
    shift, scale = (torch.from_numpy(np.tile(row.numpy(), (len(feats), 1))) for row in cmvn)
    return (feats + shift) * scale


def shuffled(rows: Iterator[Row], size: int) -> Iterator[Row]:
    """Rows in the random order of a buffer that is filled, shuffled and emptied."""
    rng, held = random.Random(0), []
    for each in rows:
        held.append(each)
        if len(held) >= size:
            rng.shuffle(held)
            yield from held
            held = []
    rng.shuffle(held)
    yield from held


def pad(group: Sequence[Row]) -> dict[str, Tensor | list[str]]:
    """Rows -> one padded batch."""
    group = sorted(group, key=lambda each: len(each[1]), reverse=True)
    keys, feats, ids, labels = zip(*group)
    longest = max(map(len, ids))
    return {
        "keys": list(keys),
        "feats": torch.nn.utils.rnn.pad_sequence(list(feats), batch_first=True),
        "feat_lengths": torch.tensor([len(each) for each in feats]),
        "input_ids": torch.stack([F.pad(each, (0, longest - len(each))) for each in ids]),
        "labels": torch.stack([F.pad(each, (0, longest - len(each)), value=IGNORE_INDEX) for each in labels]),
        "attention_mask": torch.stack(
            [F.pad(torch.ones(len(each), dtype=torch.bool), (0, longest - len(each))) for each in ids]
        ),
    }
