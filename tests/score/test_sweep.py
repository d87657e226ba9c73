"""A sweep: every row with every column, decoded, scored and shown in one table."""

import json

import pytest

from funasr_mooer.bin.score import main
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score.report import Report, load_result
from funasr_mooer.score.sweep import SweepReport, read_sweep

SWEEP = """
rows: {full: {decoding_chunk_size: -1}, chunk4: {decoding_chunk_size: 4}}
columns: {greedy: {method: ctc_greedy_search}, rescoring: {method: attention_rescoring}}
"""


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Two models' texts of two sets, as `decode --sweep` leaves them: one of four words is wrong in chunks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "ref").write_text("a one two\nb three four\n")
    for model, seconds in (("moe", 3.0), ("dense", 2.0)):
        for name in ("seen", "unseen"):
            for way in read_sweep("sweep.yaml", {}):
                folder = tmp_path / model / name / way.folder
                folder.mkdir(parents=True)
                last = "four" if way.row == "full" else "five"
                (folder / "text").write_text(f"a one two\nb three {last}\n")
                facts = {"row": way.row, "column": way.column, "place": way.place, "settings": way.settings}
                facts |= {"seconds": seconds, "audio_s": 100.0, "nproc": 1, "device": "cpu"}
                (folder / "decode.json").write_text(json.dumps(facts))
    return tmp_path


def test_every_row_meets_every_column_over_the_common_settings(decoded):
    ways = read_sweep("sweep.yaml", {"beam_size": 3, "method": "attention"})
    assert [way.folder for way in ways] == ["full.greedy", "full.rescoring", "chunk4.greedy", "chunk4.rescoring"]
    assert ways[2].settings == {"beam_size": 3, "method": "ctc_greedy_search", "decoding_chunk_size": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {}\ncolumns: {a: {}}", "rows is empty"),
        ("rows: {a b: {}}\ncolumns: {a: {}}", "rows.a b: use letters"),
        ("rows: {a: 4}\ncolumns: {a: {}}", "rows.a: expected decoding settings, found 4"),
        ("rows: {a: {}}\ncolums: {a: {}}", "did you mean 'columns'"),
    ],
)
def test_a_sweep_that_cannot_work_is_named(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(tmp_path / "sweep.yaml", {})


def test_models_stand_beside_each_other_in_the_order_of_the_sweep(decoded, capsys):
    for model in ("moe", "dense"):
        for name in ("seen", "unseen"):
            texts = [str(path) for path in sorted((decoded / model / name).glob("*/text"))]
            scored = ["--metric", "wer", "--name", model, "--meta", f"set={name}", "seed=3"]
            assert main(["sweep", "--ref", "ref", "--hyp", *texts, *scored]) == 0
    results = [str(path) for model in ("moe", "dense") for path in sorted((decoded / model).rglob("result.json"))]
    assert load_result(results[0]).seed == 3
    header, rows = SweepReport.load(results).rows()
    assert header == ["wer seen / unseen", "model", "greedy", "rescoring", "RTF greedy", "RTF rescoring"]
    assert rows == [
        ["full", "moe", "0.00 / 0.00", "0.00 / 0.00", "0.0300", "0.0300"],
        ["full", "dense", "0.00 / 0.00", "0.00 / 0.00", "0.0200", "0.0200"],
        ["chunk4", "moe", "25.00 / 25.00", "25.00 / 25.00", "0.0300", "0.0300"],
        ["chunk4", "dense", "25.00 / 25.00", "25.00 / 25.00", "0.0200", "0.0200"],
    ]
    (decoded / "README.md").write_text("<!-- results: t -->\n<!-- end results -->\n")
    assert main(["table", "--sweep", *results, "--markdown", "README.md", "--block", "t"]) == 0
    assert "| chunk4 | dense | 25.00 / 25.00 |" in (decoded / "README.md").read_text()


def test_what_is_not_of_a_sweep_says_so(decoded, capsys):
    (decoded / "decode.json").write_text(json.dumps({"row": ""}))
    (decoded / "text").write_text("a one two\nb three four\n")
    assert main(["sweep", "--ref", "ref", "--hyp", "text", "--metric", "wer", "--name", "x"]) == 2
    assert "not of a sweep; score it with `score compute`" in capsys.readouterr().err
    assert main(["compute", "--ref", "ref", "--hyp", "text", "--metric", "wer", "--out", "result.json"]) == 0
    with pytest.raises(DataError, match="make it with `score sweep`"):
        SweepReport(Report.load(["result.json"]).results).rows()
