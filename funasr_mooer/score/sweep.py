"""Many ways to decode the same sets: rows of settings, columns of settings, and one table of all their scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from funasr_mooer.config import load_config, section
from funasr_mooer.errors import ConfigError, DataError
from funasr_mooer.score.report import Report, Result

FACTS = ("row", "column", "place", "settings", "seconds", "audio_s", "nproc", "device")  # of decode.json
NAME = re.compile(r"[A-Za-z0-9_-]+")  # a row's and a column's name together name a folder


@dataclasses.dataclass(frozen=True)
class SweepConf:
    """A sweep file, such as ``conf/decode/u2pp_moe_sweep.yaml``.

    Attributes:
        rows: name -> decoding settings of a row of the table.
        columns: name -> those of a column.
    """

    rows: dict
    columns: dict

    def __post_init__(self) -> None:
        for part in ("rows", "columns"):
            for name, settings in getattr(self, part).items():
                if not NAME.fullmatch(str(name)):
                    raise ConfigError(f"sweep: {part}.{name}: use letters, digits, _ and - in names")
                if not isinstance(settings, Mapping):
                    raise ConfigError(f"sweep: {part}.{name}: expected decoding settings, found {settings!r}")
            if not getattr(self, part):
                raise ConfigError(f"sweep: {part} is empty")


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        row: its name in the table; empty where there is no sweep.
        column: likewise.
        settings: decoding settings.
        place: its number in the sweep, which orders the table.
    """

    row: str
    column: str
    settings: dict[str, Any]
    place: int = 0

    @property
    def folder(self) -> str:
        """Where its results go, below those of the sweep."""
        return f"{self.row}.{self.column}" if self.row else ""


def read_sweep(path: str | Path, common: Mapping[str, Any]) -> list[Way]:
    """Every row with every column of a sweep file, over the ``common`` settings.

    Raises:
        ConfigError: no such file, or not with rows and columns of settings.
    """
    conf = section(SweepConf, load_config(path), str(path))
    pairs = itertools.product(conf.rows.items(), conf.columns.items())
    return [
        Way(str(row), str(column), {**common, **of_row, **of_column}, place)
        for place, ((row, of_row), (column, of_column)) in enumerate(pairs)
    ]


def decoded_facts(hyp: str | Path) -> dict[str, Any]:
    """What ``decode`` wrote beside a text file: row, column, settings, seconds, audio_s.

    Raises:
        DataError: there is no decode.json of a sweep.
    """
    path = Path(hyp).parent / "decode.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; score what `decode --sweep` wrote")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not facts.get("row"):
        raise DataError(f"{path}: not of a sweep; score it with `score compute`")
    return {key: facts[key] for key in FACTS}


@dataclasses.dataclass
class SweepReport(Report):
    """A row per row of the sweep and model; per column the score on each set, then the real-time factor (RTF).

    A cell reads "2.30 / 17.01" where there are two sets, in the order of the first heading. RTF is over all of them.
    """

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells.

        Raises:
            DataError: a result that was not made by a sweep.
        """
        for result in self.results:
            if "row" not in result.meta:
                raise DataError(f"{result.name}: not of a sweep; make it with `score sweep`")
        results = sorted(self.results, key=lambda result: result.meta["place"])
        sets = _in_order(result.meta["set"] for result in self.results)
        columns = _in_order(result.meta["column"] for result in results)
        metric = "/".join(_in_order(result.metric for result in results))
        header = [f"{metric} {' / '.join(sets)}".strip(), "model", *columns, *(f"RTF {column}" for column in columns)]
        cells: dict[tuple, dict[str, dict[str, Result]]] = {}
        for result in results:
            by_column = cells.setdefault((result.meta["row"], result.name), {})
            by_column.setdefault(result.meta["column"], {})[result.meta["set"]] = result
        return header, [[*key, *_scores(row, columns, sets), *_speeds(row, columns)] for key, row in cells.items()]

    def is_number(self, heading: str) -> bool:
        return heading not in self.rows()[0][:2]


def _in_order(values: Iterable[str]) -> list[str]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))


def _scores(row: Mapping[str, Mapping[str, Result]], columns: list[str], sets: list[str]) -> list[str]:
    found = [[row.get(column, {}).get(each) for each in sets] for column in columns]
    return [" / ".join("-" if each is None else f"{each.value:.2f}" for each in cell) for cell in found]


def _speeds(row: Mapping[str, Mapping[str, Result]], columns: list[str]) -> list[str]:
    spent = [[result.meta for result in row.get(column, {}).values()] for column in columns]
    times = [(sum(meta["seconds"] for meta in cell), sum(meta["audio_s"] for meta in cell)) for cell in spent]
    return [f"{seconds / audio_s:.4f}" if audio_s else "-" for seconds, audio_s in times]
