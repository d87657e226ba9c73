"""Recognise speech while it is spoken: files or the microphone, text as it comes, then how long it took."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from funasr_mooer.bin.cli import run
from funasr_mooer.errors import ConfigError

if TYPE_CHECKING:
    from funasr_mooer.u2pp_moe.streaming import Streamer

EXAMPLES = """examples:
  funasr-mooer stream --model exp/u2pp_moe/best --microphone               # until Ctrl-C
  funasr-mooer stream --model exp/u2pp_moe/best --wav meeting.wav --realtime
  funasr-mooer stream --model exp/u2pp_moe/best --wav a.wav b.wav c.wav    # three streams in one batch
  funasr-mooer stream --model exp/u2pp_moe/best --wav a.wav --chunk-ms 320 ++method=ctc_greedy_search ++endpoint_conf.silence_after_text_ms=600

A final line is "start - end  text", times in seconds from the start of the stream.
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    args, settings = parse(argv)
    from funasr_mooer.u2pp_moe.latency import LatencyMeter

    streamer, sample_rate = build(args, settings)
    if args.microphone:
        names, source = ["microphone"], microphone(sample_rate, args.piece_ms)
    else:
        names = [Path(wav).name for wav in args.wav]
        source = files(args.wav, sample_rate, args.piece_ms, args.realtime)
    display = Display(names, sys.stdout)
    meter = LatencyMeter(len(names))
    listen(streamer, source, sample_rate, display, meter)
    print(report(meter.figures()), file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the ``++key=value`` settings in it."""
    from funasr_mooer.config import override

    parser = argparse.ArgumentParser(
        prog="funasr-mooer stream",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory of a U2ppMoE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--wav", nargs="+", metavar="FILE", help="audio files; several are several streams in one batch"
    )
    source.add_argument("--microphone", action="store_true", help="needs the extra [stream]; Ctrl-C ends it")
    parser.add_argument("--chunk-ms", type=float, metavar="MS", help="audio that the encoder hears at once; 16 frames")
    parser.add_argument("--piece-ms", type=float, default=100, metavar="MS", help="audio that is handed over at once")
    parser.add_argument("--realtime", action="store_true", help="feed files at the pace at which they were spoken")
    parser.add_argument("--no-endpoint", action="store_true", help="one segment per stream, however long")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or musa")
    # "++key=value" must be taken out first: it would count as another FILE.
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([text for text in argv if not text.startswith("++")])
    if args.piece_ms < 1:
        raise ConfigError(f"--piece-ms {args.piece_ms:g}: hand over at least 1 ms at once")
    return args, override({}, [text for text in argv if text.startswith("++")], "streaming settings")


def build(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Streamer, int]:
    """The streamer that was asked for, and the sample rate of its model, Hz.

    Raises:
        ConfigError: a model that does not stream, or a setting that cannot work.
    """
    from funasr_mooer.bin.decode import check_settings
    from funasr_mooer.border.build import load_model
    from funasr_mooer.config import section
    from funasr_mooer.u2pp_moe.endpoint import EndpointConf
    from funasr_mooer.u2pp_moe.model import U2ppMoEModel
    from funasr_mooer.u2pp_moe.search import DECODE_KEYS, decode_conf
    from funasr_mooer.u2pp_moe.streaming import Streamer

    check_settings(settings, (*DECODE_KEYS, "endpoint_conf"))
    model = load_model(args.model, args.device)
    if not isinstance(model, U2ppMoEModel):
        raise ConfigError(f"{args.model} holds a {model.config['model']}, which does not stream; U2ppMoE does")
    conf = decode_conf(model.config.get("decode_conf"), settings)
    if args.chunk_ms is not None:
        frames = chunk_frames(args.chunk_ms, model.encoder.frame_ms)
        conf = dataclasses.replace(conf, decoding_chunk_size=frames)
    rules = {**(model.config.get("endpoint_conf") or {}), **(settings.get("endpoint_conf") or {})}
    endpoint = None if args.no_endpoint else section(EndpointConf, rules, "endpoint_conf")
    return Streamer(model, conf, endpoint), model.features.conf.fs


def chunk_frames(chunk_ms: float, frame_ms: float) -> int:
    """Encoder frames of a chunk.

    Raises:
        ConfigError: not a whole number of frames, or none.
    """
    frames = round(chunk_ms / frame_ms)
    if frames < 1 or abs(frames * frame_ms - chunk_ms) > 1e-3:
        near = sorted({max(1, frames), max(1, int(chunk_ms // frame_ms)), max(1, int(chunk_ms // frame_ms)) + 1})
        options = ", ".join(f"{n * frame_ms:g}" for n in near)
        raise ConfigError(f"--chunk-ms {chunk_ms:g} is not a multiple of the encoder's {frame_ms:g} ms; use {options}")
    return frames


# Per call of the streamer: each stream's piece, or None once it has ended, and whether it ends with it.
Pieces = list[tuple[np.ndarray, bool] | None]
END = b""  # among pieces of the microphone: Ctrl-C


def files(paths: Sequence[str], sample_rate: int, piece_ms: float, realtime: bool) -> Iterator[Pieces]:
    """Audio files in pieces, side by side; in real time no piece comes before it was spoken."""
    from funasr_mooer.data.audio import SAMPLE_RATE, read_audio, resample

    waves = [read_audio(path) for path in paths]
    if sample_rate != SAMPLE_RATE:
        waves = [resample(wave, SAMPLE_RATE, sample_rate) for wave in waves]
    size = max(1, round(sample_rate * piece_ms / 1000))
    started = time.perf_counter()
    for start in range(0, max(1, *map(len, waves)), size):
        if realtime:
            time.sleep(max(0.0, started + (start + size) / sample_rate - time.perf_counter()))
        yield [
            (wave[start : start + size], start + size >= len(wave)) if start < max(1, len(wave)) else None
            for wave in waves
        ]


def microphone(sample_rate: int, piece_ms: float) -> Iterator[Pieces]:
    """Pieces of what the default microphone hears, until Ctrl-C.

    Raises:
        DependencyError: sounddevice, or the library under it, is not installed.
    """
    import queue
    import signal

    from funasr_mooer.errors import DependencyError

    try:
        import sounddevice
    except ImportError as error:
        raise DependencyError("--microphone needs sounddevice: pip install 'funasr-mooer[stream]'") from error
    except OSError as error:
        raise DependencyError(f"--microphone: {error}; install PortAudio (Debian: libportaudio2)") from error

    heard: queue.Queue[bytes] = queue.Queue()
    device = sounddevice.RawInputStream(
        samplerate=sample_rate,
        channels=1,
        dtype="int16",
        blocksize=max(1, round(sample_rate * piece_ms / 1000)),
        callback=lambda data, frames, when, status: heard.put(bytes(data)),
    )
    # Ctrl-C is one more thing that is heard: it may come while the model works, and must not cost the last words.
    before = signal.signal(signal.SIGINT, lambda *_: heard.put(END))
    try:
        with device:
            ended = False
            while not ended:
                pieces = [heard.get()]
                while not heard.empty():  # what came in while the last piece was worked on
                    pieces.append(heard.get())
                ended = END in pieces
                yield [(np.frombuffer(b"".join(pieces), np.int16), ended)]
    finally:
        signal.signal(signal.SIGINT, before)


def listen(streamer: Streamer, source: Iterator[Pieces], sample_rate: int, display: Display, meter: Any) -> None:
    """Feed every piece, show what is heard, take down the times."""
    streams = [streamer.open() for _ in display.names]
    for pieces in source:
        chosen = [i for i, piece in enumerate(pieces) if piece is not None]
        audio, ends = zip(*(pieces[i] for i in chosen))
        started = time.perf_counter()
        results = streamer.feed([streams[i] for i in chosen], audio, ends)
        compute_s = time.perf_counter() - started
        meter.fed(chosen, [len(piece) / sample_rate for piece in audio], compute_s, results)
        for i, result in zip(chosen, results):
            display.show(i, result)


class Display:
    """Text as it comes: one line that is written again and again on a terminal, a line per change elsewhere.

    Args:
        names: of the streams; shown where there is more than one.
        out: where to.
    """

    def __init__(self, names: Sequence[str], out: TextIO):
        self.names, self.out = list(names), out
        self.rewrites = out.isatty() and len(names) == 1
        self.shown = [""] * len(names)

    def show(self, i: int, result: dict[str, Any]) -> None:
        """What stream ``i`` has to say after a piece."""
        for segment in result["segments"]:
            self._line(i, f"{segment['start_ms'] / 1000:.2f} - {segment['end_ms'] / 1000:.2f}  {segment['text']}")
        if "warning" in result:
            self._line(i, f"({result['warning']})")
        if not result["is_final"]:
            self._partial(i, result["text"])

    def _partial(self, i: int, text: str) -> None:
        if text == self.shown[i]:
            return
        self.shown[i] = text
        if self.rewrites:
            self.out.write("\r\x1b[K" + _last_cells(text, shutil.get_terminal_size().columns - 1))
        elif text:
            self.out.write(f"{self._name(i)}... {text}\n")
        self.out.flush()

    def _line(self, i: int, text: str) -> None:
        self.out.write(("\r\x1b[K" if self.rewrites else "") + f"{self._name(i)}{text}\n")
        self.out.flush()
        self.shown[i] = ""

    def _name(self, i: int) -> str:
        return f"{self.names[i]}  " if len(self.names) > 1 else ""


def report(figures: dict[str, float]) -> str:
    """The latency figures, a name, a value and a unit per line."""
    units = {"_ms": "ms", "_s": "s"}
    lines = []
    for name, value in figures.items():
        unit = next((unit for end, unit in units.items() if name.endswith(end)), "")
        lines.append(f"{name.removesuffix(f'_{unit}').replace('_', ' '):24} {value:.4g} {unit}".rstrip())
    return "\n".join(lines)


def _last_cells(text: str, width: int) -> str:
    """The end of a text that fits into so many terminal cells; CJK characters take two."""
    taken, kept = 0, len(text)
    while kept and taken < width:
        kept -= 1
        taken += 2 if unicodedata.east_asian_width(text[kept]) in "WF" else 1
    return text[kept + (taken > width) :]


if __name__ == "__main__":
    sys.exit(main())
