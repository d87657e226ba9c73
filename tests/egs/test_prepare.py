"""Stage 0 of each recipe, run as its run.sh runs it, on tiny corpora; and the espeak-ng behind the mini corpus."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from funasr_mooer.data.audio import read_audio, write_wav
from funasr_mooer.data.kaldi_dir import read_kaldi_dir

ROOT = Path(__file__).resolve().parents[2]

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeak-ng is absent; pip install espeakng-loader"
)


def prepare(recipe, *flags):
    script = ROOT / "egs" / recipe / "local/prepare.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done


def prepared(recipe, *flags):
    done = prepare(recipe, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tone(file, duration_s, rate=16000, level=0.1, hz=300):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_wav(file, level * np.sin(np.arange(int(duration_s * rate)) * 2 * np.pi * hz / rate).astype(np.float32), rate)


# ------------------------------------------------------------------------------------------------------------- mini


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    prepared("mini", "--out", out, "--train-utts", 40, "--nj", 2)
    return out


@needs_espeak
def test_mini_splits_share_neither_test_voices_nor_sentences(mini):
    train, dev, test = (read_kaldi_dir(mini / split, max_bad=0) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (40, 120, 240)

    def voices(split):
        return {u.speaker for u in split}

    def sentences(split):
        return {text for u in split for text in u.texts.values()}

    assert len(voices(test)) == 9
    assert not voices(test) & (voices(train) | voices(dev))
    assert not sentences(train) & (sentences(dev) | sentences(test))
    assert not sentences(dev) & sentences(test)


@needs_espeak
def test_mini_has_a_directory_for_each_language_over_the_same_recordings(mini):
    zh, en = read_kaldi_dir(mini / "test_zh", max_bad=0), read_kaldi_dir(mini / "test_en", max_bad=0)
    assert (len(zh), len(en)) == (120, 120)
    assert all(u.lang == "zh" and set(u.texts) == {"text", "text.en"} for u in zh)
    assert all(u.lang == "en" and set(u.texts) == {"text"} for u in en)
    assert {u.source for u in [*zh, *en]} == {u.source for u in read_kaldi_dir(mini / "test")}


@needs_espeak
def test_mini_speech_is_level_trimmed_and_as_long_as_it_says(mini):
    for utterance in list(read_kaldi_dir(mini / "train"))[:8]:
        waveform = read_audio(utterance.source)
        assert np.sqrt(np.mean(waveform**2)) == pytest.approx(0.05, rel=0.01)
        assert np.abs(waveform[:1600]).max() < np.abs(waveform).max() / 10
        assert 0.7 < utterance.duration_s < 8
        assert utterance.duration_s == pytest.approx(len(waveform) / 16000, abs=1e-3)


@needs_espeak
@pytest.mark.slow
def test_mini_is_the_same_on_any_number_of_cores_and_its_test_set_for_any_seed(mini, tmp_path):
    prepared("mini", "--out", tmp_path / "one", "--train-utts", 40, "--nj", 1)
    assert contents(tmp_path / "one") == contents(mini)
    prepared("mini", "--out", tmp_path / "other", "--train-utts", 40, "--seed", 5)
    here, there = contents(mini), contents(tmp_path / "other")
    for name in here.keys() | there.keys():
        if "test" in name or "dev" in name:
            assert here[name] == there[name], name
    assert here["train/text"] != there["train/text"]


@needs_espeak
def test_espeak_names_what_it_does_not_have(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "egs/mini/local"))
    import speech

    engine = speech.espeak()
    with pytest.raises(speech.SpeechError, match="no voice variant 'nobody'; it has .*klatt"):
        engine.synthesise("one", "en-us", "nobody", 160, 50)
    with pytest.raises(speech.SpeechError, match="no language 'tlh'"):
        engine.synthesise("one", "tlh", "m1", 160, 50)
    fast, slow = (engine.synthesise("one two three", "en-us", "m1", speed, 50) for speed in (190, 110))
    assert fast.dtype == np.float32
    assert len(fast) < 0.8 * len(slow)

    monkeypatch.setattr(speech, "_libraries", lambda: iter(()))
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    with pytest.raises(speech.SpeechError, match="pip install espeakng-loader"):
        speech.espeak()


# ------------------------------------------------------------------------------------------------------------- fsdd


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The publisher's layout with tones for digits: 8 kHz, theo very quiet."""
    corpus = tmp_path_factory.mktemp("free-spoken-digit-dataset")
    for speaker in ("george", "jackson", "nicolas", "lucas", "theo", "yweweler"):
        for digit in range(10):
            for take in (0, 7):
                level = 0.002 if speaker == "theo" else 0.3
                tone(corpus / "recordings" / f"{digit}_{speaker}_{take}.wav", 0.2 + digit / 50, 8000, level)
    return corpus


