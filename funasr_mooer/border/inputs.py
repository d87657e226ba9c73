"""Loose inputs of FunASR's ``inference`` as one padded batch, and its results."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funasr_mooer.data.audio import LOUDEST, RATES, SAMPLE_RATE, read_audio, resample
from funasr_mooer.data.features import Features
from funasr_mooer.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Inputs:
    """Loose audio as one batch.

    Attributes:
        utt_ids: one name per row.
        feats: (B, T, F) features, zero beyond each length.
        feat_lengths: (B,) frames.
        warnings: why a row cannot be decoded (silence), or an empty string.
        audio_s: seconds of audio in all.
    """

    utt_ids: list[str]
    feats: Tensor
    feat_lengths: Tensor
    warnings: list[str]
    audio_s: float


def read_inputs(
    data_in: Sequence[Any],
    data_lengths: Tensor | None,
    key: Sequence[str] | None,
    config: Mapping[str, Any],
    features: Features,
    max_audio_s: float,
    silence_dbfs: float,
) -> Inputs:
    """Read what FunASR hands to ``inference``: paths, bytes, arrays or tensors of samples; or features.

    Arrays are 16 kHz mono unless ``fs`` says otherwise; (C, N) and (N, C) are mixed down.

    Raises:
        DataError: audio that cannot be read, is longer than ``max_audio_s`` or is of an unknown kind.
    """
    if config.get("data_type") == "fbank":
        return _features_given(data_in, data_lengths, key)
    if isinstance(data_in, (str, os.PathLike, bytes, np.ndarray, Tensor)):
        data_in = [data_in]
    utt_ids = [str(k) for k in key] if key else [f"utt{i}" for i in range(len(data_in))]
    rate = SAMPLE_RATE if config.get("fs") is None else config["fs"]
    if not isinstance(rate, numbers.Real) or not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"fs={rate}: expected the sample rate of the arrays, such as {SAMPLE_RATE} Hz")
    waves = [_samples(item, int(rate), utt_id) for item, utt_id in zip(data_in, utt_ids)]
    for utt_id, wave in zip(utt_ids, waves):
        seconds = len(wave) / SAMPLE_RATE
        if seconds > max_audio_s:
            raise DataError(
                f"{utt_id}: lasts {seconds:.1f} s, this model hears at most {max_audio_s:g} s at a time; "
                'AutoModel(..., vad_model="silero-vad") cuts longer audio at pauses (or raise model_conf.max_audio_s)'
            )
    feats, lengths = features.batch(waves)
    warnings = [_silence(wave, silence_dbfs) for wave in waves]
    return Inputs(utt_ids, feats, lengths, warnings, sum(map(len, waves)) / SAMPLE_RATE)


def infer(
    model: Any,
    data_in: Sequence[Any],
    data_lengths: Tensor | None,
    key: Sequence[str] | None,
    config: Mapping[str, Any],
    decode: Callable[[Tensor, Tensor], list[dict[str, Any]]],
    positions: Callable[[Tensor], Tensor],
    unit: str,
    return_token_ids: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What every model's ``inference`` does around its own search: read, decode, report.

    Args:
        model: its ``features``, ``model_conf`` (``max_audio_s``, ``silence_dbfs``) and device are used.
        data_in: see :func:`read_inputs`, as ``data_lengths``, ``key`` and ``config``.
        data_lengths: frames of each feature matrix.
        key: utterance ids.
        config: FunASR's config and the call's settings.
        decode: see :func:`decode_inputs`.
        positions: feature frames (B,) -> what the model makes of them, (B,).
        unit: what one position is.
        return_token_ids: keep ``token_ids`` in the results.

    Returns:
        one ``{"key", "text", ...}`` per input, in order, and timing for FunASR's progress line.

    Raises:
        ConfigError: hotwords, for a model that knows none.
    """
    wanted = next((name for name in ("hotword", "hotwords") if config.get(name)), None)
    if wanted and "hotwords" not in model.decode_keys:
        raise ConfigError(
            f"{wanted}: {model.config['model']} cannot be told which words to expect; remove it (U2ppMoE can)"
        )
    started = time.perf_counter()
    limits = {"max_audio_s": model.model_conf.max_audio_s, "silence_dbfs": model.model_conf.silence_dbfs}
    batch = read_inputs(data_in, data_lengths, key, config, model.features, **limits)
    loaded = time.perf_counter()
    device = next(model.parameters()).device
    results = decode_inputs(batch, positions(batch.feat_lengths), unit, device, decode)
    if not return_token_ids:
        for result in results:
            result.pop("token_ids", None)
    return results, {"load_data": f"{loaded - started:0.3f}", "batch_data_time": max(batch.audio_s, 1e-3)}


