"""The shape of the package, read from its source: imports point one way, and few files know FunASR or an accelerator."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "funasr_mooer"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lower rooms first. A file may import its own room and the rows before its own, never one beside or after it.
ROWS = [
    {"config", "device", "errors", "weights"},
    {"modules"},
    {"encoders", "data"},
    {"border"},  # what the systems share: models of parts, FunASR's config and inputs
    {"mooer", "u2pp_moe", "speech_out"},
    {"train", "score"},
    {"bin"},
]
# Where the package meets FunASR and its users; these bind rooms together, so they stand outside the rows.
BORDERS = {"", "plugin", "register", "auto", "model_dir"}
BASE = ROWS[0]  # single files: they may import each other

IMPORT_FUNASR = {
    "auto.py",
    "encoders/paraformer.py",
    "plugin.py",
    "register.py",
}
ACCELERATORS = {"cuda", "musa"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    """``modules`` for modules/adapter.py, ``device`` for device.py, '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def row(of: str) -> int:
    return next(number for number, rooms in enumerate(ROWS) if of in rooms)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import; write it in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, imported in imports(path):
        package, _, rest = imported.partition(".")
        if package == "funasr_mooer":
            of = rest.partition(".")[0]
            yield line, of if of in BORDERS or any(of in rooms for rooms in ROWS) else ""


def nodes(kind: type) -> Iterator[tuple[Path, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, kind):
                yield path, node


def test_every_file_belongs_to_a_room():
    known = BORDERS.union(*ROWS)
    assert [name(path) for path in SOURCES if room(path) not in known] == []


def test_imports_point_one_way():
    wrong = []
    for path in SOURCES:
        here = room(path)
        if here in BORDERS:
            continue
        for line, there in rooms_imported(path):
            if there in BORDERS or there == here:
                continue
            if not (row(there) < row(here) or {here, there} <= BASE):
                wrong.append(f"{name(path)}:{line}: {here} imports {there}")
    assert wrong == []


def test_rooms_that_every_other_room_stands_on_do_not_know_the_borders():
    wrong = [
        f"{name(path)}:{line}: imports funasr_mooer.{there}"
        for path in SOURCES
        if room(path) not in BORDERS and row(room(path)) <= row("data")
        for line, there in rooms_imported(path)
        if there in BORDERS - {""}
    ]
    assert wrong == []


def test_only_the_borders_import_funasr():
    found = {name(path): line for path in SOURCES for line, of in imports(path) if of.split(".")[0] == "funasr"}
    assert {f"{file}:{line}" for file, line in found.items() if file not in IMPORT_FUNASR} == set()


def test_classes_made_of_funasrs_are_found_after_funasr():
    from funasr_mooer.register import CLASSES, FUNASRS_OWN

    modules = {where.partition(":")[0] for where in CLASSES.values()}
    assert {module for module in modules if f"{module.replace('.', '/')}.py" in IMPORT_FUNASR} == FUNASRS_OWN


def test_accelerators_are_named_in_device_py_alone():
    wrong = []
    for path, node in nodes(ast.Attribute):
        if node.attr in ACCELERATORS and (isinstance(node.value, ast.Name) and node.value.id == "torch"):
            wrong.append(f"{name(path)}:{node.lineno}: torch.{node.attr}")
    for path, node in nodes(ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ACCELERATORS:
            wrong.append(f"{name(path)}:{node.lineno}: .{node.func.attr}()")
    for path in SOURCES:
        modules = {"torch_musa", "torch.cuda", "torch.musa"}
        wrong += [
            f"{name(path)}:{line}: import {of}" for line, of in imports(path) if any(of.startswith(m) for m in modules)
        ]
    assert [line for line in wrong if not line.startswith("device.py:")] == []


def test_no_exception_is_caught_without_saying_which():
    wrong = []
    for path, node in nodes(ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
        if node.type is None or names & {"Exception", "BaseException"}:
            wrong.append(f"{name(path)}:{node.lineno}")
    assert wrong == []


def test_every_file_says_what_it_is_for():
    silent = [name(p) for p in SOURCES if p.name != "__init__.py" and len(ast.get_docstring(tree(p)) or "") < 20]
    assert silent == []
