"""The system checks: ids, hints, and the warnings about deployments."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.checks import ERROR, CheckMessage, registry, run_checks

from leasepool_django import checks
from leasepool_django.backends.inline import InlineBackend
from leasepool_django.conf import ProblemId
from leasepool_django.cores import usable_cores

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings


class Moody(InlineBackend):
    """A backend of a user's own, which raises what it likes."""

    def __init__(self, *_: Any) -> None:
        raise RuntimeError("not today")


def found(settings: Settings, value: Any, *, deploy: bool = False) -> list[CheckMessage]:
    settings.LEASEPOOL = value
    return [
        message
        for message in run_checks(include_deployment_checks=deploy)
        if str(message.id).startswith("leasepool.")
    ]


def only(settings: Settings, value: Any, expected: ProblemId, *, deploy: bool = False) -> str:
    """Return message and hint of the one finding, whose id must be ``expected``."""
    messages = found(settings, value, deploy=deploy)
    assert [message.id for message in messages] == [expected.value]
    [message] = messages
    assert message.hint
    assert message.is_serious() is (".E" in expected.value)
    return f"{message.msg} | {message.hint}"


def test_ids_are_unique_and_well_formed() -> None:
    ids = [problem.value for problem in ProblemId]
    assert len(ids) == len(set(ids))
    for prefix in ("leasepool.E", "leasepool.W"):
        numbers = [one.removeprefix(prefix) for one in ids if one.startswith(prefix)]
        assert numbers == [f"{number:03}" for number in range(1, len(numbers) + 1)]


def test_the_application_registers_its_checks() -> None:
    always: list[Any] = registry.registry.get_checks()
    deploying: list[Any] = registry.registry.get_checks(include_deployment_checks=True)
    assert checks.check_settings in always
    assert checks.check_deployment not in always
    assert checks.check_deployment in deploying
    assert "leasepool" in registry.registry.tags_available()


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


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("process", {"mp_context": SpawnContext}, "'forkserver' or 'spawn', not <class"),
        ("process", {"hooks": 3}, "hooks must be the dotted path of a module, not 3"),
        ("process", {"hooks": "no_such_module"}, "hooks must be"),
        ("process", {"context": ["nowhere.at_all"]}, "context names 'nowhere.at_all'"),
        ("thread", {"initargs": 5}, "initargs must be a tuple or list"),
        (ProcessPoolExecutor, {"max_tasks_per_child": "3"}, "max_tasks_per_child"),
        (ProcessPoolExecutor, {"mp_context": SpawnContext}, "mp_context"),
        ("tests.test_checks.Moody", {}, "RuntimeError: not today"),
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


def test_the_standard_pool_without_recycling_passes(settings: Settings) -> None:
    value = {"default": {"BACKEND": ProcessPoolExecutor, "WORKERS_PER_POOL": 1}}
    assert found(settings, value) == []


@pytest.fixture
def asgi_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "some_asgi_module.py"


def test_an_asgi_application_that_is_not_wrapped(settings: Settings, asgi_module: Path) -> None:
    asgi_module.write_text("raise RuntimeError('imported')\n")
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    text = only(settings, {}, ProblemId.ASGI_NOT_WRAPPED, deploy=True)
    assert "'some_asgi_module.application'" in text
    assert found(settings, {}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from leasepool_django.asgi import LeasePoolLifespan\napplication = LeasePoolLifespan(0)",
        "from leasepool_django import asgi\napplication = asgi.LeasePoolLifespan(0)",
        "this cannot be parsed",
    ],
)
def test_an_asgi_application_that_is_wrapped_or_cannot_be_read(
    settings: Settings, asgi_module: Path, source: str
) -> None:
    asgi_module.write_text(source)
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    assert found(settings, {}, deploy=True) == []


def test_an_asgi_application_that_is_not_found_is_not_this_checks_business(
    settings: Settings,
) -> None:
    settings.ASGI_APPLICATION = "no_such_module.application"
    assert found(settings, {}, deploy=True) == []


def test_several_server_processes_count(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = usable_cores()
    value = {"default": {"WORKERS_PER_POOL": cores}}
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    text = only(settings, value, ProblemId.TOO_MANY_SERVER_PROCESSES, deploy=True)
    assert f"{3 * cores} on {cores} core" in text
    monkeypatch.setenv("WEB_CONCURRENCY", "1")
    assert found(settings, value, deploy=True) == []


def test_one_core_for_server_and_workers_wants_nice(settings: Settings, asgi_module: Path) -> None:
    asgi_module.write_text("from leasepool_django.asgi import LeasePoolLifespan\n")
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        only(settings, {}, ProblemId.NO_NICE_ON_ONE_CORE, deploy=True)
        for options in ({"nice": 5}, {"scheduling": "idle"}):
            assert found(settings, {"default": {"OPTIONS": options}}, deploy=True) == []
    finally:
        os.sched_setaffinity(0, allowed)
