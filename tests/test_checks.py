"""The system checks of ``manage.py check``: ids, messages and hints."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.checks import ERROR, run_checks

from leasepool_django.conf import ProblemId
from leasepool_django.cores import usable_cores
from tests.findings import found, only

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


def test_ids_are_unique_and_well_formed() -> None:
    ids = [problem.value for problem in ProblemId]
    assert len(ids) == len(set(ids))
    for prefix in ("leasepool.E", "leasepool.W"):
        numbers = [one.removeprefix(prefix) for one in ids if one.startswith(prefix)]
        assert numbers == [f"{number:03}" for number in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("deploy", [False, True])
def test_the_application_registers_its_checks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *, deploy: bool
) -> None:
    settings.LEASEPOOL = {"other": {"WORKERS_PER_POOL": 1}}
    monkeypatch.setenv("WEB_CONCURRENCY", "1000")
    messages = run_checks(tags=["leasepool"], include_deployment_checks=deploy)
    expected = {ProblemId.NO_DEFAULT_ALIAS}
    if deploy:
        expected.add(ProblemId.TOO_MANY_SERVER_PROCESSES)
    assert {message.id for message in messages} == expected


PLAIN = """
import sys
import django
django.setup()
print(*sorted(name for name in sys.modules if name.startswith("leasepool_django.")))
"""


def test_a_process_that_runs_no_pool_loads_nothing_of_it() -> None:
    """Workers are such processes, and ``manage.py`` with most of its commands."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["leasepool_django.apps"]


def test_the_defaults_pass(settings: Settings) -> None:
    assert found(settings, None) == []
    assert found(settings, {}, deploy=True) == []


def test_a_mistake_in_the_settings_is_an_error(settings: Settings) -> None:
    text = only(settings, {"default": {"MAX_POOL": 1}}, ProblemId.UNKNOWN_KEY)
    assert (
        text == "LEASEPOOL['default'] has the unknown key 'MAX_POOL'. | Did you mean 'MAX_POOLS'?"
    )


def test_every_alias_is_judged(settings: Settings) -> None:
    value = {"default": {"MAX_POOLS": 0}, "reports": {"LEASE_SECONDS": "3"}}
    ids = [message.id for message in found(settings, value)]
    assert ids == [ProblemId.BAD_COUNT, ProblemId.BAD_DURATION]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.no_such_module.f", "ModuleNotFoundError"),
        ("tests.django_jobs.no_such_function", "ImportError"),
        ("nothing", "ImportError"),
    ],
)
def test_an_initializer_that_cannot_be_imported(settings: Settings, path: str, reason: str) -> None:
    value = {"default": {"OPTIONS": {"initializer": path}}}
    text = only(settings, value, ProblemId.BAD_INITIALIZER)
    assert repr(path) in text
    assert reason in text


def test_an_initializer_that_is_no_function(settings: Settings) -> None:
    value = {"default": {"OPTIONS": {"initializer": "tests.django_jobs.NOT_CALLABLE"}}}
    text = only(settings, value, ProblemId.BAD_INITIALIZER)
    assert "'tests.django_jobs.NOT_CALLABLE' is not callable" in text


@pytest.mark.parametrize("name", ["coroutine", "generator", "async_generator", "generating"])
def test_an_initializer_whose_body_would_not_run(settings: Settings, name: str) -> None:
    path = f"tests.process_jobs.{name}"
    value = {"default": {"OPTIONS": {"initializer": path}}}
    text = only(settings, value, ProblemId.BAD_INITIALIZER)
    assert f"{path!r} is a coroutine or generator function, whose body would not run" in text


@pytest.mark.parametrize(
    ("preload", "quoted"),
    [
        ("tests.django_jobs", "'tests.django_jobs'"),
        (["tests.django_jobs", "tests.no_such_module"], "'tests.no_such_module'"),
        (["no_such_package.module"], "'no_such_package.module'"),
        ([3], "3"),
    ],
)
def test_preload_modules_that_cannot_be_imported(
    settings: Settings, preload: Any, quoted: str
) -> None:
    value = {"default": {"OPTIONS": {"preload": preload}}}
    assert quoted in only(settings, value, ProblemId.BAD_PRELOAD)


