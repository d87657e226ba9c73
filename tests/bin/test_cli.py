"""Tools end politely: exit codes, one line on stderr; `funasr-mooer` finds them without importing them."""

import argparse
import errno
import subprocess
import sys

import pytest

from funasr_mooer.bin import cli
from funasr_mooer.bin import main as dispatcher
from funasr_mooer.errors import DataError


def ending(error: BaseException) -> int:
    @cli.run
    def main(argv=None) -> int:
        raise error

    return main([])


def test_our_errors_are_one_line_and_exit_code_2(capsys):
    assert ending(DataError("data/text:3: is bad\n  throw it away")) == 2
    assert capsys.readouterr().err == "DataError: data/text:3: is bad throw it away\n"


def test_a_traceback_is_there_for_those_who_ask(capsys, monkeypatch):
    monkeypatch.setenv("FUNASR_MOOER_DEBUG", "1")
    assert ending(DataError("bad")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130_and_a_defect_of_ours_is_not_hidden():
    assert ending(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


def test_a_full_disk_and_a_forbidden_folder_are_one_line_and_exit_code_2(capsys):
    assert ending(OSError(errno.ENOSPC, "No space left on device", "exp/text")) == 2
    assert capsys.readouterr().err == "OSError: [Errno 28] No space left on device: 'exp/text'\n"
    assert ending(PermissionError(errno.EACCES, "Permission denied", "/exp")) == 2
    assert ending(FileExistsError(errno.EEXIST, "File exists", "text")) == 2
    with pytest.raises(OSError, match="Bad file descriptor"):
        ending(OSError(errno.EBADF, "Bad file descriptor"))


def test_counts_are_whole_numbers_from_1_on():
    assert cli.positive("12") == 12
    for text in ("0", "-1", "two", "1.5", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 on"):
            cli.positive(text)


def test_a_closed_pipe_ends_quietly():
    code = (
        "from funasr_mooer.bin.cli import run\n"
        "@run\n"
        "def main(argv=None):\n"
        "    for i in range(100000): print(i)\n"
        "    return 0\n"
        "raise SystemExit(main())"
    )
    done = subprocess.run(f"\"{sys.executable}\" -c '{code}' | head -1", shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_tools_are_listed_from_their_source_alone(tmp_path, capsys):
    (tmp_path / "pack.py").write_text('"""Packs a corpus.\n\nMore."""\nraise RuntimeError("was imported")\n')
    for name in ("cli.py", "main.py", "__init__.py", "_private.py"):
        (tmp_path / name).write_text("")
    assert dispatcher.tools(tmp_path) == {"pack": "Packs a corpus."}
    assert dispatcher.main([]) == 0
    assert "score " in capsys.readouterr().out


def test_a_tool_gets_the_arguments_after_its_name(capsys):
    with pytest.raises(SystemExit) as stop:
        dispatcher.main(["score", "--help"])
    assert stop.value.code == 0
    assert "usage: funasr-mooer score" in capsys.readouterr().out


def test_an_unknown_tool_suggests_the_nearest(capsys):
    assert dispatcher.main(["scroe"]) == 2
    assert "no such tool; did you mean 'score'?" in capsys.readouterr().err


def test_neither_the_list_of_tools_nor_the_help_of_any_imports_torch_or_funasr():
    code = """
import contextlib, sys
from pathlib import Path
from funasr_mooer.bin import main
main.main([])
for name in main.tools(Path(main.__file__).parent):
    with contextlib.suppress(SystemExit):
        main.main([name, "--help"])
    assert not {"torch", "funasr"} & {*sys.modules}, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
