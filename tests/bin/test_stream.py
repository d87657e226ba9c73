"""funasr-mooer stream: partial and final lines, parallel files, the microphone, one clear error each."""

import io
import signal
import sys
import types

import numpy as np
import pytest
import torch

from funasr_mooer.bin import stream
from funasr_mooer.border.build import build_model
from funasr_mooer.data.audio import write_wav
from funasr_mooer.errors import ConfigError
from funasr_mooer.model_dir import write_model_dir
from funasr_mooer.u2pp_moe.tokenizer import write_units


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny random U2ppMoE that hears tokens in noise."""
    folder = tmp_path_factory.mktemp("stream")
    write_units(["<blank>", "<unk>", "<sos/eos>", "a", "b", "c"], folder / "units.txt")
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 1, "mlp_type": "position_wise_feed_forward"}
    config = {
        "model": "U2ppMoE",
        "frontend_conf": {"window": "povey", "lfr_m": 1, "lfr_n": 1, "n_mels": 16},
        "tokenizer": "MooerUnitsTokenizer",
        "tokenizer_conf": {"init": str(folder / "units.txt")},
        "encoder": "MoEConformerEncoder",
        "encoder_conf": {
            **sizes,
            "output_size": 16,
            "input_layer": "conv2d",
            "causal": True,
            "use_dynamic_chunk": True,
        },
        "decoder": "MoETransformerDecoder",
        "decoder_conf": sizes,
        "decode_conf": {"method": "ctc_greedy_search"},
    }
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        model.ctc.ctc_lo.bias[0] -= 3
    write_model_dir(model, folder / "model", model.part_names)
    return folder / "model"


@pytest.fixture
def wavs(tmp_path):
    files = []
    for number, samples in enumerate((16000, 9000, 160)):
        wave = np.random.default_rng(number).normal(0, 0.1, samples).astype(np.float32)
        write_wav(tmp_path / f"{number}.wav", wave)
        files.append(str(tmp_path / f"{number}.wav"))
    return files


def test_a_file_gives_partial_lines_a_final_one_and_figures(model_dir, wavs, capsys):
    chunk = ["--chunk-ms", "160"]
    assert stream.main(["--model", str(model_dir), "--wav", wavs[0], *chunk, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert all(line.startswith("... ") for line in lines[:-1])
    assert len(lines) >= 2
    start, _, rest = lines[-1].partition(" - ")
    end, _, text = rest.partition("  ")
    assert (start, end) == ("0.00", "0.92")
    assert text
    for figure in ("first text", "compute mean", "compute max", "rtf", "final after last word", "final after audio"):
        assert figure in err


def test_several_files_are_several_streams(model_dir, wavs, capsys):
    assert stream.main(["--model", str(model_dir), "--wav", *wavs, "--device", "cpu", "--no-endpoint"]) == 0
    together = capsys.readouterr().out.splitlines()
    assert "2.wav  (shorter than one encoder frame of 40 ms)" in together
    for wav, name in zip(wavs[:2], ("0.wav", "1.wav")):
        assert stream.main(["--model", str(model_dir), "--wav", wav, "--device", "cpu", "--no-endpoint"]) == 0
        alone = capsys.readouterr().out.splitlines()
        assert [line for line in together if line.startswith(name)][-1] == f"{name}  {alone[-1]}"


def test_settings_may_follow_the_files():
    args, settings = stream.parse(
        ["--model", "m", "--wav", "a.wav", "b.wav", "++method=attention", "++endpoint_conf.x=1"]
    )
    assert args.wav == ["a.wav", "b.wav"]
    assert settings == {"method": "attention", "endpoint_conf": {"x": 1}}


def test_a_wav_of_10_ms_is_answered_with_why_it_holds_nothing(model_dir, wavs, capsys):
    assert stream.main(["--model", str(model_dir), "--wav", wavs[2], "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "(shorter than one encoder frame of 40 ms)\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chunk-ms", "0"], "ConfigError: --chunk-ms 0 is not a multiple of the encoder's 40 ms; use 40, 80"),
        (["--chunk-ms", "100"], "--chunk-ms 100 is not a multiple of the encoder's 40 ms; use 80, 120"),
        (["++decoding_chunk_size=0"], "decoding_chunk_size=0: a chunk holds at least 1 frame"),
        (["--piece-ms", "0"], "--piece-ms 0: hand over at least 1 ms"),
        (["++endpoint_conf.max_ms=3"], "endpoint_conf.max_ms: unknown key"),
        (["++beem_size=3"], "'beem_size' is unknown; did you mean 'beam_size'"),
    ],
)
def test_what_cannot_work_is_one_line(model_dir, wavs, capsys, flags, message):
    assert stream.main(["--model", str(model_dir), "--wav", wavs[0], "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_terminal_sees_one_line_rewritten():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    display = stream.Display(["a.wav"], out)
    display.show(0, {"text": "one", "segments": [], "is_final": False})
    display.show(0, {"text": "one", "segments": [], "is_final": False})
    ended = {"start_ms": 0, "end_ms": 1280, "text": "one two"}
    display.show(0, {"text": "one two", "segments": [ended], "is_final": True})
    assert out.getvalue() == "\r\x1b[Kone\r\x1b[K0.00 - 1.28  one two\n"


def test_a_long_line_shows_its_end_in_terminal_cells():
    assert stream._last_cells("abcdef", 4) == "cdef"
    assert stream._last_cells("打开灯", 5) == "开灯"
    assert stream._last_cells("abc", 10) == "abc"


def test_files_come_at_their_own_pace(wavs, monkeypatch):
    now, slept = [0.0], []
    monkeypatch.setattr(stream.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stream.time, "sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    pieces = list(stream.files(wavs[:2], 16000, 250, realtime=True))
    assert slept == pytest.approx([0.25] * 4)
    assert [[piece and (len(piece[0]), piece[1]) for piece in row] for row in pieces] == [
        [(4000, False), (4000, False)],
        [(4000, False), (4000, False)],
        [(4000, False), (1000, True)],
        [(4000, True), None],
    ]


def test_the_microphone_is_heard_until_ctrl_c(monkeypatch):
    class RawInputStream:
        def __init__(self, samplerate, channels, dtype, blocksize, callback):
            assert (samplerate, channels, dtype, blocksize) == (16000, 1, "int16", 1600)
            self.callback = callback

        def __enter__(self):
            for value in (1, 2):
                self.callback(np.full(1600, value, np.int16).tobytes(), 1600, None, None)

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(RawInputStream=RawInputStream))
    before = signal.getsignal(signal.SIGINT)
    heard = stream.microphone(16000, 100)
    ((samples, final),) = next(heard)
    assert (len(samples), samples[-1], final) == (3200, 2, False)
    signal.raise_signal(signal.SIGINT)
    assert [(len(samples), final) for ((samples, final),) in heard] == [(0, True)]
    assert signal.getsignal(signal.SIGINT) is before


def test_without_sounddevice_the_error_names_the_extra(model_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert stream.main(["--model", str(model_dir), "--microphone", "--device", "cpu"]) == 2
    assert "pip install 'funasr-mooer[stream]'" in capsys.readouterr().err


def test_a_chunk_is_a_number_of_encoder_frames():
    assert stream.chunk_frames(640, 40) == 16
    with pytest.raises(ConfigError, match="use 40"):
        stream.chunk_frames(10, 40)
