#!/usr/bin/env python3
"""Put the figures of docs/results/*.json into the tables of docs/results.md, one block per file.

python benchmarks/common/tables.py            # write
python benchmarks/common/tables.py --check    # only say whether the tables are those of the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from funasr_mooer.errors import DataError
from funasr_mooer.score.report import replace_block, write_atomic

ROOT = Path(__file__).parents[2]
ORIGIN = ("command", "commit", "machine", "date")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    args = parser.parse_args()
    page = ROOT / "docs/results.md"
    old = page.read_text(encoding="utf-8")
    new = filled(old, sorted((ROOT / "docs/results").glob("*.json")))
    if new == old:
        print(f"{page.relative_to(ROOT)}: up to date")
    elif args.check:
        print(f"{page.relative_to(ROOT)}: not the figures of docs/results; run python benchmarks/common/tables.py")
    else:
        write_atomic(page, new)
        print(f"{page.relative_to(ROOT)}: written")
    return int(args.check and new != old)


def filled(text: str, files: list[Path]) -> str:
    """``text`` with the block of each file's name replaced by its table.

    Raises:
        DataError: a file has no block, or is not flat JSON with its origin.
    """
    for file in files:
        text = replace_block(text, file.stem, table(file))
    return text


def table(file: Path) -> str:
    """The figures of one benchmark as Markdown, and where they come from."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        origin = {key: content.pop(key) for key in ORIGIN}
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{file}: not what a benchmark writes with --json ({error})") from error
    rows = [f"| {name} | {value:g} |" for name, value in content.items() if isinstance(value, (int, float))]
    source = f"`{origin['command']}`, commit {origin['commit']}, {origin['date']}, {origin['machine']}"
    return "\n".join([source, "", "| figure | value |", "| --- | ---: |", *rows])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        sys.exit(f"DataError: {error}")
