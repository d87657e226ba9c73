"""`funasr-mooer score`: a user's commands, from transcripts to the table in a README."""

import json

import pytest

from funasr_mooer.bin.score import alignment, main
from funasr_mooer.score.error_rate import align


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref").write_text("a 今天天气很好\nb hello there\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("a 今天天气真好啊\n", encoding="utf-8")
    return ["--ref", "ref", "--hyp", "hyp"]


def test_from_transcripts_to_the_table_in_a_readme(files, tmp_path, capsys):
    more = ["--name", "tiny", "--out", "result.json", "--per-utt", "utts.tsv", "--meta", "hardware=1 x S4000", "seed=3"]
    assert main(["compute", *files, "--metric", "mer", "--normaliser", "mooer", *more]) == 0
    assert "missing: b" in capsys.readouterr().out
    told = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (told["value"], told["hardware"], told["seed"], told["ref"]) == (50.0, "1 x S4000", 3, "ref")
    assert told["command"].startswith("funasr-mooer score compute --ref ref --hyp hyp --metric mer")
    assert (tmp_path / "utts.tsv").read_text().splitlines()[1] == "a\t33.33\t6\t1\t0\t1\t5"

    row = [
        "published",
        "--name",
        "MooER",
        "--metric",
        "mer",
        "--value",
        "1.93",
        "--source",
        "README",
        "--out",
        "p.json",
    ]
    assert main(row) == 0
    (tmp_path / "README.md").write_text("<!-- results: t -->\n<!-- end results -->\n", encoding="utf-8")
    table = ["table", "result.json", "p.json", "--markdown", "README.md", "--block", "t"]
    assert main([*table, "--check"]) == 2
    assert main(table) == 0
    assert main([*table, "--check"]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| tiny | mer | 50.00 |" in page
    assert "published: README" in page


def test_bleu_has_its_own_defaults(files, tmp_path):
    pytest.importorskip("sacrebleu")
    assert main(["compute", *files, "--metric", "bleu", "--tokenise", "zh", "--out", "bleu.json"]) == 0
    told = json.loads((tmp_path / "bleu.json").read_text(encoding="utf-8"))
    assert told["normaliser"] == "none@1"
    assert "tok:zh" in told["signature"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compute", "--ref", "ref", "--hyp", "nope", "--metric", "cer"], "DataError: nope: no such transcript file\n"),
        (["compute", "--ref", "hyp", "--hyp", "ref", "--metric", "cer"], "utt b has a hypothesis and no reference;"),
        (
            ["compute", "--ref", "ref", "--hyp", "hyp", "--metric", "cer", "--normaliser", "bsic"],
            "did you mean 'basic'",
        ),
        (["compute", "--ref", "ref", "--hyp", "hyp", "--metric", "cer", "--meta", "x"], "write KEY=VALUE"),
        (["align", "--ref", "ref", "--hyp", "hyp", "--utt", "z"], "ref: no utt z"),
        (["table", "nope.json"], "nope.json: no such result file"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(files, capsys, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_an_alignment_lines_up_in_a_terminal_where_cjk_takes_two_cells():
    pairs = align(["打", "开", "light", "吧"], ["打", "light", "of", "吧"])
    assert alignment("a", pairs)[1:] == [
        "ref  打 开 light ** 吧",
        "hyp  打 ** light of 吧",
        "        D        I",
    ]


def test_a_long_alignment_breaks_between_columns():
    lines = alignment("a", align(["word"] * 10, ["word"] * 9), width=30)
    assert max(map(len, lines[1:])) <= 30
    assert len(lines) == 1 + 2 * 3


def test_align_prints_the_utterance(files, capsys):
    assert main(["align", *files, "--utt", "a"]) == 0
    assert "S=1 D=0 I=1" in capsys.readouterr().out
