"""Text to speech with espeak-ng, called through its C library, so that a corpus needs no download.

    speech = espeak().synthesise("打开客厅的灯", "cmn", "m8", speed_wpm=160, pitch=50)   # float32 (N,), 16000 Hz

The library comes with ``pip install espeakng-loader`` (104 voice variants) or from the system (``apt install
espeak-ng``). A fresh process says the same sentences the same way; within one process, what was said before shifts
the pitch flutter a little.
"""

import ctypes
import ctypes.util
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from funasr_mooer.data.audio import resample, to_float
from funasr_mooer.errors import MooerError

INSTALL = "install it with `pip install espeakng-loader` (or your system's package, e.g. `apt install espeak-ng`)"

# Names and values of espeak-ng/speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT, _RATE, _PITCH, _CHARS_UTF8 = 2, 0x8000, 1, 3, 1
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(MooerError):
    """No usable espeak-ng, or it refuses a language or voice."""


def espeak() -> "Espeak | EspeakProgram":
    """The espeak-ng of this machine: the wheel's library, else the system's library, else the program.

    Raises:
        SpeechError: if there is none of the three.
    """
    for library, data in _libraries():
        return Espeak(library, data)
    if program := shutil.which("espeak-ng"):
        return EspeakProgram(program)
    raise SpeechError(f"espeak-ng is not on this machine; {INSTALL}")


class Espeak:
    """One espeak-ng library, initialised. It keeps global state: one instance and one thread per process."""

    def __init__(self, library: str, data: str | None):
        self._lib = ctypes.CDLL(library)
        self._lib.espeak_Info.restype = ctypes.c_char_p
        path = data.encode() if data else None
        self._rate_hz = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, path, _DONT_EXIT)
        if self._rate_hz <= 0:
            raise SpeechError(f"{library} does not start (its data folder: {data or 'the default'}); {INSTALL}")
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._collect)  # kept: ctypes does not hold a reference for C
        self._lib.espeak_SetSynthCallback(self._callback)

    def synthesise(self, text: str, language: str, variant: str, speed_wpm: int, pitch: int) -> np.ndarray:
        """Speak ``text``; float32 (N,) in [-1, 1) at 16000 Hz.

        Args:
            text: what to say.
            language: an espeak-ng language, e.g. ``cmn``, ``en-us``, ``en`` (British).
            variant: a voice variant, i.e. a file of ``voices/!v`` in espeak-ng's data.
            speed_wpm: words per minute, 80..450.
            pitch: 0..99, espeak-ng's default is 50.

        Raises:
            SpeechError: for an unknown language or variant.
        """
        if variant not in self.variants():
            raise SpeechError(f"espeak-ng has no voice variant {variant!r}; it has {', '.join(self.variants())}")
        if self._lib.espeak_SetVoiceByName(f"{language}+{variant}".encode()) != 0:
            raise SpeechError(f"espeak-ng has no language {language!r}")
        self._lib.espeak_SetParameter(_RATE, speed_wpm, 0)
        self._lib.espeak_SetParameter(_PITCH, pitch, 0)
        if hasattr(self._lib, "espeak_ng_SetRandSeed"):  # since 1.52
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks = []
        data = text.encode()
        if self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8, None, None) != 0:
            raise SpeechError(f"espeak-ng cannot say {text!r}")
        return _to_16k(np.concatenate(self._chunks or [np.zeros(0, np.int16)]), self._rate_hz)

    def variants(self) -> list[str]:
        """The names of all voice variants."""
        data = ctypes.c_char_p()
        self._lib.espeak_Info(ctypes.byref(data))
        return sorted(file.name for file in (Path(data.value.decode()) / "voices" / "!v").iterdir())

    def _collect(self, samples: "ctypes._Pointer", count: int, events: int) -> int:
        if samples and count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


class EspeakProgram:
    """The same through the ``espeak-ng`` program: slower, one process per sentence."""

    def __init__(self, program: str):
        self._program = program

    def synthesise(self, text: str, language: str, variant: str, speed_wpm: int, pitch: int) -> np.ndarray:
        """As :meth:`Espeak.synthesise`."""
        command = [self._program, "-v", f"{language}+{variant}", "-s", str(speed_wpm), "-p", str(pitch), "--stdout"]
        done = subprocess.run(command, input=text.encode(), capture_output=True)
        if done.returncode != 0:
            raise SpeechError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
        rate_hz = int.from_bytes(done.stdout[24:28], "little")
        return _to_16k(np.frombuffer(done.stdout[44:], dtype="<i2"), rate_hz)  # a wav of 44 header bytes


def _libraries() -> Iterator[tuple[str, str | None]]:
    if importlib.util.find_spec("espeakng_loader"):
        import espeakng_loader

        yield espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    if name := ctypes.util.find_library("espeak-ng"):
        yield name, None


def _to_16k(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    return resample(to_float(samples), rate_hz)
