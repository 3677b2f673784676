"""The README and the pages of ``docs/`` say what the code does.

How a page's code blocks are tied to modules is said in ``tests/pages.py``.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from leasepool_django import (
    WorkerCrashedError,
    checks,
    conf,
    exceptions,
    pools,
    run_in_pool_sync,
)
from leasepool_django.backends.process import ProcessBackend
from leasepool_django.engine.config import ManagerConfig
from readme import settings as readme_settings
from tests import process_jobs as jobs
from tests.pages import PAGES, RECIPES, ROOT, Block, anchors, blocks, code_of, links, tables
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Commands on the pages that do not end by themselves.
UNENDING = {"runserver", "--watch", "testserver", "shell", "dbshell"}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


# -- code -----------------------------------------------------------------------------------------


@each_page
def test_code_blocks_are_as_their_modules(page: Path) -> None:
    for block in blocks(page, "python"):
        if module := block.names("file"):
            assert block.text == code_of(module), (
                f"{block} is not {module.name}: python -m tests.pages writes it anew"
            )
        elif module := block.names("part-of"):
            assert block.text.strip("\n") in code_of(module), f"{block} is no part of {module.name}"


@pytest.mark.parametrize("project", ["readme", "shop"])
def test_every_module_of_a_project_is_on_a_page(project: str) -> None:
    shown = {
        block.names(key)
        for page in PAGES
        for block in blocks(page, "python")
        for key in ("file", "part-of")
    }
    modules = {path for path in (RECIPES / project).glob("*.py") if path.read_text()}
    assert modules - shown - {RECIPES / "shop" / "urls.py"} == set()


@each_page
def test_blocks_without_a_module_compile_and_run(page: Path, tmp_path: Path) -> None:
    """Each is imported as a module, in a process of its own, with Django set up."""
    names = []
    for block in blocks(page, "python"):
        if "fragment" in block.info.split():
            compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif not block.info:
            names.append(f"line_{block.line}")
            (tmp_path / f"{names[-1]}.py").write_text(block.text)
    if not names:
        return
    program = (
        "import sys, importlib, django\n"
        "django.setup()\n"
        "from leasepool_django import conf\n"
        "from django.test import override_settings\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    if hasattr(module, 'LEASEPOOL'):\n"
        "        with override_settings(LEASEPOOL=module.LEASEPOOL):\n"
        "            conf.get_config()\n"
    )
    run(
        [sys.executable, "-W", "error", "-c", program, *names],
        DJANGO_SETTINGS_MODULE="tests.settings",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(RECIPES), str(tmp_path)]),
    )


def run(command: list[str], **environment: str) -> str:
    """Run a command to its end, which must be a good one, and return what it has printed."""
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


@pytest.fixture
def readme_pools(settings: Settings) -> Iterator[None]:
    """The pools of the README's settings."""
    settings.LEASEPOOL = readme_settings.LEASEPOOL
    yield
    pools.reset()


def callables(module: Any) -> list[Callable[..., Any]]:
    """The functions of a module that need nothing, or a request."""
    return [
        function
        for function in vars(module).values()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and set(inspect.signature(inspect.unwrap(function)).parameters) <= {"request", "lease"}
    ]


README_MODULES = [
    path.stem
    for path in sorted((RECIPES / "readme").glob("[a-z]*.py"))
    if path.stem != "receivers"  # which stay connected; see the test after the next
]


