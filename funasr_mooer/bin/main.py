"""The command `funasr-mooer`: lists the tools and runs one of them."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from funasr_mooer.bin.cli import run
from funasr_mooer.config import suggest
from funasr_mooer.errors import ConfigError

NOT_TOOLS = ("cli", "main")


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``funasr-mooer NAME ARGS``, the same as ``python -m funasr_mooer.bin.NAME ARGS``; without a name, list them."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    known = tools(Path(__file__).parent)
    if name in ("-h", "--help"):
        print(usage(known))
        return 0
    if name not in known:
        raise ConfigError(f"funasr-mooer {name}: no such tool{suggest(name, known)}")
    return importlib.import_module(f"funasr_mooer.bin.{name}").main(rest)


def tools(folder: Path) -> dict[str, str]:
    """Name -> first docstring line of each tool in ``folder``; read, not imported, so that it takes no time."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem not in NOT_TOOLS and not path.stem.startswith("_"):
            described = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = described.partition("\n")[0]
    return found


def usage(known: dict[str, str]) -> str:
    """The help text."""
    width = max(map(len, known), default=0)
    lines = [f"  {name:{width}}  {described}" for name, described in known.items()]
    return "\n".join(["usage: funasr-mooer NAME [ARGS]   (funasr-mooer NAME --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