def decode_inputs(
    batch: Inputs,
    positions: Tensor,
    unit: str,
    device: torch.device,
    decode: Callable[[Tensor, Tensor], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Decode the rows that can be decoded; the others get an empty text and a warning that says why.

    Args:
        batch: the inputs.
        positions: (B,) what the model makes of each row, in its own positions.
        unit: what one position is, for the warning of audio that is shorter.
        device: where the model is.
        decode: feats (B', T, F) and lengths (B',) on that device -> result fields of each row.

    Returns:
        ``{"key", "text", ...}`` per row, in order.
    """
    results: list[dict[str, Any]] = []
    speaking = []
    for row, (utt_id, warning) in enumerate(zip(batch.utt_ids, batch.warnings)):
        results.append({"key": utt_id, "text": ""})
        if not warning and positions[row] == 0:
            warning = f"shorter than {unit}"
        if warning:
            results[row] |= {"token_ids": [], "warning": warning}
            log.warning("%s: %s; its text is left empty", utt_id, warning)
        else:
            speaking.append(row)
    if speaking:
        lengths = batch.feat_lengths[speaking]
        feats = batch.feats[speaking, : int(lengths.max())]
        for row, fields in zip(speaking, decode(feats.to(device), lengths.to(device))):
            results[row].update(fields)
    return results


def _features_given(data_in: Any, data_lengths: Tensor | None, key: Sequence[str] | None) -> Inputs:
    feats = torch.as_tensor(data_in if isinstance(data_in, (Tensor, np.ndarray)) else np.stack(data_in)).float()
    feats = feats[None] if feats.dim() == 2 else feats
    lengths = torch.full((len(feats),), feats.shape[1]) if data_lengths is None else torch.as_tensor(data_lengths)
    utt_ids = [str(k) for k in key] if key else [f"utt{i}" for i in range(len(feats))]
    return Inputs(utt_ids, feats, lengths.long(), [""] * len(feats), float(lengths.sum()) * 0.06)


def _samples(item: Any, rate: int, utt_id: str) -> np.ndarray:
    """(N,) float32 at 16 kHz out of one input."""
    if isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)):
        return read_audio(item)
    if not isinstance(item, (np.ndarray, Tensor, list)):
        raise DataError(f"{utt_id}: cannot take audio from a {type(item).__name__}; give a path, bytes or an array")
    wave = np.asarray(item.detach().cpu() if isinstance(item, Tensor) else item)
    if wave.ndim == 2:
        wave = wave.mean(axis=int(np.argmin(wave.shape)))
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.number):
        raise DataError(f"{utt_id}: expected samples (N,), found an array {wave.dtype} {wave.shape}")
    if np.issubdtype(wave.dtype, np.integer):
        if wave.dtype not in (np.int16, np.int32):
            raise DataError(f"{utt_id}: {wave.dtype} samples have no known scale; give int16, or floats in [-1, 1)")
        wave = wave / np.float32(2 ** (8 * wave.dtype.itemsize - 1))
    wave = wave.astype(np.float32)
    if not np.isfinite(wave).all():
        raise DataError(f"{utt_id}: holds NaN or infinite samples")
    if len(wave) and np.abs(wave).max() > LOUDEST:
        raise DataError(
            f"{utt_id}: samples up to {np.abs(wave).max():g}; floats lie in [-1, 1), 16-bit numbers are int16"
        )
    return resample(wave, rate) if rate != SAMPLE_RATE else wave


def _silence(wave: np.ndarray, threshold_dbfs: float) -> str:
    """A warning where even the loudest 100 ms are below the threshold; else an empty string."""
    window = SAMPLE_RATE // 10
    padded = np.pad(wave, (0, -len(wave) % window)).reshape(-1, window)
    power = float((padded.astype(np.float64) ** 2).mean(axis=1).max()) if len(wave) else 0.0
    level = 10 * np.log10(max(power, 1e-12))
    return "" if level >= threshold_dbfs else f"silence: the loudest 100 ms are at {level:.0f} dBFS"
