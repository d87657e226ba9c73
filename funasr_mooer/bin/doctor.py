"""Check this machine: drivers, torch, devices, DeepSpeed, FunASR, audio, disk; say what to do about each trouble.

One line per check, `ok | warn | FAIL  name  value - what to do`. Exit code 1 if a line says FAIL: something that the
package cannot work without. A warning is something that only part of it needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from funasr_mooer.bin.cli import run

GIB = 2**30
FORMATS = ("WAV", "FLAC", "OGG", "MP3")  # what speech corpora come in
DRIVER_TOOLS = {"cuda": "nvidia-smi", "musa": "mthreads-gmi"}
FUNASR_MODELS = 30  # FunASR 1.4 registers 51; beside a broken torchaudio 8
COUNT_FUNASR = """
import funasr
from funasr.register import tables
counts = len(tables.model_classes), len(tables.dataset_classes)
try:
    from funasr_mooer.register import register_all
    register_all()
    plugin = "registered"
except Exception as error:
    plugin = " ".join(f"{type(error).__name__}: {error}".split())
print(*counts, plugin)
"""
CONSTRAINTS = Path(__file__).parents[2] / "constraints"  # there in a checkout, not in an installed wheel


@dataclass(frozen=True)
class Check:
    """One line: ``status`` is ok, warn or FAIL."""

    status: str
    name: str
    value: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:4} {self.name:18} {self.value}{' - ' + self.advice if self.advice else ''}"


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a check failed."""
    argparse.ArgumentParser("funasr-mooer doctor", description=__doc__.partition("\n")[0]).parse_args(argv)
    failed = False
    for check in checks():
        print(check, flush=True)
        failed |= check.status == "FAIL"
    return int(failed)


def checks() -> Iterator[Check]:
    """All checks, each as soon as it is known."""
    yield from python()
    yield from packages()
    yield from torch_and_devices()
    yield from deepspeed()
    yield from torchaudio()
    yield from funasr()
    yield from audio()
    yield from commands()
    yield from room()


def python() -> Iterator[Check]:
    """The interpreter, and whether it prints Chinese."""
    yield Check("ok", "python", f"{platform.python_version()} {platform.machine()}")
    encoding = sys.stdout.encoding or "none"
    if encoding.lower().replace("-", "") != "utf8":
        yield Check("warn", "terminal", encoding, "transcripts need UTF-8: export PYTHONUTF8=1 LANG=C.UTF-8")


