"""Packs: what goes in comes out, other programs can read them, and damage is found."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from funasr_mooer.data.audio import read_audio, write_wav
from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir, write_kaldi_dir
from funasr_mooer.data.pack_format import RECORD
from funasr_mooer.data.pack_writer import write_pack
from funasr_mooer.data.shards import Pack
from funasr_mooer.data.tar_index import index_tars
from funasr_mooer.errors import DataError


def test_an_index_record_takes_26_bytes(pack_dir):
    assert RECORD.itemsize == 26
    assert (pack_dir / "index.bin").stat().st_size == 26 * 24


def test_a_pack_holds_what_the_directory_held(fakes, corpus, pack_dir):
    pack, data = Pack(pack_dir), read_kaldi_dir(corpus)
    tokenizer = fakes.Tokenizer()
    counts = pack.token_counts()
    assert len(pack) == len(data)
    assert pack.fields == ["text", "text.en"]
    for i, u in enumerate(data):
        np.testing.assert_array_equal(pack.waveform(i), read_audio(u.source))
        assert pack.records[i]["samples"] == len(pack.samples(i))
        assert (pack.utt_id(i), pack.text(i), pack.lang(i)) == (u.utt_id, u.texts, u.lang)
        tokens = pack.tokens(i)
        assert {f: ids.tolist() for f, ids in tokens.items()} == {f: tokenizer.encode(t) for f, t in u.texts.items()}
        assert [counts[f][i] for f in pack.fields] == [len(tokens.get(f, [])) for f in pack.fields]
    assert pack.hours == pytest.approx(sum(pack.records["samples"]) / 16000 / 3600, abs=1e-6)


def test_wav_samples_are_a_view_of_the_mapped_file(pack_dir):
    samples = Pack(pack_dir).samples(3)
    assert samples.dtype == np.int16
    assert not samples.flags.owndata
    assert not samples.flags.writeable


def test_the_result_does_not_depend_on_the_number_of_processes(fakes, corpus, pack_dir, tmp_path):
    write_pack(read_kaldi_dir(corpus), tmp_path / "pack", fakes.Tokenizer(), nj=3, shard_utts=10)
    for file in pack_dir.iterdir():
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes(), file.name


def test_flac_packs_hold_the_same_samples(fakes, corpus, pack_dir, tmp_path):
    write_pack(read_kaldi_dir(corpus), tmp_path / "pack", fakes.Tokenizer(), form="flac")
    wav, flac = Pack(pack_dir), Pack(tmp_path / "pack")
    for i in range(0, 24, 5):
        np.testing.assert_array_equal(wav.waveform(i), flac.waveform(i))


def test_wenet_and_mooer_find_key_txt_and_key_wav_in_order(pack_dir):
    groups = {}  # as their readers group: what stands before and after the last dot
    for path in sorted(pack_dir.glob("*.tar")):
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                assert key not in groups or list(groups)[-1] == key, "the files of an utterance stand together"
                groups.setdefault(key, {})[kind] = tar.extractfile(member).read()
    assert list(groups) == [f"utt{i:03d}" for i in range(24)]
    assert list(groups["utt000"]) == ["txt", "en", "wav"]
    assert list(groups["utt001"]) == ["txt", "wav"]
    assert groups["utt004"]["txt"].decode() == "你好 number 4"
    assert len(read_audio(groups["utt004"]["wav"])) > 8000


def test_shards_written_by_mooer_are_indexed_in_place(fakes, golden, tmp_path):
    shard = golden / "mooer/shard/shards_000000000.tar"
    index_tars([shard], tmp_path / "pack", fakes.Tokenizer())
    pack = Pack(tmp_path / "pack")
    texts = json.loads((golden / "mooer/text.json").read_text())["asr"]
    assert {pack.utt_id(i): pack.text(i)["text"] for i in range(len(pack))} == texts
    for i in range(len(pack)):
        np.testing.assert_array_equal(pack.waveform(i), read_audio(golden / f"mooer/wav/{pack.utt_id(i)}.wav"))
        assert fakes.Tokenizer().decode(pack.tokens(i)["text"]) == texts[pack.utt_id(i)]
    assert not list((tmp_path / "pack").glob("*.tar"))


def tar_of(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def wav(fakes, seconds=1, rate=16000):
    buffer = io.BytesIO()
    write_wav(buffer, fakes.tone(seconds), rate)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_are_read_whatever_the_tar_format_and_order(fakes, tmp_path, form):
    keys = ["short", "../../etc/evil"] + (["x" * 150, "语音"] if form != tarfile.USTAR_FORMAT else [])
    members = [m for k in keys for m in [(f"{k}.wav", wav(fakes)), (f"{k}.txt", k.encode())]]  # audio before text
    index_tars([tar_of(tmp_path / "a.tar", members, form)], tmp_path / "pack", fakes.Tokenizer())
    pack = Pack(tmp_path / "pack")
    assert [(pack.utt_id(i), pack.text(i)["text"]) for i in range(len(pack))] == [(k, k) for k in keys]


def test_other_rates_in_a_foreign_tar_are_resampled(fakes, tmp_path):
    members = [("a.txt", b"a"), ("a.wav", wav(fakes, 1, 8000))]
    index_tars([tar_of(tmp_path / "a.tar", members)], tmp_path / "pack", fakes.Tokenizer())
    pack = Pack(tmp_path / "pack")
    assert pack.records[0]["samples"] == len(pack.waveform(0)) == 32000


def test_bad_utterances_are_counted_named_and_stop_above_the_limit(fakes, tmp_path):
    folder = fakes.write_corpus(tmp_path, [1] * 6)
    (tmp_path / "wav/utt002.wav").write_bytes(b"no audio")
    (tmp_path / "wav/utt004.wav").unlink()
    with pytest.raises(DataError, match=r"2 problems in 6 .*\n.*wav.scp:3: utt utt002 .*not audio(.|\n)*utt004"):
        write_pack(read_kaldi_dir(folder), tmp_path / "pack", fakes.Tokenizer(), nj=2)
    assert not (tmp_path / "pack").exists()
    meta = write_pack(read_kaldi_dir(folder), tmp_path / "pack", fakes.Tokenizer(), max_bad=0.5, shard_utts=2, nj=2)
    assert (meta["utterances"], meta["skipped"]) == (4, 2)
    assert [Pack(tmp_path / "pack").utt_id(i)[-1] for i in range(4)] == ["0", "1", "3", "5"]


def test_a_workers_failure_fails_the_whole(fakes, corpus, tmp_path):
    class Broken(fakes.Tokenizer):
        def encode(self, text):
            raise ZeroDivisionError if "7" in text else SystemExit

    with pytest.raises((ZeroDivisionError, SystemExit, DataError)):
        write_pack(read_kaldi_dir(corpus), tmp_path / "pack", Broken(), nj=2, shard_utts=4)
    assert list(tmp_path.iterdir()) == []


def test_segments_are_cut(fakes, tmp_path):
    folder = fakes.write_corpus(tmp_path, [3])
    (folder / "segments").write_text("a utt000 0.5 1.5\nb utt000 1.25 2.25\n")
    (folder / "text").write_text("a one\nb two\n")
    (folder / "text.en").unlink()
    (folder / "utt2lang").unlink()
    write_pack(read_kaldi_dir(folder), tmp_path / "pack", fakes.Tokenizer())
    whole, pack = read_audio(tmp_path / "wav/utt000.wav"), Pack(tmp_path / "pack")
    np.testing.assert_array_equal(pack.waveform(0), whole[8000:24000])
    np.testing.assert_array_equal(pack.waveform(1), whole[20000:36000])


def test_packing_again_replaces_a_pack_and_nothing_else(fakes, corpus, tmp_path):
    for _ in range(2):
        write_pack(read_kaldi_dir(corpus), tmp_path / "pack", fakes.Tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(DataError, match="not a pack"):
        write_pack(read_kaldi_dir(corpus), tmp_path / "mine", fakes.Tokenizer())


@pytest.mark.parametrize("field", ["text.zh-cn", "text.wav", "text.json"])
def test_text_fields_that_a_tar_would_lose_are_refused(fakes, corpus, tmp_path, field):
    shutil.copytree(corpus, tmp_path / "d")
    (tmp_path / "d" / field).write_text("")
    with pytest.raises(DataError, match=f"{field}: after text. a name has letters only"):
        write_pack(read_kaldi_dir(tmp_path / "d"), tmp_path / "pack", fakes.Tokenizer())


@pytest.mark.parametrize("name", ["index.bin", "tokens.bin", "shard_000001.tar"])
def test_truncated_packs_are_refused(pack_dir, tmp_path, name):
    copy = tmp_path / "pack"
    shutil.copytree(pack_dir, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{name}.*truncated"):
        Pack(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        Pack(copy)


def test_a_shard_that_vanishes_while_its_pack_is_open_is_named(pack_dir, tmp_path):
    copy = tmp_path / "pack"
    shutil.copytree(pack_dir, copy)
    pack = Pack(copy)
    (copy / "shard_000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard_000000\.tar: was there when the pack was opened.*put it back and run"):
        pack.samples(0)


@pytest.mark.parametrize("keep", [100, 1500, 40000, -512])
def test_truncated_tars_are_refused(fakes, tmp_path, keep):
    path = tar_of(tmp_path / "a.tar", [("a.txt", b"a"), ("a.wav", wav(fakes)), ("b.txt", b"b"), ("b.wav", wav(fakes))])
    end = max(m.offset_data + -(-m.size // 512) * 512 for m in tarfile.open(path))
    data = path.read_bytes()[:end]  # without the end of archive
    path.write_bytes(data[:keep] if keep > 0 else data)
    with pytest.raises(DataError, match=r"a\.tar.*(truncated|not an uncompressed tar)"):
        index_tars([path], tmp_path / "pack", fakes.Tokenizer())


def test_another_tokenizer_means_packing_again(fakes, pack_dir):
    class Other(fakes.Tokenizer):
        fingerprint = "other"

    Pack(pack_dir).check_tokenizer(fakes.Tokenizer())
    with pytest.raises(DataError, match="run pack again"):
        Pack(pack_dir).check_tokenizer(Other())


def test_folders_that_are_no_packs_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a pack"):
        Pack(tmp_path)
    (tmp_path / "meta.json").write_text('{"version": ')
    with pytest.raises(DataError, match=r"meta\.json: is damaged .*run pack again"):
        Pack(tmp_path)
    (tmp_path / "meta.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        Pack(tmp_path)


def test_utterance_names_that_cannot_be_members_are_problems(fakes, tmp_path):
    write_wav(tmp_path / "a.wav", fakes.tone(1))
    write_kaldi_dir(tmp_path / "d", [Utterance("spk/utt", str(tmp_path / "a.wav"), {"text": "x"})])
    with pytest.raises(DataError, match="no slashes"):
        write_pack(read_kaldi_dir(tmp_path / "d"), tmp_path / "pack", fakes.Tokenizer())
