"""What README.md and docs/ tell people to type exists: commands, flags, imports, arguments, YAML, links.

Recipes are dry-run, tools are asked whether they know the flags, ``make`` prints what it would do. Only what needs
a network, an editor or somebody's data is left alone, by name and with a reason.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "python", "yaml", "text"}

LEFT_ALONE = {
    "git clone": "needs a network",
    "pip install": "changes this environment",
    "modelscope download": "needs a network",
    "$EDITOR": "waits for a person",
    ". .venv/bin/activate": "changes the shell it runs in",
}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return [block for block in found if language in ("", block.language)]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, comments dropped, continued lines joined, ``a && b`` taken apart."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What commands of a page may change, in a copy."""
    for name in ("egs", "conf"):
        ignored = shutil.ignore_patterns("exp*", "data*", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("Makefile", "setup.sh", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("funasr_mooer", "constraints", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_work(page, checkout):
    """A block starts at the root, or where the block before it stopped if its first command is ./something."""
    here = checkout
    for block in blocks("bash"):
        if block.page == page:
            here = here if block.code.startswith("./") else checkout
            for words in commands(block.code):
                here = follow(words, here)


def follow(words: list[str], here: Path) -> Path:
    """Try one command in the folder ``here``; the folder of the next."""
    command = shlex.join(words)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if any(" ".join(words).startswith(left) for left in LEFT_ALONE):
        return here
    if words[0] == "cd":
        assert (here / words[1]).is_dir(), command
        return here / words[1]
    if words[0] == "cp":
        run(words, here)
    elif words[0] == "make":
        run(["make", "-n", *words[1:]], here)
    elif words[0].endswith("run.sh") or words[0] == "bash":
        run(["bash", *(words[1:] if words[0] == "bash" else words), "--dry-run"], here)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], command
    elif tool(words):
        check_flags(*tool(words))
    else:
        pytest.fail(f"{command}: this test does not know how to check it")
    return here


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def tool(words: list[str]) -> tuple[str, list[str]] | None:
    """(name, arguments) of ``funasr-mooer NAME ...`` and ``python -m funasr_mooer.bin.NAME ...``."""
    if words[0] == "funasr-mooer":
        return (words[1], words[2:]) if len(words) > 1 else ("main", [])
    if words[:2] == ["python", "-m"] and words[2].startswith("funasr_mooer.bin."):
        return words[2].removeprefix("funasr_mooer.bin."), words[3:]
    return None


def check_flags(name: str, arguments: list[str]) -> None:
    verb = tuple(arguments[:1]) if arguments and not arguments[0].startswith(("-", "+")) else ()
    known = re.findall(r"--[a-z][\w-]*", help_of(name, verb))
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in known, f"{name} {' '.join(verb)} has no {argument}"


@functools.cache
def help_of(name: str, verb: tuple[str, ...]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        raise SystemExit(importlib.import_module(f"funasr_mooer.bin.{name}").main([*verb, "--help"]))
    assert stop.value.code == 0, f"{name} {' '.join(verb)} --help"
    return out.getvalue()


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_names_things_that_exist(block):
    from funasr_mooer.auto import CALL_KEYS
    from funasr_mooer.mooer.generate import DECODE_KEYS
    from funasr_mooer.u2pp_moe.search import DECODE_KEYS as U2PP_DECODE_KEYS

    page = ast.parse(block.code, str(block))
    modules = {}
    for node in ast.walk(page):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                modules[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(page):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "generate":
            assert {keyword.arg for keyword in node.keywords} <= {"input", *CALL_KEYS, *DECODE_KEYS, *U2PP_DECODE_KEYS}


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_has_our_sections(block):
    from funasr_mooer.border.build import SECTIONS

    assert set(yaml.safe_load(block.code)) <= set(SECTIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:funasr_mooer|egs|conf|docs|tests|constraints)/[\w./-]+)`", text)
    missing = [path for path in paths if "my_" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_every_block_says_its_language():
    assert [str(block) for block in blocks("") if block.language not in LANGUAGES] == []


def test_result_blocks_can_be_filled():
    from funasr_mooer.score.report import replace_block

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^<!-- results: (\S+) -->$", text, re.MULTILINE)
    assert names
    for name in names:
        assert "| a |" in replace_block(text, name, "| a |\n|---|\n")
