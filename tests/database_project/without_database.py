"""Tests that have not asked for a database, so that there is none but the project's real one."""

from __future__ import annotations

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import SimpleTestCase, override_settings

from leasepool_django import WorkerStartError, pools, run_in_pool_sync
from tests.database_project import jobs


class RealDatabase(SimpleTestCase):
    def test_a_worker_refuses_it(self) -> None:
        with pytest.raises(ImproperlyConfigured, match="Workers refuse the database 'default'"):
            run_in_pool_sync(jobs.count_users)

    def test_an_initializer_is_refused_it_too(self) -> None:
        alias = {"OPTIONS": {"initializer": "tests.database_project.jobs.remember_users"}}
        with (
            override_settings(LEASEPOOL={"default": alias}),
            pytest.raises(WorkerStartError, match="Workers refuse the database 'default'"),
        ):
            pools.start_all_sync()
