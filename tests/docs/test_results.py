"""docs/results.md shows what the files beside it say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "benchmarks/common/tables.py"


def test_tables_are_those_of_the_files():
    told = subprocess.run([sys.executable, str(TABLES), "--check"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "docs/results").glob("*.json")), ids=lambda file: file.stem)
def test_a_figure_has_its_command_and_its_benchmark(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {"command", "commit", "machine", "date"} <= content.keys()
    assert (ROOT / content["command"].split()[1]).is_file()
