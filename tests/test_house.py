"""The rules of the house: which way imports point, what modules hold, how text is kept.

Modules are discovered, so that the rules hold for those that do not exist yet.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "leasepool_django"

# Imports point towards lower numbers. What is not named here is an entry point (asgi, management
# commands, testing, ...): it may import everything, and only entry points import it.
LAYERS = {
    "asgi_source": 0,
    "cores": 0,
    "exceptions": 0,
    "worker": 1,
    "engine": 1,
    "backends": 1,
    "conf": 2,
    "signals": 2,
    "checks": 3,
    "handler": 3,
    "presence": 2,
    "status": 2,
    "middleware": 3,
    "shortcuts": 4,
}
ENTRY_POINT = 5

# Imported by the fork server or a worker before any call. What these load, every worker carries.
WORKER_SIDE = [
    "leasepool_django",
    "leasepool_django.worker",
    "leasepool_django.backends.process.forkserver",
    "leasepool_django.backends.process.worker",
]

LONGEST_MODULE = 400
DRAWERS = {"utils", "util", "helpers", "common", "misc", "core"}
TEXT = {".cfg", ".css", ".html", ".js", ".json", ".md", ".po", ".py", ".toml", ".txt", ".yml"}
TEXT_NAMES = {"Makefile", "LICENSE", ".gitignore", "run"}
NOT_OURS = {"build", "dist", "htmlcov", "node_modules", "__pycache__"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


MODULES = {module_name(path): path for path in python_files(PACKAGE)}


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of all that a module imports, inside functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else base


def room(name: str) -> str:
    """Return the part of a dotted name that stands below the package."""
    return name.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def offences(found: Iterator[str]) -> None:
    """Fail with every offence on a line of its own."""
    lines = list(found)
    assert not lines, "\n" + "\n".join(lines)


def test_imports_point_one_way() -> None:
    def found() -> Iterator[str]:
        for name in MODULES.keys() - {PACKAGE}:
            own = LAYERS.get(room(name), ENTRY_POINT)
            for line, target in imports(name):
                if target == PACKAGE:
                    yield f"{name}:{line} imports from the package's root, which imports nothing"
                elif room(target) and target.startswith(f"{PACKAGE}."):
                    other = LAYERS.get(room(target), ENTRY_POINT)
                    if other > own:
                        yield f"{name}:{line} imports {target}, which is above it"

    offences(found())


def test_the_engine_knows_neither_django_nor_a_concrete_backend() -> None:
    def found() -> Iterator[str]:
        for name in MODULES:
            if room(name) != "engine":
                continue
            for line, target in imports(name):
                backend = target.removeprefix(f"{PACKAGE}.backends.")
                if target.partition(".")[0] in {"django", "asgiref"} or (
                    backend not in {target, "base"}
                ):
                    yield f"{name}:{line} imports {target}"

    offences(found())


def test_below_the_settings_only_the_backends_django_sides_know_django() -> None:
    def found() -> Iterator[str]:
        for name in MODULES:
            low = name == PACKAGE or LAYERS.get(room(name), ENTRY_POINT) < LAYERS["conf"]
            if low and not name.rpartition(".")[2].startswith("django_"):
                for line, target in imports(name):
                    if target.partition(".")[0] in {"django", "asgiref"}:
                        yield f"{name}:{line} imports {target}"

    offences(found())


def test_one_module_reads_the_setting() -> None:
    def reads(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr == "LEASEPOOL"
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "hasattr"}
            and any(isinstance(arg, ast.Constant) and arg.value == "LEASEPOOL" for arg in node.args)
        )

    readers = {name for name, path in MODULES.items() if any(map(reads, ast.walk(tree(path))))}
    assert readers <= {f"{PACKAGE}.conf"}


@pytest.mark.parametrize("name", [name for name in WORKER_SIDE if name in MODULES])
def test_a_workers_modules_load_only_the_standard_library(name: str) -> None:
    program = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        f"import {name}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    loaded: list[str] = json.loads(answer.stdout)
    assert name in loaded
    foreign = {module for module in loaded if module.partition(".")[0] != PACKAGE}
    ours = {room(module) for module in loaded if module.partition(".")[0] == PACKAGE}
    roots = {module.partition(".")[0] for module in foreign}
    assert roots <= sys.stdlib_module_names
    # Megabytes and milliseconds that no worker needs before its first call.
    assert not roots & {"asyncio", "unittest", "email", "http", "ssl"}
    assert ours <= {"", "exceptions", "worker", "backends"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_holds_the_names_it_lists(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == PACKAGE:
            raise
        pytest.skip(f"{error.name}, which {name} is for, is not installed")
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    assert [public for public in listed if not hasattr(module, public)] == []


def test_every_module_says_what_it_is_for() -> None:
    offences(
        str(path.relative_to(ROOT))
        for path in python_files(PACKAGE, "example_project", "tests", "benchmarks")
        # An empty __init__.py only makes a folder a package.
        if path.read_text().strip() and not ast.get_docstring(tree(path))
    )


def test_a_long_module_gives_its_reason() -> None:
    def found() -> Iterator[str]:
        for path in python_files(PACKAGE, "example_project", "tests", "benchmarks"):
            length = len(path.read_text().splitlines())
            if length > LONGEST_MODULE and "Long because" not in (
                ast.get_docstring(tree(path)) or ""
            ):
                yield (
                    f"{path.relative_to(ROOT)} has {length} lines: divide it, or give the reason"
                    " in its docstring, beginning with 'Long because'"
                )

    offences(found())


def test_no_module_is_a_drawer() -> None:
    offences(
        str(path.relative_to(ROOT))
        for path in python_files(PACKAGE, "example_project", "tests", "benchmarks")
        if DRAWERS & set(path.relative_to(ROOT).with_suffix("").parts)
    )


def test_private_names_stay_in_their_module() -> None:
    """A private attribute is reached through ``self``, or where the same module defines it.

    An exception says why on its line: ``# private: ...``.
    """
    # Private by name only: os._exit and sys._getframe are documented, and so are these.
    documented = {"_asdict", "_fields", "_make", "_replace"}

    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__") and name != "_"

    def defined(module: ast.Module) -> set[str]:
        names: set[str] = set()
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}:
                    names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # __slots__
        return names

    def found() -> Iterator[str]:
        for path in python_files(PACKAGE, "example_project"):
            own = defined(tree(path)) | documented
            lines = path.read_text().splitlines()
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Attribute):
                    owner = ast.unparse(node.value)
                    near = owner in {"self", "cls", "super()", "os", "sys"} or node.attr in own
                    names = [] if near else [node.attr]
                elif isinstance(node, ast.ImportFrom):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                for name in filter(private, names):
                    if "# private: " not in lines[node.lineno - 1]:
                        yield f"{path.relative_to(ROOT)}:{node.lineno} reaches for {name}"

    offences(found())


def text_files() -> Iterator[Path]:
    folders = [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                hidden = path.name.startswith(".") and path.name not in {".ci", ".github"}
                if not hidden and path.name not in NOT_OURS:
                    folders.append(path)
            elif path.suffix in TEXT or path.name in TEXT_NAMES:
                yield path


def test_text_is_kept_clean() -> None:
    def found() -> Iterator[str]:
        for path in text_files():
            where = path.relative_to(ROOT)
            text = path.read_bytes().decode("utf-8")
            if text and not text.endswith("\n"):
                yield f"{where}: no line end at the end"
            if text.endswith("\n\n"):
                yield f"{where}: empty lines at the end"
            for number, line in enumerate(text.split("\n"), start=1):
                if line != line.rstrip():
                    yield f"{where}:{number}: white space at the end of the line"
                if "\t" in line and path.name != "Makefile":
                    yield f"{where}:{number}: tab"
                if re.match(r"(<{7}|>{7})( |$)", line):
                    yield f"{where}:{number}: unresolved merge"
                if re.search(r"(?<![\w.~])/(home|root|Users)/\w", line):
                    yield f"{where}:{number}: a path of one machine"

    offences(found())