def packages() -> Iterator[Check]:
    """Every requirement of setup.cfg against what is installed, and against the versions that were tested."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("funasr_mooer") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "warn", "funasr_mooer", "not installed", "pip install -e . in the checkout, so that its needs are known"
        )
        return
    tested = tested_versions()
    for requirement in requirements:
        extra = re.search(r"""extra == ['"](\w+)""", str(requirement.marker or ""))
        yield package(requirement, extra[1] if extra else "", tested.get(_canonical(requirement.name), ""))


def package(requirement: Requirement, extra: str, tested: str) -> Check:
    """One requirement; a missing one fails unless only an extra needs it."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            return Check(
                "warn", requirement.name, "not installed", f"pip install 'funasr-mooer[{extra}]' if you need it"
            )
        return Check("FAIL", requirement.name, "not installed", f"pip install '{requirement}'")
    if not requirement.specifier.contains(version, prereleases=True):
        status = "warn" if extra else "FAIL"
        wanted = f"{requirement.name}{requirement.specifier}"
        return Check(status, requirement.name, version, f"too old: pip install '{wanted}'")
    note = f" (tested with {tested})" if tested and version.split("+")[0] != tested else ""
    return Check("ok", requirement.name, version + note)


def tested_versions() -> dict[str, str]:
    """Package -> version from the checkout's ``constraints/cpu.txt``; empty without a checkout."""
    path = CONSTRAINTS / "cpu.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {_canonical(pin[1]): pin[2] for pin in pins if pin}


def torch_and_devices() -> Iterator[Check]:
    """Driver, torch build, and the devices that torch really sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        yield Check("FAIL", "torch build", told, "reinstall torch, the build for this machine's driver")
        return
    from funasr_mooer import device

    builds = {kind: getattr(torch.version, kind, None) for kind in device.ACCELERATORS}
    build = ", ".join(f"{kind} {version}" for kind, version in builds.items() if version) or "CPU only"
    yield Check("ok", "torch build", f"{torch.__version__} ({build})")
    for kind in device.ACCELERATORS:
        driver = driver_of(kind)
        usable = device.is_available(kind)
        if driver:
            advice = (
                ""
                if usable
                else f"torch sees no {kind} device: "
                + (
                    "the driver is too old for this build, or the container was started without devices"
                    if builds[kind]
                    else f"this torch is not a {kind} build; install the vendor's"
                )
            )
            yield Check("ok" if usable else "warn", f"{kind} driver", driver, advice)
        if usable:
            for line in device.describe(kind):
                yield Check("ok", kind, line)
    default = device.resolve("auto")
    yield Check("ok", "cpu", device.describe("cpu")[0])
    yield Check("ok", "device auto", default.type)
    bf16 = device.supports_bf16(default)
    status = "ok" if bf16 or default.type == "cpu" else "warn"
    yield Check(status, "bfloat16", "yes" if bf16 else "no", "" if bf16 else f"use float32 on this {default.type}")


def driver_of(kind: str) -> str:
    """Version of the vendor's driver, ``unknown`` if its tool says none, '' if there is no tool."""
    tool = shutil.which(DRIVER_TOOLS[kind])
    if not tool:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"] if kind == "cuda" else [tool]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    version = re.search(r"\d+\.\d+[\d.]*", told)
    return version[0] if version else "unknown"


def deepspeed() -> Iterator[Check]:
    """Whether DeepSpeed loads, and which accelerator it would use."""
    if not importlib.util.find_spec("deepspeed"):
        return  # packages() said so
    code = "from deepspeed.accelerator import get_accelerator as get; print(get()._name, get().communication_backend_name())"
    works, told = probe(code)
    if not works:
        yield Check("warn", "deepspeed", told, "train with train_conf.use_deepspeed: false, or reinstall it")
        return
    from funasr_mooer import device

    kind = device.resolve("auto").type
    fits = told.split()[0] == kind or kind == "musa"  # for MUSA training gives DeepSpeed our accelerator class
    advice = "" if fits else f"torch has {kind}: DeepSpeed needs the vendor's build for it"
    yield Check("warn" if advice else "ok", "deepspeed", f"accelerator {told}", advice)


def torchaudio() -> Iterator[Check]:
    """A torchaudio that raises OSError is the worst case: FunASR swallows it and registers almost nothing."""
    if not importlib.util.find_spec("torchaudio"):
        yield Check("ok", "torchaudio", "not installed (not needed)")
        return
    works, told = probe("import torchaudio; print(torchaudio.__version__)")
    advice = "pip uninstall torchaudio: it does not fit this torch, and FunASR loses most of its models beside it"
    yield Check("ok", "torchaudio", told) if works else Check("FAIL", "torchaudio", told, advice)


def funasr() -> Iterator[Check]:
    """Whether FunASR registers its models, and ours among them."""
    works, told = probe(COUNT_FUNASR)
    if not works:
        yield Check("FAIL", "funasr registry", told, "FunASR itself does not import: pip install --upgrade funasr")
        return
    models, datasets, plugin = told.split(maxsplit=2)
    healthy = int(models) >= FUNASR_MODELS and int(datasets) > 0
    advice = (
        "" if healthy else "FunASR could not import its own parts; see torchaudio above, or python -c 'import funasr'"
    )
    yield Check("ok" if healthy else "FAIL", "funasr registry", f"{models} models, {datasets} datasets", advice)
    advice = "" if plugin == "registered" else "python -c 'import funasr_mooer.register' shows where it stops"
    yield Check("FAIL" if advice else "ok", "plugin", plugin, advice)


def audio() -> Iterator[Check]:
    """Features and file formats."""
    try:
        from kaldi_native_fbank import FbankOptions, OnlineFbank

        fbank = OnlineFbank(FbankOptions())
        fbank.accept_waveform(16000, [0.0] * 1600)
        yield Check("ok", "fbank", f"kaldi-native-fbank, {fbank.num_frames_ready} frames from 100 ms")
    except (ImportError, OSError) as error:
        yield Check("FAIL", "fbank", str(error), "FunASR's WavFrontend needs it: pip install kaldi-native-fbank")
    try:
        import soundfile

        absent = [name for name in FORMATS if name not in soundfile.available_formats()]
        advice = f"convert {', '.join(absent)} files first, or update libsndfile to 1.1" if absent else ""
        yield Check("warn" if absent else "ok", "soundfile", soundfile.__libsndfile_version__, advice)
    except (ImportError, OSError) as error:
        yield Check("FAIL", "soundfile", str(error), "apt install libsndfile1, or pip install --upgrade soundfile")


def commands() -> Iterator[Check]:
    """Programs that some recipes call."""
    espeak = shutil.which("espeak-ng") or ("espeakng-loader" if importlib.util.find_spec("espeakng_loader") else "")
    advice = "" if espeak else "only synthetic speech needs it: pip install 'funasr-mooer[mini]'"
    yield Check("ok" if espeak else "warn", "espeak-ng", espeak or "not found", advice)
    ffmpeg = shutil.which("ffmpeg")
    advice = "" if ffmpeg else "only m4a, aac and video files need it"
    yield Check("ok" if ffmpeg else "warn", "ffmpeg", ffmpeg or "not found", advice)


def room() -> Iterator[Check]:
    """Disk space here, and the shared memory that loader workers pass batches through."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    status = "FAIL" if free < 1 else "warn" if free < 20 else "ok"
    yield Check(status, "disk", f"{free:.0f} GiB free here", "" if status == "ok" else "a 7B model alone takes 15 GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / GIB
        advice = "" if size >= 1 else "loader workers may die of a bus error: docker run --shm-size=8g"
        yield Check("warn" if advice else "ok", "shared memory", f"{size:.1f} GiB", advice)


def probe(code: str, timeout_s: float = 120) -> tuple[bool, str]:
    """Run Python code in a process of its own (a crash or half an import stays there): did it work, its last line."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, "PYTHONUTF8": "1"}
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"exit {done.returncode}"]
    return done.returncode == 0, lines[-1]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
