"""result.json and the tables made from it."""

import json
import re

import pytest

from funasr_mooer.errors import DataError
from funasr_mooer.score.error_rate import error_rate
from funasr_mooer.score.report import Report, Result, load_result, replace_block, result_of, update_markdown

PAGE = (
    "# Results\n<!-- results: test -->\nold\n<!-- end results -->\ntail\n<!-- results: dev -->\n<!-- end results -->\n"
)


@pytest.fixture
def result():
    score = error_rate({"a": "今天 ok", "b": "hello there"}, {"a": "今天 oh"}, "mer")
    return result_of(score, "tiny", config="conf/tiny.yaml", seed=7, gpu="none")


def test_a_result_says_how_it_was_made_and_survives_the_file(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score = error_rate({"a": "x"}, {"a": "x"}, "wer")
    assert result_of(score, "n", tmp_path / "data" / "text").ref == "data/text"
    path = tmp_path / "exp" / "result.json"
    result.save(path)
    assert load_result(path) == result
    told = json.loads(path.read_text(encoding="utf-8"))
    assert (told["value"], told["N"], told["S"], told["D"], told["I"]) == (60.0, 5, 1, 2, 0)
    assert (told["normaliser"], told["seed"], told["config"], told["meta"]) == (
        "basic@1",
        7,
        "conf/tiny.yaml",
        {"gpu": "none"},
    )
    assert told["examples"] == {"missing": ["b"]}
    assert told["languages"]["zh"] == {"value": 0.0, "N": 2, "S": 0, "D": 0, "I": 0}
    assert told["versions"]["python"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", told["date"])
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]  # no temporary file is left


def test_a_file_that_is_no_result_is_refused_by_name(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(DataError, match="no such result file"):
        load_result(path)
    path.write_text('{"name": "a", "metric": "cer", "valeu": 1}')
    with pytest.raises(DataError, match=r"result\.json: .*did you mean 'value'"):
        load_result(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="not a result.json"):
        load_result(path)


def test_a_table_shows_what_was_measured_beside_what_others_published(result):
    published = Result(name="MooER-5K", metric="cer", value=1.93, published="MooER README")
    header, ours, theirs = (line for line in Report([result, published]).markdown().splitlines() if "---" not in line)
    cells = dict(zip(header.split(" | "), ours.split(" | ")))
    assert (cells["value"], cells["zh"], cells["D"], cells["missing"]) == ("60.00", "0.00", "2", "1")
    assert "| 1.93 |" in theirs
    assert "published: MooER README" in theirs
    assert "wrong script" not in header  # nothing to say


def test_a_pipe_in_a_name_does_not_break_the_table():
    assert r"| a\|b |" in Report([Result(name="a|b", metric="cer", value=1.0)]).markdown()


def test_only_the_named_block_is_replaced_and_doing_it_again_changes_nothing():
    page = replace_block(PAGE, "test", "| new |")
    assert page == PAGE.replace("-->\nold\n<", "-->\n\n| new |\n\n<")
    assert replace_block(page, "test", "| new |") == page


def test_a_block_that_is_not_there_once_is_an_error_that_lists_the_blocks():
    with pytest.raises(DataError, match=r"block 'tset', found 0 \(blocks: test, dev\)"):
        replace_block(PAGE, "tset", "")
    with pytest.raises(DataError, match="found 2"):
        replace_block(PAGE * 2, "test", "")


def test_an_unfinished_block_is_not_mistaken_for_one_that_swallows_the_next():
    with pytest.raises(DataError, match="block 'a', found 0"):
        replace_block("<!-- results: a -->\nx\n<!-- results: b -->\n<!-- end results -->\n", "a", "")


def test_a_markdown_file_is_updated_or_only_checked(result, tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(PAGE, encoding="utf-8")
    report = Report([result])
    assert update_markdown(path, "test", report, check=True)
    assert path.read_text(encoding="utf-8") == PAGE
    assert update_markdown(path, "test", report)
    assert "| tiny | mer | 60.00 |" in path.read_text(encoding="utf-8")
    assert not update_markdown(path, "test", report)
