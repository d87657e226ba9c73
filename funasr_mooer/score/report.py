"""result.json, and the tables made from it: a number in a README is never typed by hand."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from funasr_mooer.config import section
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score.bleu import Bleu
from funasr_mooer.score.error_rate import Counts, ErrorRate

DIGITS = 4  # of a percentage in result.json
NAMED = 5  # utterances named per kind of trouble
PACKAGES = ("funasr_mooer", "funasr", "torch", "transformers", "peft", "numpy", "sacrebleu")
BLOCK = re.compile(r"(<!-- results: (?P<name>\S+) -->\n)(?:(?!<!-- results: ).)*?(<!-- end results -->)", re.DOTALL)


@dataclass
class Result:
    """One row of a table: a score, how it was made, and what it was made from. Percentages; paths relative."""

    name: str
    metric: str
    value: float
    interval: list[float] | None = None
    N: int | None = None
    S: int | None = None
    D: int | None = None
    I: int | None = None  # noqa: E741  the field's letter for insertions
    utterances: int | None = None
    languages: dict[str, Any] = field(default_factory=dict)  # zh: {value, N, S, D, I}
    chrf: float | None = None
    missing: int = 0  # references without hypothesis, counted as deletions
    extra: int = 0  # hypotheses without reference, left out
    wrong_script: int = 0
    value_without_wrong_script: float | None = None
    runaway: int = 0
    examples: dict[str, Any] = field(default_factory=dict)  # missing: the first ids of that kind
    normaliser: str = ""
    signature: str = ""
    chrf_signature: str = ""
    ref: str = ""
    hyp: str = ""
    published: str = ""  # where others published this number; empty for our own
    config: str = ""
    command: str = ""
    commit: str = ""
    seed: int | None = None  # of the training run, where there is one
    date: str = ""
    hardware: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write result.json, whole or not at all."""
        write_atomic(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n")


def load_result(path: str | Path) -> Result:
    """Read a result.json.

    Raises:
        DataError: no such file, not JSON, or not with the fields of :class:`Result`.
    """
    try:
        return section(Result, json.loads(Path(path).read_text(encoding="utf-8")), "result")
    except FileNotFoundError:
        raise DataError(f"{path}: no such result file; make it with `score compute --out`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{path}: not a result.json: {error}") from error


def result_of(score: ErrorRate | Bleu, name: str, ref: str | Path = "", hyp: str | Path = "", **facts: Any) -> Result:
    """The row for a score, with today's date, this commit, this machine and these versions.

    Args:
        score: what was measured.
        name: the row's name.
        ref: reference file, recorded relative to the current directory.
        hyp: hypothesis file, likewise.
        **facts: fields of :class:`Result` that the caller knows better (``config``, ``hardware``, ``seed``, ...);
            any other key goes to ``meta``.
    """
    fields = {item.name: item for item in dataclasses.fields(Result)}
    known: dict[str, Any] = {
        "ref": _relative(ref),
        "hyp": _relative(hyp),
        "normaliser": score.normaliser,
        "signature": score.signature,
        "interval": [round(end, DIGITS) for end in score.interval],
        "missing": len(score.missing),
        "extra": len(score.extra),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores (scoring)",
        "versions": installed_versions(),
    }
    known |= _error_rate_fields(score) if isinstance(score, ErrorRate) else _bleu_fields(score)
    meta = {key: value for key, value in facts.items() if key not in fields}
    known |= {key: value for key, value in facts.items() if key in fields}
    return section(Result, {"name": name, **known, "meta": meta}, "result")


@dataclass
class Report:
    """Several results in one table, in the order given; columns that say nothing are left out."""

    results: list[Result]

    @classmethod
    def load(cls, paths: Iterable[str | Path]) -> Report:
        """Read the results of several result.json files."""
        return cls([load_result(path) for path in paths])

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells."""
        rows = [_cells(result) for result in self.results]
        header = [key for key in _COLUMNS if key in ("name", "metric", "value") or any(row.get(key) for row in rows)]
        return header, [[row.get(key, "") for key in header] for row in rows]

    def is_number(self, heading: str) -> bool:
        """Whether a column is right-aligned."""
        return heading in _NUMBERS

    def markdown(self) -> str:
        """A Markdown table; numbers are right-aligned."""
        header, rows = self.rows()
        rule = ["---:" if self.is_number(key) else "---" for key in header]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *escaped))

    def terminal(self) -> Table:
        """A table for ``rich``."""
        header, rows = self.rows()
        table = Table(box=box.SIMPLE_HEAD)
        for key in header:
            number = self.is_number(key)
            table.add_column(key, justify="right" if number else "left", no_wrap=number)
        for row in rows:
            table.add_row(*row)
        return table


def replace_block(text: str, name: str, table: str) -> str:
    """``text`` with what stands between ``<!-- results: name -->`` and ``<!-- end results -->`` replaced.

    Raises:
        DataError: there is no such block, or more than one.
    """
    found = [match for match in BLOCK.finditer(text) if match["name"] == name]
    if len(found) != 1:
        names = ", ".join(match["name"] for match in BLOCK.finditer(text)) or "none"
        lines = f"<!-- results: {name} --> and <!-- end results -->"
        raise DataError(f"wanted one block '{name}', found {len(found)} (blocks: {names}); write the lines {lines}")
    start, end = found[0].end(1), found[0].start(3)
    return f"{text[:start]}\n{table.strip()}\n\n{text[end:]}"


def update_markdown(path: str | Path, name: str, report: Report, *, check: bool = False) -> bool:
    """Put the report's table into block ``name`` of a Markdown file; whether the file had to change.

    Args:
        path: the file.
        name: the block.
        report: the table.
        check: only look, do not write.

    Raises:
        DataError: no such file or block.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such Markdown file")
    old = path.read_text(encoding="utf-8")
    try:
        new = replace_block(old, name, report.markdown())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if new != old and not check:
        write_atomic(path, new)
    return new != old


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name beside it and rename it; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def git_commit() -> str:
    """Short commit of the checkout this package runs from, ``-dirty`` with uncommitted changes; '' outside git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed, without importing them, and of Python."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _error_rate_fields(score: ErrorRate) -> dict[str, Any]:
    kinds = {kind: getattr(score, kind) for kind in ("missing", "extra", "wrong_script", "runaway")}
    return {
        "metric": score.metric,
        "value": round(score.rate, DIGITS),
        **dataclasses.asdict(score.total),
        "utterances": len(score.utterances),
        "languages": {name: _share(counts) for name, counts in score.languages.items()},
        "wrong_script": len(score.wrong_script),
        "value_without_wrong_script": round(score.without_wrong_script.rate, DIGITS),
        "runaway": len(score.runaway),
        "examples": {kind: utt_ids[:NAMED] for kind, utt_ids in kinds.items() if utt_ids},
    }


def _bleu_fields(score: Bleu) -> dict[str, Any]:
    kinds = {"missing": score.missing, "extra": score.extra}
    return {
        "metric": "bleu",
        "value": round(score.bleu, DIGITS),
        "utterances": score.sentences,
        "chrf": round(score.chrf, DIGITS),
        "chrf_signature": score.chrf_signature,
        "examples": {kind: utt_ids[:NAMED] for kind, utt_ids in kinds.items() if utt_ids},
    }


def _share(counts: Counts) -> dict[str, float]:
    return {"value": round(counts.rate, DIGITS), **dataclasses.asdict(counts)}


def _relative(path: str | Path) -> str:
    return os.path.relpath(path) if str(path) else ""


_NUMBERS = ("value", "95 %", "zh", "en", "chrF", "N", "S", "D", "I", "missing", "extra", "wrong script", "run-away")
_COLUMNS = ("name", "metric", *_NUMBERS, "how", "normaliser", "commit")


def _cells(result: Result) -> dict[str, str]:
    """What each column shows of a result; columns that do not apply are absent."""
    cells = {"name": result.name, "metric": result.metric, "value": f"{result.value:.2f}"}
    if result.published:
        return cells | {"how": f"published: {result.published}"}
    if result.interval:
        cells["95 %"] = "{:.2f} - {:.2f}".format(*result.interval)
    if len(result.languages) > 1:
        cells |= {name: f"{share['value']:.2f}" for name, share in result.languages.items() if share["N"]}
    if result.chrf is not None:
        cells["chrF"] = f"{result.chrf:.2f}"
    cells |= {key: str(getattr(result, key)) for key in "NSDI" if getattr(result, key) is not None}
    if result.missing:
        cells["missing"] = str(result.missing)
    if result.extra:
        cells["extra"] = str(result.extra)
    if result.wrong_script:
        cells["wrong script"] = f"{result.wrong_script} ({result.value_without_wrong_script:.2f} without)"
    if result.runaway:
        cells["run-away"] = str(result.runaway)
    return cells | {"normaliser": result.normaliser, "commit": result.commit}
