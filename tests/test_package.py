"""What is published: metadata, contents of the wheel, and the names a user imports."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import leasepool_django
from leasepool_django import exceptions

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "leasepool_django"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_stated_in_one_place() -> None:
    assert importlib.metadata.version("leasepool-django") == PROJECT["version"]
    stated = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == PROJECT["version"]
    ]
    assert stated == []


def test_the_changelog_has_a_place_for_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert len(headings) == len(set(headings))


def test_every_supported_combination_is_classified_and_tested() -> None:
    matrix = re.search(r"^MATRIX := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert matrix is not None
    pairs = [pair.split(":") for pair in matrix[1].split()]
    classifiers = "\n".join(PROJECT["classifiers"])
    assert {python for python, _ in pairs} == set(
        re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    )
    assert {django for _, django in pairs} == set(
        re.findall(r"^Framework :: Django :: (\d+\.\d+)$", classifiers, re.MULTILINE)
    )
    assert PROJECT["requires-python"] == f">={pairs[0][0]}"


def test_the_wheel_holds_the_whole_package_and_nothing_else() -> None:
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    written = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == written
    assert "leasepool_django/py.typed" in shipped


def test_every_public_name_is_there() -> None:
    assert len(leasepool_django.__all__) == len(set(leasepool_django.__all__))
    missing = [name for name in leasepool_django.__all__ if not hasattr(leasepool_django, name)]
    assert missing == []
    assert set(leasepool_django.__all__) <= set(dir(leasepool_django))


def test_every_error_of_the_package_is_in_one_module_and_public() -> None:
    modules = [
        importlib.import_module(f"leasepool_django.{path.stem}")
        for path in PACKAGE.glob("*.py")
        if path.stem not in {"__init__", "pytest_plugin"}
    ]
    errors = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, exceptions.LeasePoolError)
    }
    assert {error.__module__ for error in errors} == {exceptions.__name__}
    assert {error.__name__ for error in errors} == set(exceptions.__all__)
    assert set(exceptions.__all__) <= set(leasepool_django.__all__)


def test_a_wrong_name_is_an_attribute_error_that_quotes_it() -> None:
    with pytest.raises(AttributeError, match="LeasedExecutorManger"):
        getattr(leasepool_django, "LeasedExecutorManger")  # noqa: B009


def test_the_engine_is_imported_from_the_package_without_django() -> None:
    program = (
        "import sys\n"
        "from leasepool_django import LeasedExecutorManager, ExecutorBackend, LeasePoolError\n"
        "assert 'django' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
