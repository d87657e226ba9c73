"""Kaldi directories: every problem is named with its file and line."""

import pytest

from funasr_mooer.data.kaldi_dir import Utterance, read_kaldi_dir, write_kaldi_dir
from funasr_mooer.errors import DataError


@pytest.fixture
def folder(tmp_path):
    def make(**files):
        path = tmp_path / "train"
        path.mkdir(exist_ok=True)
        defaults = {"wav.scp": "a wav/a.wav\nb wav/b.wav\n", "text": "a hello\nb good day\n"}
        for name, text in {**defaults, **files}.items():
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def test_fields_are_joined_by_utterance(folder):
    path = folder(**{"text.en": "b bye\n", "utt2lang": "a zh\nb zh\n", "utt2dur": "a 1.5\n", "utt2spk": "a s\nb s\n"})
    a, b = read_kaldi_dir(path)
    assert (a.texts, a.lang, a.duration_s, a.speaker) == ({"text": "hello"}, "zh", 1.5, "s")
    assert b.texts == {"text": "good day", "text.en": "bye"}
    assert read_kaldi_dir(path).fields == ["text", "text.en"]


def test_paths_start_at_the_folder_else_at_its_parent(folder):
    path = folder(**{"wav.scp": "a wav/a.wav\nb /abs/b.wav\n"})
    assert read_kaldi_dir(path).utterances[0].source == str(path.parent / "wav/a.wav")
    assert read_kaldi_dir(path).utterances[1].source == "/abs/b.wav"
    (path / "wav").mkdir()
    (path / "wav/a.wav").touch()
    assert read_kaldi_dir(path).utterances[0].source == str(path / "wav/a.wav")
    path = folder(**{"wav.scp": "a x.ark:77\nb cat b.wav |\n"})
    assert [u.source for u in read_kaldi_dir(path)] == [str(path.parent / "x.ark") + ":77", "cat b.wav |"]


def test_unsorted_tabs_crlf_bom_and_blank_lines_are_fine(folder):
    path = folder(
        **{"wav.scp": b"\xef\xbb\xbfb\twav/b.wav\r\n\r\na  wav/a.wav\r\n", "text": "a\thello\r\nb good  day\r\n"}
    )
    b, a = read_kaldi_dir(path, max_bad=0)
    assert (a.utt_id, a.texts["text"], b.texts["text"]) == ("a", "hello", "good day")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"text": "a hello\n"}, r"wav.scp:2: utt b has no line in .*text"),
        ({"text": "a hello\nb\n"}, r"utt b has an empty transcript in .*text:2"),
        ({"text": "a hello\nb x\nc y\n"}, r"text:3: utt c has no line in wav.scp"),
        ({"wav.scp": "a a.wav\nb b.wav\na c.wav\n"}, r"wav.scp:3: a was already given in line 1"),
        ({"wav.scp": "a a.wav\nb\n"}, r"wav.scp:2: b has nothing after it"),
        ({"text": b"a hello\nb \xff\n"}, r"text:2: not UTF-8"),
        ({"text": "a hello\nb x\0y\n"}, r"text:2: holds a NUL"),
        ({"segments": "a a 0 1\nb r9 0 1\n"}, r"segments:2: utt b is cut from r9"),
        ({"segments": "a a 0 1\nb b 2 1\n"}, r"segments:2: utt b starts at 2 s and ends at 1 s"),
        ({"segments": "a a 0 1\nb b 0 inf\n"}, r"segments:2: utt b starts at 0 s and ends at inf s"),
        ({"segments": "a a 0 1\nb b x\n"}, r"segments:2: utt b expected 'recording start end'"),
        ({"utt2dur": "a long\n"}, r"duration 'long' in .*utt2dur:1"),
        ({"utt2dur": "a nan\n"}, r"duration 'nan' in .*utt2dur:1"),
        ({"text.en": "a\n"}, r"text.en:1: utt a has an empty transcript"),
    ],
)
def test_each_problem_is_named_with_file_and_line(folder, files, message):
    path = folder(**files)
    with pytest.raises(DataError, match=message):
        read_kaldi_dir(path)
    kept = read_kaldi_dir(path, max_bad=1)
    assert len(kept) >= 1
    assert len(kept.problems) >= 1


def test_segments_cut_recordings(folder):
    path = folder(segments="a1 a 0.5 1.25\nb1 a 1 2\n", text="a1 x\nb1 y\n")
    a, b = read_kaldi_dir(path)
    assert (a.utt_id, a.start_s, a.end_s) == ("a1", 0.5, 1.25)
    assert a.source == b.source


def test_missing_files_are_named_and_text_is_optional_for_decoding(folder, tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        read_kaldi_dir(tmp_path / "none")
    path = folder()
    (path / "text").unlink()
    with pytest.raises(DataError, match="text: no such file"):
        read_kaldi_dir(path)
    assert [u.texts for u in read_kaldi_dir(path, need_text=False)] == [{}, {}]


def test_utterances_without_a_transcript_are_decoded_too(folder):
    found = read_kaldi_dir(folder(text="b good day\n", **{"text.en": "b\n"}), need_text=False, max_bad=0)
    assert [u.texts for u in found] == [{}, {"text": "good day"}]
    found = read_kaldi_dir(folder(text="a\nb good day\n"), need_text=False, max_bad=0)
    assert [u.utt_id for u in found] == ["a", "b"]


def test_a_written_directory_reads_back(tmp_path):
    utts = [
        Utterance("b", "/x/two  blanks.wav", {"text": "two  words"}, duration_s=2.5),
        Utterance("a", "/x/a.wav", {"text": "一", "text.en": "one"}, lang="zh"),
    ]
    for _ in range(2):  # writing again replaces
        assert write_kaldi_dir(tmp_path / "out/train", utts) == 2
    a, b = read_kaldi_dir(tmp_path / "out/train", max_bad=0)
    assert (a.texts, a.lang) == ({"text": "一", "text.en": "one"}, "zh")
    assert (b.source, b.texts, b.duration_s) == ("/x/two  blanks.wav", {"text": "two words"}, 2.5)
    with pytest.raises(DataError, match="two utterances are called a"):
        write_kaldi_dir(tmp_path / "o", [utts[1], utts[1]])
    (tmp_path / "mine").mkdir()
    for source in ("/x/a.wav\nb /x/b.wav", " /x/a.wav", ""):
        with pytest.raises(DataError, match="one line"):
            write_kaldi_dir(tmp_path / "o", [Utterance("a", source)])
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(DataError, match="holds files and no wav.scp"):
        write_kaldi_dir(tmp_path / "mine", utts)
    (tmp_path / "out/train/wav").mkdir()
    with pytest.raises(DataError, match="holds the folder wav"):
        write_kaldi_dir(tmp_path / "out/train", utts)


def test_real_corpora_are_read(speech_data):
    for name in ["smoke", "fsdd/train", "en_orders/dev", "aishell_sample/train"]:
        assert len(read_kaldi_dir(speech_data / name)) >= 10
