"""Any audio to 16 kHz mono, or one clear error."""

import io

import kaldiio
import numpy as np
import pytest
import soundfile

from funasr_mooer.data.audio import read_audio, resample, to_pcm16, wav_pcm16, write_wav
from funasr_mooer.errors import DataError

TONE = (0.5 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)  # 1 s


def wav_bytes(samples=TONE, rate=16000, form="WAV"):
    buffer = io.BytesIO()
    write_wav(buffer, samples, rate, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
def test_every_format_gives_the_same_tone(tmp_path, form):
    path = tmp_path / f"a.{form}"
    soundfile.write(path, TONE, 16000)
    x = read_audio(path)
    assert x.dtype == np.float32
    if form in ("wav", "flac"):
        np.testing.assert_allclose(x, TONE, atol=2e-4)
    assert abs(len(x) - len(TONE)) < 1500  # ogg and mp3 work in blocks


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 16001])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channel_count_becomes_16_khz_mono(rate, channels):
    t = np.arange(rate) / rate
    x = 0.5 * np.sin(2 * np.pi * 440 * t).astype(np.float32)
    data = wav_bytes(np.stack([x] * channels, axis=1), rate)
    y = read_audio(data)
    assert len(y) == 16000
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(y[200:-200], wanted[200:-200], atol=2e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    x = np.sin(2 * np.pi * 12000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resample(x, 48000)[100:-100]).max() < 0.02


def test_resampled_audio_equals_the_original_implementation(golden):
    from safetensors.numpy import load_file

    wanted = load_file(golden / "mooer/golden/frontend.safetensors")["stereo_22k.mono16k"]
    np.testing.assert_allclose(read_audio(golden / "mooer/wav/stereo_22k.wav"), wanted, atol=1e-5)


def test_pcm16_of_a_wav_is_a_view_and_not_a_copy():
    data = wav_bytes()
    samples, rate = wav_pcm16(data)
    assert rate == 16000
    assert samples.base is not None
    assert not samples.flags.owndata
    np.testing.assert_array_equal(samples, to_pcm16(TONE))


def test_extensible_and_float_wavs_are_read():
    for subtype, form in [("PCM_16", "WAVEX"), ("FLOAT", "WAV"), ("PCM_24", "WAV"), ("PCM_U8", "WAV")]:
        buffer = io.BytesIO()
        soundfile.write(buffer, TONE, 16000, format=form, subtype=subtype)
        np.testing.assert_allclose(read_audio(buffer.getvalue()), TONE, atol=1e-2)


def test_kaldi_arks_keep_their_own_sample_rate(tmp_path):
    ark, scp = str(tmp_path / "a.ark"), str(tmp_path / "a.scp")
    entries = {"u1": (8000, to_pcm16(TONE)), "u2": (16000, to_pcm16(TONE[:8000]))}
    kaldiio.save_ark(ark, entries, scp=scp)
    lines = dict(line.split(maxsplit=1) for line in open(scp).read().splitlines())
    assert len(read_audio(lines["u1"])) == 32000
    np.testing.assert_allclose(read_audio(lines["u2"]), TONE[:8000], atol=1e-4)


def test_float_vectors_and_flac_in_an_ark_are_audio(tmp_path):
    ark, scp = str(tmp_path / "a.ark"), str(tmp_path / "a.scp")
    kaldiio.save_ark(ark, {"u1": TONE, "u2": TONE * 32768}, scp=scp)
    for line in open(scp).read().splitlines():
        np.testing.assert_allclose(read_audio(line.split(maxsplit=1)[1]), TONE, atol=1e-4)
    kaldiio.save_ark(ark, {"u": (16000, TONE)}, scp=scp, write_function="soundfile")
    np.testing.assert_allclose(read_audio(open(scp).read().split()[1]), TONE, atol=1e-4)


def test_a_pickle_in_an_ark_is_refused(tmp_path):
    ark, scp = str(tmp_path / "a.ark"), str(tmp_path / "a.scp")
    kaldiio.save_ark(ark, {"u": TONE}, scp=scp, write_function="pickle")
    with pytest.raises(DataError, match="pickle"):
        read_audio(open(scp).read().split()[1])


def test_a_byte_range_of_a_larger_file_is_read(tmp_path):
    data = wav_bytes()
    (tmp_path / "x.tar").write_bytes(b"\0" * 512 + data + b"junk")
    np.testing.assert_allclose(read_audio(f"{tmp_path}/x.tar:512:{len(data)}"), TONE, atol=1e-4)
    for nbytes in (len(data) + 100, 10**14, 10**30):
        with pytest.raises(DataError, match="truncated"):
            read_audio(f"{tmp_path}/x.tar:512:{nbytes}")


def test_pipes_run_only_when_allowed(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes())
    command = f"cat {tmp_path}/a.wav |"
    with pytest.raises(DataError, match="allow_pipes"):
        read_audio(command)
    np.testing.assert_allclose(read_audio(command, allow_pipes=True), TONE, atol=1e-4)
    with pytest.raises(DataError, match="exit status 3"):
        read_audio("exit 3 |", allow_pipes=True)


def float_wav():
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"not audio at all, only text", "not audio"),
        (wav_bytes(TONE[:0]), "empty"),
        (wav_bytes()[:3000], "truncated"),
        (wav_bytes()[:30], "truncated"),
        (float_wav()[:3000], "truncated"),
        (wav_bytes(form="FLAC")[:3000], "truncated|not audio"),
    ],
)
def test_each_damage_has_one_clear_error(tmp_path, content, message):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_audio(path)
    assert "a.wav" in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_missing_files_folders_and_nan_are_named(tmp_path):
    with pytest.raises(DataError, match="no_such.wav.*No such file"):
        read_audio(tmp_path / "no_such.wav")
    with pytest.raises(DataError, match="directory"):
        read_audio(tmp_path)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(100, np.nan, np.float32), 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="NaN"):
        read_audio(buffer.getvalue())