@pytest.mark.parametrize("name", README_MODULES)
def test_the_readmes_code_runs(name: str, readme_pools: None) -> None:
    """Views are given a request, other functions nothing; all run against real pools."""
    module = importlib.import_module(f"readme.{name}")
    for function in callables(module):
        needs_request = "request" in inspect.signature(function).parameters
        arguments: list[HttpRequest] = [RequestFactory().get("/")] if needs_request else []
        result = function(*arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        if needs_request:
            assert isinstance(result, HttpResponse)
            assert result.status_code == 200


def test_the_readmes_views_are_among_those_that_run() -> None:
    found = [
        name for name in README_MODULES if callables(importlib.import_module(f"readme.{name}"))
    ]
    assert found == [
        "blocking",
        "first",
        "leased_view",
        "limited",
        "offloaded",
        "one_call",
        "one_lease",
        "progress",
        "standalone",
    ]


def test_the_readmes_receiver_is_told_of_a_crash(
    readme_pools: None, caplog: pytest.LogCaptureFixture
) -> None:
    from leasepool_django import signals
    from readme.receivers import report_trouble

    try:
        with pytest.raises(WorkerCrashedError):
            run_in_pool_sync(jobs.exit_at_once, 3)
        wait_until(lambda: "readme.receivers" in {record.name for record in caplog.records})
    finally:
        for signal in (signals.worker_crashed, signals.lease_expired):
            assert signal.disconnect(report_trouble)
    [record] = [record for record in caplog.records if record.name == "readme.receivers"]
    assert record.getMessage().startswith("default: ")


# -- commands -------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[Block, str]]:
    """The commands in console blocks, without comments; continued lines are one command."""
    for page in PAGES:
        for block in blocks(page, "console", "shell", "sh", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("$ ") or (line and block.language != "console"):
                    yield block, line.removeprefix("$ ")


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


MANAGE = list(
    dict.fromkeys(
        line
        for _, line in command_lines()
        if "manage.py" in words(line)[:3] and not UNENDING & set(words(line))
    )
)


@pytest.mark.parametrize("line", MANAGE)
def test_management_commands_run(line: str, tmp_path: Path) -> None:
    given = words(line)
    if "--output" in given:
        given[given.index("--output") + 1] = str(tmp_path / "results")
    start = next(number for number, word in enumerate(given) if word.endswith("manage.py"))
    settings = dict(word.split("=", 1) for word in given[:start] if "=" in word)
    settings.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")
    run([sys.executable, *given[start:]], **settings)


def test_make_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block, line in command_lines():
        given = words(line)
        if given[:1] == ["make"]:
            asked = {word for word in given[1:] if "=" not in word}
            assert asked <= targets, f"{block}: {line}"
        for extra in re.findall(r"leasepool-django\[([\w,]+)\]", line):
            extras = set(extra.split(","))
            assert extras <= set(PROJECT["optional-dependencies"]), f"{block}: {line}"


# -- tables ---------------------------------------------------------------------------------------


def table(page: Path, header: str) -> dict[str, dict[str, str]]:
    """Name → row of the page's only table whose first column has this header."""
    [found] = [rows for rows in tables(page) if next(iter(rows[0])) == header]
    named = {row[header].strip("`"): row for row in found}
    assert len(named) == len(found)
    return named


def literal(cell: str) -> Any:
    """The value that a cell shows as code."""
    shown = re.match(r"`([^`]*)`", cell)
    assert shown, cell
    return ast.literal_eval(shown[1])


def test_the_table_of_settings_is_as_the_code_has_it(settings: Settings) -> None:
    rows = table(SETTINGS, "key")
    assert list(rows) == ["BACKEND", *sorted(conf.KEYS, key=list(rows).index), "OPTIONS"]
    settings.LEASEPOOL = {}
    defaults = conf.get_config()["default"]
    assert literal(rows["BACKEND"]["default"]) == defaults.backend
    assert literal(rows["OPTIONS"]["default"]) == dict(defaults.options)
    for name, key in conf.KEYS.items():
        default, unit = rows[name]["default"], rows[name]["unit"]
        if name == "WORKERS_PER_POOL":
            assert default == "usable cores"
        elif name == "LOG_LEVEL":
            assert logging.getLevelName(literal(default)) == key.default
        elif name == "CONTEXT":
            assert tuple(literal(default)) == key.default
        else:
            assert literal(default) == key.default, name
        is_duration = key.problem is conf.ProblemId.BAD_DURATION
        is_count = key.problem is conf.ProblemId.BAD_COUNT
        assert (unit == "seconds") == is_duration, name
        assert bool(unit) == (is_duration or is_count), name
        assert rows[name]["meaning"]


def test_the_table_of_options_is_as_the_backend_has_it() -> None:
    rows = table(SETTINGS, "option")
    assert set(rows) == ProcessBackend.option_names()
    given = {
        name: literal(row["default"])
        for name, row in rows.items()
        if literal(row["default"]) is not None
    }
    config = ManagerConfig(max_pools=1)
    added = {"nice": conf.DEFAULT_NICE}  # to what is said in the settings
    as_documented, by_default = ProcessBackend(config, given), ProcessBackend(config, added)
    if sys.platform != "darwin":
        assert as_documented._setup == by_default._setup
    assert as_documented.max_shared_bytes == by_default.max_shared_bytes
    assert as_documented._start_timeout == by_default._start_timeout
    for name in ("max_rss_per_child", "max_shared_bytes"):
        assert rows[name]["unit"] == "bytes"


@pytest.mark.parametrize("header", ["key", "option"])
def test_the_readme_has_rows_of_the_tables_of_settings(header: str) -> None:
    complete = table(SETTINGS, header)
    # Its table of command line options has no units.
    [found] = [rows for rows in tables(README) if {header, "unit"} <= rows[0].keys()]
    names = [row[header].strip("`") for row in found]
    assert len(names) < len(complete)
    assert names == [name for name in complete if name in names]
    assert found == [complete[name] for name in names]


def errors(base: type[exceptions.LeasePoolError]) -> Iterator[type[exceptions.LeasePoolError]]:
    """The package's own errors below ``base``."""
    for error in base.__subclasses__():
        if error.__module__.startswith("leasepool_django."):
            yield error
            yield from errors(error)


def test_the_table_of_errors_names_each_with_its_standard_bases() -> None:
    rows = table(README, "error")
    known_errors = {error.__name__: error for error in errors(exceptions.LeasePoolError)}
    assert set(exceptions.__all__) - {"LeasePoolError"} <= known_errors.keys()
    assert set(rows) == known_errors.keys()
    for name, row in rows.items():
        error = known_errors[name]
        bases = {base.__name__ for base in error.__bases__} - {"LeasePoolError"}
        assert set(re.findall(r"`(\w+)`", row["also a"])) == bases, name
        assert row["when"], name
        assert row["what to do"], name
        facts = {fact for base in error.__mro__ for fact in vars(base).get("__annotations__", {})}
        told = set(re.findall(r"`([a-z_]+)`", row["what to do"]))
        known = {"wait", "with_lease", "lease_seconds", "pools", "call_timeout"}
        assert told <= facts | known, name


def test_every_system_check_is_documented() -> None:
    rows = table(SETTINGS, "id")
    assert list(rows) == [str(problem) for problem in conf.ProblemId]
    of_deployment = ("_asgi_problems", "_deployment_problems")
    sources = "".join(inspect.getsource(getattr(checks, name)) for name in of_deployment)
    for problem in conf.ProblemId:
        deploy = f"ProblemId.{problem.name}," in sources
        assert rows[problem]["marked"] == ("`--deploy`" if deploy else ""), problem
        assert rows[problem]["what to do"].endswith("."), problem


def test_every_signal_is_named_in_the_readme() -> None:
    from django.dispatch import Signal

    from leasepool_django import signals

    names = {name for name, value in vars(signals).items() if isinstance(value, Signal)}
    section = README.read_text().partition("\n## Signals\n")[2].partition("\n```")[0]
    assert set(re.findall(r"`([a-z]+_[a-z_]+)`", section)) - {"leasepool_django"} == names


# -- links ----------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            continue
        path = (page.parent / parts.path) if parts.path else page
        assert path.exists(), f"{page_id(page)} links to {target}, which is not there"
        if parts.fragment:
            assert parts.fragment in anchors(path), f"{page_id(page)} links to {target}"


def test_the_readme_links_to_every_page() -> None:
    linked = {(ROOT / target).resolve() for target in links(README) if not urlsplit(target).scheme}
    assert set(PAGES) - {README} <= linked