def test_preload_modules_are_looked_for_and_not_imported(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_preload_module.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert found(settings, {"default": {"OPTIONS": {"preload": ["heavy_preload_module"]}}}) == []


def test_what_the_backend_refuses_is_reported(settings: Settings) -> None:
    value = {"default": {"OPTIONS": {"max_tasks_per_child": "many"}}}
    text = only(settings, value, ProblemId.REFUSED_BY_BACKEND)
    assert "max_tasks_per_child" in text
    assert "'many'" in text


def test_every_mistake_of_an_alias_is_told_at_once(settings: Settings) -> None:
    value = {
        "default": {
            "MAX_POOLS": 0,
            "MIN_POOLS": 4,
            "WORKERS_PER_POOL": None,
            "OPTIONS": {
                "initializer": "tests.no_such_module.f",
                "mp_context": "fork",
                "nice": "5",
                "niceness": 5,
                "max_tasks_per_child": 3,
                "max_shared_bytes": -1,
                "preload": ["tests.no_such_module"],
            },
        }
    }
    messages = found(settings, value)
    assert [message.id for message in messages] == [
        ProblemId.BAD_COUNT,
        ProblemId.BAD_COUNT,
        ProblemId.UNKNOWN_OPTION,
        ProblemId.FORK_REFUSED,
        ProblemId.BAD_INITIALIZER,
        ProblemId.BAD_PRELOAD,
        ProblemId.REFUSED_BY_BACKEND,
        ProblemId.REFUSED_BY_BACKEND,
    ]
    assert "nice must be an integer, not '5'" in messages[-2].msg
    assert "max_shared_bytes must be at least 0, not -1" in messages[-1].msg


def test_a_backend_of_the_users_own_is_judged_as_it_is_set_up_and_no_other_way(
    settings: Settings,
) -> None:
    """What it says of some of its options alone may be that others are missing."""
    options = {"url": "here", "retries": "many"}
    value = {"default": {"BACKEND": "tests.own_backends.Needy", "OPTIONS": options}}
    assert "retries: many" in only(settings, value, ProblemId.REFUSED_BY_BACKEND)
    options["initializer"] = "tests.no_such_module.f"
    only(settings, value, ProblemId.BAD_INITIALIZER)
    listed = {
        "BACKEND": "tests.own_backends.Listed",
        "OPTIONS": {"urls": "here", "retries": "many"},
    }
    assert "'urls'" in only(settings, {"default": listed}, ProblemId.UNKNOWN_OPTION)


def test_a_backend_that_refuses_without_a_word_is_reported(settings: Settings) -> None:
    value = {"default": {"BACKEND": "tests.own_backends.Silent"}}
    assert "ValueError" in only(settings, value, ProblemId.REFUSED_BY_BACKEND)


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("process", {"mp_context": SpawnContext}, "'forkserver' or 'spawn', not <class"),
        ("process", {"hooks": 3}, "hooks must be the dotted path of a module, not 3"),
        ("process", {"hooks": "no_such_module"}, "hooks must be"),
        ("thread", {"initargs": 5}, "initargs must be a tuple or list"),
        (ProcessPoolExecutor, {"max_tasks_per_child": "3"}, "max_tasks_per_child"),
        (ProcessPoolExecutor, {"mp_context": SpawnContext}, "mp_context"),
        ("tests.own_backends.Moody", {}, "RuntimeError: not today"),
    ],
)
def test_whatever_the_backend_refuses_the_check_reports(
    settings: Settings, backend: Any, options: dict[str, Any], said: str
) -> None:
    value = {"default": {"BACKEND": backend, "WORKERS_PER_POOL": 1, "OPTIONS": options}}
    errors = [message for message in found(settings, value) if message.is_serious(ERROR)]
    assert [error.id for error in errors] == [ProblemId.REFUSED_BY_BACKEND]
    assert said in errors[0].msg


