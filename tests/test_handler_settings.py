"""``pools`` and settings that change: the old pools end, and the next use makes new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from leasepool_django import LeasePoolNotStartedError, handler, pools, run_in_pool_sync
from leasepool_django.conf import get_config
from tests.django_jobs import double

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

THREADS = {"BACKEND": "thread", "WORKERS_PER_POOL": 2}


@pytest.fixture(autouse=True)
def thread_pools(settings: Settings) -> Iterator[None]:
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    yield
    pools.reset()


def test_a_changed_setting_stops_the_pools_and_makes_new_ones(settings: Settings) -> None:
    old = pools["default"]
    assert run_in_pool_sync(double, 1) == 2
    settings.LEASEPOOL = {"default": {**THREADS, "WORKERS_PER_POOL": 1}}
    assert not old.started
    assert pools["default"] is not old
    assert pools["default"].workers_per_pool == 1
    assert run_in_pool_sync(double, 1) == 2


def test_settings_that_change_while_they_are_read_are_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = get_config
    old: list[Any] = []

    def read_slowly() -> Any:
        configs = read()
        if not old:
            old.append(configs)
            settings.LEASEPOOL = {"default": {**THREADS, "WORKERS_PER_POOL": 1}}
        return configs

    monkeypatch.setattr(handler, "get_config", read_slowly)
    assert pools["default"].workers_per_pool == 1
    assert len(old) == 1


def test_other_settings_do_not_matter(settings: Settings) -> None:
    manager = pools["default"]
    settings.TIME_ZONE = "Europe/Berlin"
    assert pools["default"] is manager


def test_a_manager_out_of_service_says_so(settings: Settings) -> None:
    old = pools["default"]
    pools.reset()
    with pytest.raises(LeasePoolNotStartedError, match=r"out of service.*pools\['default'\]"):
        old.run_sync(double, 1)
    with pytest.raises(LeasePoolNotStartedError, match="out of service"):
        asyncio.run(old.run(double, 1))
    assert not old.started
