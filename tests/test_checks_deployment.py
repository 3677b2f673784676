"""The system checks of ``manage.py check --deploy``: servers, cores, and the ASGI application."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leasepool_django import checks
from leasepool_django.conf import ProblemId
from leasepool_django.cores import usable_cores
from tests.findings import found, only

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

PLAIN = "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n"


@pytest.fixture
def asgi_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "some_asgi_module.py"


def test_an_asgi_application_that_is_not_wrapped(settings: Settings, asgi_module: Path) -> None:
    asgi_module.write_text(f"raise RuntimeError('imported')\n{PLAIN}")
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    text = only(settings, {}, ProblemId.ASGI_NOT_WRAPPED, deploy=True)
    assert text.startswith("some_asgi_module does not use LeasePoolLifespan. |")
    assert found(settings, {}) == []


CHANNELS = f"""
from channels.routing import ProtocolTypeRouter
from some_sibling import consumers
{PLAIN}
application = ProtocolTypeRouter({{"http": application, "websocket": consumers.application}})
"""
IMPORT = "from leasepool_django.asgi import LeasePoolLifespan"


@pytest.mark.parametrize(
    "source",
    [
        f"{IMPORT}\n{PLAIN}",
        f"{PLAIN}\n__all__ = ['LeasePoolLifespan']",
        CHANNELS,
        "import django.core.asgi\napplication: object = django.core.asgi.get_asgi_application()",
        f"{PLAIN}http = application\ndef build():\n    return http\napplication = build()",
        "async def application(scope, receive, send):\n    pass",
    ],
)
def test_only_a_use_of_the_lifespan_counts(
    settings: Settings, asgi_module: Path, source: str
) -> None:
    asgi_module.write_text(source)
    asgi_module.with_name("some_sibling.py").touch()
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    only(settings, {}, ProblemId.ASGI_NOT_WRAPPED, deploy=True)


@pytest.mark.parametrize(
    "source",
    [
        "from some_sibling import application",
        "from .some_sibling import application",
        "from some_sibling import *",
        "import some_sibling\napplication = some_sibling.application",
        "from some_sibling import app\napplication = app",
        "from some_sibling import build\napplication = build()",
        "import some_sibling as sibling\napplication = sibling.build()",
        f"from some_sibling import wrap\n{PLAIN}\napplication = wrap(application)",
        f"from some_sibling import wrap\n{PLAIN}\napplication = print(wrap(application))",
        "from some_sibling import wrapped\n@wrapped\nasync def application(*_): ...",
        "from some_sibling import first\napplication, other = first, 2",
        "import some_sibling\napplication = some_sibling.applications[0]",
    ],
)
def test_an_application_that_another_module_makes_is_not_judged(
    settings: Settings, asgi_module: Path, source: str
) -> None:
    asgi_module.write_text(source)
    asgi_module.with_name("some_sibling.py").touch()
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    assert found(settings, {}, deploy=True) == []


@pytest.mark.parametrize(
    ("setting", "path"),
    [("WSGI_APPLICATION", "some_site.wsgi.application"), ("ROOT_URLCONF", "some_site.urls")],
)
def test_without_the_setting_the_application_is_where_startproject_puts_it(
    settings: Settings, asgi_module: Path, setting: str, path: str
) -> None:
    setattr(settings, setting, path)
    site = asgi_module.with_name("some_site")

    def told() -> list[str]:
        importlib.invalidate_caches()
        found = checks.check_deployment()
        return [message.msg for message in found if message.id == ProblemId.ASGI_NOT_WRAPPED]

    assert told() == []
    site.mkdir()
    (site / "__init__.py").touch()
    try:
        assert told() == []
        (site / "asgi.py").write_text(PLAIN)
        assert told() == ["some_site.asgi does not use LeasePoolLifespan."]
    finally:
        sys.modules.pop("some_site", None)


@pytest.mark.parametrize(
    "source",
    [
        f"{IMPORT}\napplication = LeasePoolLifespan(0)",
        f"{IMPORT} as Lifespan\napplication = Lifespan(0)",
        f"{IMPORT}\nclass Mine(LeasePoolLifespan): ...\napplication = Mine(0)",
        f"{IMPORT}\ndef build():\n    return LeasePoolLifespan(0)\napplication = build()",
        f"{IMPORT}\nwrap = LeasePoolLifespan\napplication = wrap(0)",
        f"{IMPORT}\n@LeasePoolLifespan\nasync def application(*_): ...",
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
    assert text.startswith("LEASEPOOL['default'] allows ")
    assert f"{3 * cores} on {cores} core" in text
    value["reports"] = {"WORKERS_PER_POOL": 1}
    settings.LEASEPOOL = value
    [message] = checks.check_deployment()
    assert message.id == ProblemId.TOO_MANY_SERVER_PROCESSES
    assert message.msg.startswith("LEASEPOOL['default'] and LEASEPOOL['reports'] together allow ")
    assert f"{3 * (cores + 1)} on {cores} core" in message.msg
    del value["reports"]
    monkeypatch.setenv("WEB_CONCURRENCY", "1")
    assert found(settings, value, deploy=True) == []


def test_one_core_for_server_and_workers_wants_nice(settings: Settings, asgi_module: Path) -> None:
    asgi_module.write_text("from leasepool_django.asgi import LeasePoolLifespan\n")
    settings.ASGI_APPLICATION = "some_asgi_module.application"
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        only(
            settings,
            {"default": {"OPTIONS": {"nice": 0}}},
            ProblemId.NO_NICE_ON_ONE_CORE,
            deploy=True,
        )
        for options in ({}, {"nice": 5}, {"scheduling": "idle"}):
            assert found(settings, {"default": {"OPTIONS": options}}, deploy=True) == []
    finally:
        os.sched_setaffinity(0, allowed)