def test_a_backend_whose_module_raises(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_backend.py").write_text("raise RuntimeError('no licence found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = only(settings, {"default": {"BACKEND": "raising_backend.X"}}, ProblemId.UNKNOWN_BACKEND)
    assert "RuntimeError: no licence found" in text


def test_correct_options_pass(settings: Settings) -> None:
    options = {
        "initializer": "tests.django_jobs.load",
        "preload": ["tests.django_jobs"],
        "mp_context": "spawn",
        "nice": 5,
    }
    assert found(settings, {"default": {"OPTIONS": options}}) == []


def test_more_workers_than_cores(settings: Settings) -> None:
    cores = usable_cores()
    value = {"default": {"MAX_POOLS": 2, "WORKERS_PER_POOL": cores}}
    text = only(settings, value, ProblemId.TOO_MANY_WORKERS)
    assert f"{2 * cores} worker processes" in text
    assert f"{cores} core" in text


def test_the_workers_of_all_aliases_count_together(settings: Settings) -> None:
    cores = usable_cores()
    value: dict[str, Any] = {
        "default": {"WORKERS_PER_POOL": cores},
        "reports": {"WORKERS_PER_POOL": 1, "MAX_POOLS": 3},
        "mail": {"BACKEND": "thread", "WORKERS_PER_POOL": 50},
    }
    text = only(settings, value, ProblemId.TOO_MANY_WORKERS)
    assert "LEASEPOOL['default'] and LEASEPOOL['reports'] together allow" in text
    assert f"{cores + 3} worker processes (MAX_POOLS 1 x WORKERS_PER_POOL {cores} + " in text
    assert "mail" not in text
    del value["reports"]
    assert found(settings, value) == []


def test_more_threads_than_cores_are_fine(settings: Settings) -> None:
    value = {"default": {"BACKEND": "thread", "WORKERS_PER_POOL": usable_cores() + 1}}
    assert found(settings, value) == []


RECYCLE = """
import os, sys
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from multiprocessing import get_context

if __name__ == "__main__":
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=2)
    calls = [executor.submit(abs, -1) for _ in range(6)]
    try:
        print(sum(call.result(float(sys.argv[1])) for call in calls), flush=True)
    except TimeoutError:
        print("deadlock", flush=True)
        for process in list(executor._processes.values()):
            process.kill()
        os._exit(0)
"""


def test_recycling_of_the_standard_pool_is_judged_by_what_this_python_does(
    settings: Settings, tmp_path: Path
) -> None:
    value = {
        "default": {
            "BACKEND": "concurrent.futures.ProcessPoolExecutor",
            "WORKERS_PER_POOL": 1,
            "OPTIONS": {"max_tasks_per_child": 2, "mp_context": "spawn"},
        }
    }
    warned = bool(found(settings, value))
    script = tmp_path / "recycle.py"
    script.write_text(RECYCLE)
    # A Python that is said to be correct gets all the time it may need.
    patience = "2" if warned else "60"
    ran = subprocess.run(
        [sys.executable, str(script), patience], stdout=subprocess.PIPE, text=True, check=True
    )
    assert ran.stdout.strip() == ("deadlock" if warned else "6")
    if warned:
        assert "max_tasks_per_child = 2" in only(settings, value, ProblemId.RECYCLING_DEADLOCKS)


class Derived(ProcessPoolExecutor):
    """The standard pool, made in the same way."""


class Spawning(ProcessPoolExecutor):
    """One that decides by itself how its processes start."""

    def __init__(self, max_workers: int) -> None:
        super().__init__(max_workers, mp_context=multiprocessing.get_context("spawn"))


def standard(backend: Any, **options: Any) -> dict[str, Any]:
    return {"default": {"BACKEND": backend, "WORKERS_PER_POOL": 1, "OPTIONS": options}}


@pytest.fixture
def default_start_method(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def choose(method: str) -> None:
        def get_start_method(*, allow_none: bool) -> str:
            return method

        monkeypatch.setattr(multiprocessing, "get_start_method", get_start_method)

    return choose


@pytest.mark.parametrize(
    "backend",
    ["concurrent.futures.ProcessPoolExecutor", ProcessPoolExecutor, "tests.test_checks.Derived"],
)
def test_a_standard_pool_that_would_fork_the_server(
    settings: Settings, backend: Any, default_start_method: Callable[[str], None]
) -> None:
    default_start_method("fork")
    text = only(settings, standard(backend), ProblemId.FORKS_THE_SERVER)
    assert "forked from this process" in text
    assert "'forkserver' or 'spawn'" in text
    only(settings, standard(backend, mp_context=None), ProblemId.FORKS_THE_SERVER)
    assert found(settings, standard(backend, mp_context="spawn")) == []
    recycling = found(settings, standard(backend, max_tasks_per_child=5))
    assert {message.id for message in recycling} <= {ProblemId.RECYCLING_DEADLOCKS.value}
    default_start_method("forkserver")
    assert found(settings, standard(backend)) == []


def test_a_class_that_forks_nothing_passes(
    settings: Settings, default_start_method: Callable[[str], None]
) -> None:
    default_start_method("fork")
    assert found(settings, standard(Spawning)) == []
    assert found(settings, standard("thread")) == []


def test_asking_for_the_start_method_does_not_settle_it() -> None:
    """It is what the standard pool would use, which settles it when it is made."""
    program = (
        "import multiprocessing\n"
        "from leasepool_django.checks import _default_start_method\n"
        "found = _default_start_method()\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
        "assert found == multiprocessing.get_start_method(), found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("names", [["reports"], ["reports", "mail"]])
def test_without_an_alias_named_default_the_shortcuts_find_no_pool(
    settings: Settings, names: list[str]
) -> None:
    value = {name: {"BACKEND": "thread"} for name in names}
    text = only(settings, value, ProblemId.NO_DEFAULT_ALIAS)
    assert ", ".join(map(repr, names)) in text
    assert found(settings, {**value, "default": {"BACKEND": "thread"}}) == []


@pytest.mark.parametrize(
    "value", [{"MAX_POOLS": 2}, {"default": {"MAX_POOL": 2}, "reports": {}}, 5]
)
def test_a_default_alias_is_not_missed_where_another_mistake_tells_more(
    settings: Settings, value: Any
) -> None:
    assert ProblemId.NO_DEFAULT_ALIAS not in [message.id for message in found(settings, value)]
