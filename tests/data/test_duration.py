"""How long audio lasts is told by its header, wherever it lies; where no header tells, nothing is guessed."""

import kaldiio
import numpy as np
import pytest

from funasr_mooer.data import audio
from funasr_mooer.data.audio import read_audio, write_wav
from funasr_mooer.data.duration import seconds

TONE = (0.1 * np.sin(np.arange(12345) * 0.1)).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_is_decoded(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(audio, "decode", refuse)


@pytest.mark.parametrize(("form", "rate"), [("wav", 16000), ("flac", 16000), ("wav", 8000), ("flac", 48000)])
def test_files_and_byte_ranges_tell_their_length(tmp_path, form, rate):
    file, tar = tmp_path / f"a.{form}", tmp_path / "x.tar"
    write_wav(file, TONE, rate, form.upper())
    data = file.read_bytes()
    tar.write_bytes(b"\0" * 512 + data + b"junk" * 1000 + data)
    assert seconds(str(file)) == len(TONE) / rate
    assert seconds(f"{tar}:512:{len(data)}") == len(TONE) / rate
    assert seconds(f"{tar}:{512 + len(data) + 4000}:{len(data)}") == len(TONE) / rate


@pytest.mark.parametrize("way", ["wav", "flac", "vector", "double", "matrix"])
def test_entries_of_kaldi_arks_tell_their_length(tmp_path, way):
    ark, scp, rate = str(tmp_path / "a.ark"), str(tmp_path / "a.scp"), 8000 if way in ("wav", "flac") else 16000
    shapes = {"vector": TONE, "double": TONE.astype(np.float64), "matrix": TONE[None]}
    entry = shapes.get(way, (rate, TONE if way == "flac" else audio.to_pcm16(TONE)))
    kaldiio.save_ark(ark, {"u1": entry, "u2": entry}, scp=scp, write_function="soundfile" if way == "flac" else None)
    sources = [line.split()[1] for line in open(scp, encoding="utf-8")]
    assert [seconds(source) for source in sources] == [len(TONE) / rate] * 2


@pytest.mark.parametrize(
    "source", ["cat a.wav |", "absent.wav", "noise.wav", "noise.wav:0", "noise.wav:0:600", "a.wav:99999"]
)
def test_what_no_header_tells_is_none(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    write_wav("a.wav", TONE)
    (tmp_path / "noise.wav").write_bytes(b"x" * 600)
    assert seconds(source) is None


def test_it_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.undo()
    write_wav(tmp_path / "a.wav", TONE)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"\0" * 512 + data)
    source = f"{tmp_path}/x.tar:512:{len(data)}"
    assert seconds(source) * 16000 == len(read_audio(source))