@pytest.fixture(scope="module")
def strings(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdd")
    prepared("fsdd", "--corpus", digits, "--out", out, "--train-utts", 100, "--nj", 2)
    return out


def test_fsdd_splits_have_their_speakers_and_sizes(strings):
    train = read_kaldi_dir(strings / "train", max_bad=0)
    assert len(train) == 100
    assert {u.speaker for u in train} == {"george", "jackson", "nicolas", "mixed"}
    assert 0.3 < np.mean([u.speaker == "mixed" for u in train]) < 0.55
    for split, speakers, count in (
        ("dev", {"lucas"}, 100),
        ("test", {"theo"}, 150),
        ("test_seen", {"george", "jackson", "nicolas"}, 60),
    ):
        kaldi = read_kaldi_dir(strings / split, max_bad=0)
        assert len(kaldi) == count
        assert {u.speaker for u in kaldi} == speakers
    assert {len(u.texts["text"].split()) for u in train} == set(range(2, 8))


def test_fsdd_speakers_come_out_equally_loud(strings):
    for split in ("dev", "test"):
        waveform = read_audio(read_kaldi_dir(strings / split).utterances[0].source)
        assert np.sqrt(np.mean(waveform[np.abs(waveform) > 1e-3] ** 2)) == pytest.approx(0.05, rel=0.05)
        assert np.abs(waveform[:2300]).max() < 1e-3  # the lead-in


def test_fsdd_tests_are_the_same_for_any_seed_and_number_of_cores(digits, strings, tmp_path):
    prepared("fsdd", "--corpus", digits, "--out", tmp_path, "--train-utts", 100, "--seed", 1, "--nj", 1)
    here, there = contents(strings), contents(tmp_path)
    tests = {name for name in here if "train" not in name}
    assert tests == {name for name in there if "train" not in name}
    assert all(here[name] == there[name] for name in tests)
    assert here["train/text"][:200] != there["train/text"][:200]


def test_fsdd_recordings_may_have_voices_of_their_own(digits, strings, tmp_path):
    prepared("fsdd", "--corpus", digits, "--out", tmp_path, "--train-utts", 100, "--vary-voices")
    here, there = contents(strings), contents(tmp_path)
    assert all(here[name] == there[name] for name in here if "train" not in name)
    first = read_kaldi_dir(tmp_path / "train").utterances[0]
    assert first.duration_s != read_kaldi_dir(strings / "train").utterances[0].duration_s


def test_fsdd_joins_the_strings_that_a_table_gives(speech_data, tmp_path):
    prepared("fsdd", "--corpus", speech_data / "fsdd", "--out", tmp_path, "--train-utts", 20)
    rows = (speech_data / "fsdd/test/strings.tsv").read_text().splitlines()[1:]
    test = {u.utt_id: u for u in read_kaldi_dir(tmp_path / "test", max_bad=0)}
    assert len(test) == len(rows)
    utt_id, _, gaps_ms, parts, text = rows[0].split("\t")
    assert test[utt_id].texts["text"] == text
    spoken = sum(len(read_audio(speech_data / f"fsdd/wav/theo/{part}.flac")) for part in parts.split(","))
    silent = 16 * sum(map(int, gaps_ms.split(","))) + 2400 + 1600
    assert round(test[utt_id].duration_s * 16000) == pytest.approx(spoken + silent, abs=16)


def test_fsdd_says_what_a_corpus_must_hold(tmp_path):
    done = prepare("fsdd", "--corpus", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"--corpus {tmp_path}: neither recordings/" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------- aishell


@pytest.fixture
def aishell(tmp_path):
    """Five recordings in AISHELL-1's layout, one without a transcript."""
    corpus = tmp_path / "data aishell"
    files = ["train/S0002/BAC009S0002W0122", "train/S0002/BAC009S0002W0123", "train/S0003/BAC009S0003W0121"]
    for name in [*files, "dev/S0724/BAC009S0724W0121", "test/S0764/BAC009S0764W0121"]:
        tone(corpus / "wav" / f"{name}.wav", 0.5)
    (corpus / "transcript").mkdir()
    (corpus / "transcript/aishell_transcript_v0.8.txt").write_text(
        "BAC009S0002W0122 而 对 楼市 成交 抑制 作用 最 大 的 限 购\nBAC009S0002W0123 也 成为\n"
        "BAC009S0724W0121 广州市 房地产\nBAC009S0764W0121 甚至 出现 交易\n",
        encoding="utf-8",
    )
    return corpus


def test_aishell_becomes_three_kaldi_directories_of_characters(aishell, tmp_path):
    printed = prepared("aishell", "--corpus", aishell, "--out", tmp_path / "out")
    assert "train        2 utts, 1 speakers | 1 without a transcript left out" in printed
    train = read_kaldi_dir(tmp_path / "out" / "train", max_bad=0)
    assert [u.texts["text"] for u in train] == ["而对楼市成交抑制作用最大的限购", "也成为"]
    assert {(u.speaker, u.lang) for u in train} == {("S0002", "zh")}
    assert len(read_audio(train.utterances[0].source)) == 8000
    assert len(read_kaldi_dir(tmp_path / "out" / "test", max_bad=0)) == 1


def test_aishell_still_packed_says_how_to_unpack(aishell, tmp_path):
    for file in (aishell / "wav" / "train").rglob("*.wav"):
        file.unlink()
    (aishell / "wav" / "S0002.tar.gz").write_bytes(b"")
    done = prepare("aishell", "--corpus", aishell, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "unpack the 1 speakers" in done.stderr
    assert "tar xzf" in done.stderr


def test_aishell_elsewhere_says_what_the_corpus_is(tmp_path):
    done = prepare("aishell", "--corpus", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "data_aishell of OpenSLR 33" in done.stderr


# ------------------------------------------------------------------------------------------------------ librispeech


@pytest.fixture
def librispeech(tmp_path):
    """One utterance in each part of LibriSpeech's layout; one training part only."""
    parts = ("train-clean-100", "dev-clean", "dev-other", "test-clean", "test-other")
    for number, part in enumerate(parts):
        chapter = tmp_path / "LibriSpeech" / part / f"{100 + number}" / "121"
        tone(chapter / f"{100 + number}-121-0000.flac", 0.3)
        (chapter / f"{100 + number}-121.trans.txt").write_text(f"{100 + number}-121-0000 HE HOPED THERE WOULD BE\n")
    return tmp_path / "LibriSpeech"


def test_librispeech_has_its_parts_and_both_dev_parts_together(librispeech, tmp_path):
    printed = prepared("librispeech", "--corpus", librispeech, "--out", tmp_path / "out")
    assert "train        1 utts, 1 speakers | train-clean-100" in printed
    assert len(read_kaldi_dir(tmp_path / "out/dev", max_bad=0)) == 2
    (utterance,) = read_kaldi_dir(tmp_path / "out/test_other", max_bad=0)
    assert (utterance.utt_id, utterance.speaker, utterance.lang) == ("104-121-0000", "104", "en")
    assert utterance.texts == {"text": "HE HOPED THERE WOULD BE"}
    assert len(read_audio(utterance.source)) == 4800


def test_librispeech_names_what_is_missing(librispeech, tmp_path):
    (librispeech / "dev-other/102/121/102-121-0000.flac").unlink()
    done = prepare("librispeech", "--corpus", librispeech, "--out", tmp_path / "out")
    assert "102-121.trans.txt:1: utt 102-121-0000 has no text or no 102-121-0000.flac" in done.stderr
    assert "none of train-clean-100" in prepare("librispeech", "--corpus", tmp_path, "--out", tmp_path / "out").stderr


# ------------------------------------------------------------------------------------------------------ wenetspeech


@pytest.fixture
def wenetspeech(tmp_path):
    """Recordings of two segments in WenetSpeech's layout; the second training recording is in L alone."""
    corpus, audios = tmp_path / "WenetSpeech", []
    for kind, subsets in (("train/a", "SML"), ("train/b", "L"), ("dev/c", None), ("net/d", None), ("meeting/e", None)):
        aid = f"Y_{kind[-1]}"
        named = {"dev/c": "DEV", "net/d": "TEST_NET", "meeting/e": "TEST_MEETING"}
        path = f"audio/{kind[:-2]}/B00000/{aid}.opus"
        (corpus / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(corpus / path, np.zeros(16000, np.float32), 16000, format="OGG", subtype="OPUS")
        times = [(0.0, 0.4, "怎么样"), (0.5, 0.9, "不要害怕")]
        segments = [
            {"sid": f"{aid}_S{i}", "begin_time": t0, "end_time": t1, "confidence": 1.0, "text": text,
             "subsets": list(subsets) if subsets else [named[kind]]}
            for i, (t0, t1, text) in enumerate(times)
        ]  # fmt: skip
        audios.append({"aid": aid, "duration": 1.0, "path": path, "segments": segments})
    (corpus / "WenetSpeech.json").write_text(json.dumps({"tag": "x", "audios": audios}, indent=1, ensure_ascii=False))
    return corpus


def test_wenetspeech_becomes_segments_of_the_chosen_subset(wenetspeech, tmp_path):
    for subset, count in (("M", 2), ("L", 4)):
        printed = prepared("wenetspeech", "--corpus", wenetspeech, "--out", tmp_path / subset, "--subset", subset)
        assert f"train        {count} utts" in printed
        assert len(read_kaldi_dir(tmp_path / subset / "train", max_bad=0)) == count
    utterance = read_kaldi_dir(tmp_path / "M" / "test_net", max_bad=0).utterances[1]
    assert (utterance.utt_id, utterance.start_s, utterance.end_s) == ("Y_d_S1", 0.5, 0.9)
    assert utterance.texts == {"text": "不要害怕"}
    assert len(read_audio(utterance.source)) == 16000


def test_wenetspeech_stops_at_missing_recordings_and_a_cut_list(wenetspeech, tmp_path):
    next(wenetspeech.rglob("Y_b.opus")).unlink()
    done = prepare("wenetspeech", "--corpus", wenetspeech, "--out", tmp_path / "out")
    assert "1 of 5 recordings are not there" in done.stderr
    file = wenetspeech / "WenetSpeech.json"
    file.write_text(file.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    assert "ends, or is no JSON" in prepare("wenetspeech", "--corpus", wenetspeech, "--out", tmp_path / "out").stderr


# ------------------------------------------------------------------------------------------------------------ kaldi


def test_kaldi_directories_come_out_levelled_and_cut_into_their_segments(tmp_path):
    for split in ("train", "dev", "test"):
        folder = tmp_path / "corpus" / split
        tone(folder / "long.wav", 1.0, level=0.001)
        (folder / "wav.scp").write_text("long long.wav\n")
        (folder / "segments").write_text("a long 0.0 0.4\nb long 0.5 1.0\n")
        (folder / "text").write_text("a one\nb two\n")
    printed = prepared("kaldi", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out", "--nj", 1)
    assert "dev          2 utts, 0.00 h | 0 with problems left out" in printed
    first, second = read_kaldi_dir(tmp_path / "out/test", max_bad=0)
    assert (first.duration_s, second.duration_s) == (0.4, 0.5)
    waveform = read_audio(second.source)
    assert len(waveform) == 8000
    assert np.sqrt(np.mean(waveform**2)) == pytest.approx(0.05, rel=0.01)


# --------------------------------------------------------------------------------------------------------- TEMPLATE


def test_the_template_works_as_it_is(tmp_path):
    for split in ("train", "dev", "test"):
        tone(tmp_path / "corpus" / split / "a1.wav", 0.3)
        (tmp_path / "corpus" / split / "a1.txt").write_text("你好\n", encoding="utf-8")
    prepared("TEMPLATE", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out")
    (utterance,) = read_kaldi_dir(tmp_path / "out" / "train", max_bad=0)
    assert utterance.texts == {"text": "你好"}
