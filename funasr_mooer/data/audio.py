"""Audio from anywhere (file, byte range, Kaldi ark, memory) to 16 kHz mono float32, or one clear error."""

from __future__ import annotations

import functools
import io
import math
import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np

from funasr_mooer.errors import DataError

SAMPLE_RATE = 16000  # Hz, of everything past this file
RATES = (1000, 384000)  # Hz; outside, a header is damaged
_FMT = np.dtype(
    [("layout", "<u2"), ("channels", "<u2"), ("rate", "<u4"), ("bps", "<u4"), ("align", "<u2"), ("b", "<u2")]
)
_PLAIN = struct.Struct("<4sI4s4sIHHIIHH4sI")  # RIFF, the format, then samples at once
LOUDEST = 8.0  # of float samples, which lie in [-1, 1); beyond, they are 16-bit numbers by another name
ZEROS, ROLLOFF = 6, 0.99  # of the resampling filter: zero crossings on each side, cut-off over Nyquist


def read_audio(source: str | os.PathLike | bytes | memoryview, allow_pipes: bool = False) -> np.ndarray:
    """Samples (N,) at 16000 Hz, mono, float32 in [-1, 1).

    Args:
        source: a file (wav, flac, ogg, mp3); ``x.ark:OFFSET``, an entry of a Kaldi ark; ``x.tar:OFFSET:NBYTES``,
            a byte range that holds an audio file; a command ending in ``|``; or the bytes of an audio file.
        allow_pipes: run commands. They run in a shell with your rights: only for a wav.scp you trust.

    Raises:
        DataError: missing, not audio, empty, truncated, or holding NaN.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _finish(*decode(source, "audio bytes"), "audio bytes")
    name = os.fspath(source)
    if name.rstrip().endswith("|"):
        return _finish(*decode(_run(name, allow_pipes), name), name)
    path, offset, nbytes = split_range(name)
    try:
        with open(path, "rb") as file:
            if offset is not None and nbytes is None:
                return _finish(*_read_ark(file, offset, name), name)
            file.seek(offset or 0)
            data = file.read() if nbytes is None else file.read(min(nbytes, os.fstat(file.fileno()).st_size))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if nbytes is not None and len(data) < nbytes:
        raise DataError(f"{name}: truncated: the file ends after {len(data)} of {nbytes} bytes")
    return _finish(*decode(data, name), name)


def split_range(source: str) -> tuple[str, int | None, int | None]:
    """``path[:offset[:nbytes]]`` in its parts; a path that exists as it is written wins."""
    match = re.fullmatch(r"(.+?):(\d+)(?::(\d+))?", source)
    if match is None or os.path.exists(source):
        return source, None, None
    path, offset, nbytes = match.groups()
    return path, int(offset), None if nbytes is None else int(nbytes)


def decode(data: bytes | memoryview, name: str) -> tuple[np.ndarray, int]:
    """An audio file in memory as samples (N,) or (N, C), int16 or float32, and its rate in Hz.

    PCM16 wav comes back as a view of ``data``: nothing is copied.
    """
    pcm = wav_pcm16(data, name)
    if pcm is not None:
        return pcm
    import soundfile

    if len(data) == 0:
        raise DataError(f"{name}: empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, frames = file.samplerate, file.frames
            samples = file.read(dtype="int16" if file.subtype == "PCM_16" else "float32")
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        reason = getattr(error, "error_string", error)
        raise DataError(f"{name}: not audio that can be read ({reason}); use wav, flac, ogg or mp3") from None
    if len(samples) < frames < 2**48:  # libsndfile says 2**63 - 1 where it cannot know
        raise DataError(f"{name}: truncated: {len(samples)} of {frames} samples")
    return samples, rate


def wav_pcm16(data: bytes | memoryview, name: str = "wav") -> tuple[np.ndarray, int] | None:
    """The samples of a PCM16 wav as a view (N,) or (N, C) of ``data``, and the rate; None for any other format.

    Raises:
        DataError: the data chunk of a wav, in whatever format, is missing or longer than the bytes that follow it.
    """
    view = memoryview(data)
    if len(view) > _PLAIN.size:  # the header that nearly every file has, ours among them
        riff, _, wave, fmt, length, layout, channels, rate, _, _, bits, tag, size = _PLAIN.unpack_from(view)
        plain = riff == b"RIFF" and wave == b"WAVE" and fmt == b"fmt " and length == 16 and tag == b"data"
        if plain and (layout, channels, bits) == (1, 1, 16) and size <= len(view) - _PLAIN.size:
            return np.frombuffer(view, "<i2", size // 2, _PLAIN.size), rate
    if bytes(view[:4]) != b"RIFF" or bytes(view[8:12]) != b"WAVE":
        return None
    position, channels, rate, is_pcm16 = 12, 0, 0, None
    while position + 8 <= len(view):
        tag, size = bytes(view[position : position + 4]), int.from_bytes(view[position + 4 : position + 8], "little")
        body = position + 8
        if tag == b"fmt " and body + 16 <= len(view):
            layout, channels, rate, _, _, bits = np.frombuffer(view, _FMT, 1, body)[0].tolist()
            if layout == 0xFFFE and size >= 26:  # WAVE_FORMAT_EXTENSIBLE: the format proper is in the sub-format
                layout = int.from_bytes(view[body + 24 : body + 26], "little")
            is_pcm16 = layout == 1 and bits == 16 and channels > 0
        elif tag == b"data":
            if is_pcm16 is None:
                raise DataError(f"{name}: damaged wav: data before its format")
            present = len(view) - body
            if size >= 0x7FFFFF00:  # written to a pipe, by a program that could not seek back to fill it in
                size = present
            if size > present:
                raise DataError(f"{name}: truncated: {present} of {size} bytes of samples")
            if not is_pcm16:
                return None
            samples = np.frombuffer(view, "<i2", size // 2 // channels * channels, body)
            return (samples if channels == 1 else samples.reshape(-1, channels)), rate
        position = body + size + size % 2
    raise DataError(f"{name}: truncated: a wav header and no samples")


def to_float(samples: np.ndarray) -> np.ndarray:
    """int16 to float32 in [-1, 1); floats as float32."""
    if samples.dtype == np.int16:
        return samples * np.float32(1 / 32768)
    return samples.astype(np.float32, copy=False)


def resample(x: np.ndarray, rate: int, new_rate: int = SAMPLE_RATE) -> np.ndarray:
    """(N,) float32 at ``rate`` Hz -> (ceil(N * new_rate / rate),) at ``new_rate`` Hz.

    Band-limited interpolation: sample n of the output, at time n / new_rate, is a weighted sum of the input around that
    time; the weights are a sinc with 6 zero crossings on each side under a Hann window, cut off at 0.99 of the lower
    Nyquist frequency. The released MooER features were made with this filter, so a sharper one would not match them.
    """
    if rate == new_rate:
        return x
    step = math.gcd(rate, new_rate)
    rate, new_rate = rate // step, new_rate // step
    weights, width = _phases(rate, new_rate)  # (new_rate, taps)
    n = np.arange(-(-len(x) * new_rate // rate))
    padded = np.pad(x, (width, width + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[1])  # (N + 1 - .., taps)
    return np.einsum("nk,nk->n", windows[n * rate // new_rate], weights[n % new_rate])


@functools.lru_cache(maxsize=16)
def _phases(rate: int, new_rate: int) -> tuple[np.ndarray, int]:
    """Filter weights (new_rate, 2 * width + 2) for each position of an output sample between input samples."""
    cutoff = ROLLOFF * min(rate, new_rate)
    width = math.ceil(ZEROS * rate / cutoff)
    n = np.arange(new_rate)[:, None]
    taps = n * rate // new_rate + np.arange(-width, width + 2)  # input samples around each output sample
    # The time of an output sample is rounded to float32, as it was when the released features were made: in near silence
    # that rounding is visible after CMVN (5e-4).
    time = (n.astype(np.float32) / np.float32(new_rate)).astype(np.float64)
    t = (taps / rate - time) * cutoff  # in zero crossings
    window = np.where(np.abs(t) < ZEROS, np.cos(t * math.pi / ZEROS / 2) ** 2, 0)
    return (np.sinc(t) * window * cutoff / rate).astype(np.float32), width


def _finish(samples: np.ndarray, rate: int, name: str) -> np.ndarray:
    """Any decoded audio as 16 kHz mono float32."""
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"{name}: a sample rate of {rate} Hz cannot be right")
    if samples.size == 0:
        raise DataError(f"{name}: empty: no samples")
    samples = to_float(samples)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise DataError(f"{name}: holds NaN or infinite samples")
    return resample(samples, rate)


def _read_ark(file: io.BufferedReader, offset: int, name: str) -> tuple[np.ndarray, int]:
    """One entry of a Kaldi ark: a wav or flac with its own rate, or a float vector at 16000 Hz."""
    from kaldiio.matio import read_kaldi

    file.seek(offset)
    magic = file.read(4)
    file.seek(offset)
    if magic in (b"RIFF", b"fLaC"):
        return decode(_ark_file(file, name), name)
    if magic[:3] == b"PKL":  # kaldiio would unpickle it: code from a data file
        raise DataError(f"{name}: a pickle in an ark is not read; write the ark with kaldiio's default format")
    try:
        entry = read_kaldi(file)
    except (ValueError, RuntimeError, EOFError, AssertionError, OSError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{name}: no audio at this offset of the ark, or a truncated one ({error})") from None
    rate, samples = entry if isinstance(entry, tuple) else (SAMPLE_RATE, entry)
    samples = np.asarray(samples)
    if samples.dtype != np.int16:
        samples = samples.astype(np.float32)
        if samples.size and np.nanmax(np.abs(samples)) > LOUDEST:  # Kaldi keeps 16-bit numbers in its float vectors
            samples = samples / 32768
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # Kaldi's wave data are (C, N)
    return samples, int(rate)


def _ark_file(file: io.BufferedReader, name: str) -> bytes:
    """The bytes of a whole audio file that starts here; for wav exactly its own, for flac all that follow."""
    head = file.read(8)
    if head[:4] == b"fLaC":
        return head + file.read()
    size = int.from_bytes(head[4:], "little")
    body = file.read(size)
    if len(body) < size and size < 0x7FFFFF00:
        raise DataError(f"{name}: truncated: {len(body)} of {size} bytes")
    return head + body


def _run(command: str, allowed: bool) -> bytes:
    if not allowed:
        raise DataError(f"'{command}': a command in place of a file; allow it with allow_pipes (--allow-pipes)")
    done = subprocess.run(command.rstrip().rstrip("|"), shell=True, capture_output=True)  # the user asked for it
    if done.returncode != 0:
        tail = done.stderr.decode(errors="replace").strip()[-200:]
        raise DataError(f"'{command}': exit status {done.returncode}: {tail}")
    return done.stdout


def write_wav(
    path: str | Path | io.BytesIO, samples: np.ndarray, sample_rate: int = SAMPLE_RATE, form: str = "WAV"
) -> None:
    """Write float32 (N,) or (N, C), or int16, as PCM16 ``WAV`` or ``FLAC``."""
    import soundfile

    soundfile.write(path, to_pcm16(samples), sample_rate, format=form, subtype="PCM_16")


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1) as int16, clipped."""
    if samples.dtype == np.int16:
        return samples
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
