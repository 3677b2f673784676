"""Tests that run in a database which worker processes can see."""

from __future__ import annotations

from typing import Any

import django
from django.contrib.auth.models import User
from django.core import mail
from django.db import connections
from django.test import TestCase, TransactionTestCase, override_settings

from leasepool_django import pools, run_in_pool, run_in_pool_sync
from tests.database_project import jobs

LOCMEM, DUMMY, SMTP = (f"django.core.mail.backends.{name}" for name in ("locmem", "dummy", "smtp"))


def mail_backend(module: str) -> dict[str, Any]:
    """The settings that choose a mail backend."""
    path = f"{module}.EmailBackend"
    if django.VERSION >= (6, 1):
        return {"MAILERS": {"default": {"BACKEND": path}}}
    return {"EMAIL_BACKEND": path}


@override_settings(
    LEASEPOOL={
        "default": {
            "WORKERS_PER_POOL": 1,
            "OPTIONS": {"initializer": "tests.database_project.jobs.remember_users"},
        }
    }
)
class WithInitializer(TransactionTestCase):
    def test_an_initializer_uses_the_test_database_too(self) -> None:
        User.objects.create(username="ada")
        pools.start_all_sync()
        assert run_in_pool_sync(jobs.remembered) == [1]


class InTransaction(TestCase):
    def test_a_worker_says_that_it_does_not_see_the_transaction(self) -> None:
        User.objects.create(username="ada")
        with self.assertLogs("leasepool_django.worker", "WARNING") as logs:
            assert run_in_pool_sync(jobs.count_users) == 0
        assert "in the transaction of a TestCase" in logs.output[0]


@override_settings(LEASEPOOL={"default": {"BACKEND": "inline"}})
class Inline(TestCase):
    def test_inline_calls_are_in_the_transaction(self) -> None:
        User.objects.create(username="ada")
        assert run_in_pool_sync(jobs.count_users) == 1

    async def test_inline_calls_of_asynchronous_code_are_too(self) -> None:
        await User.objects.acreate(username="ada")
        assert await run_in_pool(jobs.count_users) == 1
        await run_in_pool(jobs.create_user, "grace")
        assert await User.objects.acount() == 2


class Workers(TransactionTestCase):
    # The last by name and by place: its workers are there when the databases are dropped.

    def test_workers_see_what_the_test_has_written_and_the_other_way_round(self) -> None:
        User.objects.create(username="ada")
        assert run_in_pool_sync(jobs.count_users) == 1
        key = run_in_pool_sync(jobs.create_user, "grace")
        assert User.objects.get(username="grace").pk == key

    async def test_so_they_do_in_asynchronous_tests(self) -> None:
        await User.objects.acreate(username="ada")
        assert await run_in_pool(jobs.count_users) == 1
        await run_in_pool(jobs.create_user, "grace")
        assert await User.objects.acount() == 2

    def test_workers_use_the_very_databases_of_this_process(self) -> None:
        names = {alias: str(connections[alias].settings_dict["NAME"]) for alias in connections}
        assert "test" in names["default"]
        assert run_in_pool_sync(jobs.database_names) == names
        assert run_in_pool_sync(jobs.pid) != jobs.pid()

    def test_mail_goes_nowhere_and_its_author_is_told(self) -> None:
        assert run_in_pool_sync(jobs.mail_backend) == LOCMEM
        for subject in ("one", "two"):
            with self.assertLogs("leasepool_django.worker", "WARNING") as logs:
                assert run_in_pool_sync(jobs.send_mail, subject) == 1
            assert f"sent 1 message(s) in a worker: '{subject}'" in logs.output[0]
        assert mail.outbox == []

    def test_a_mail_backend_that_may_send_is_not_used(self) -> None:
        with override_settings(**mail_backend(SMTP)):
            assert run_in_pool_sync(jobs.mail_backend) == LOCMEM
        with override_settings(**mail_backend(DUMMY)):
            assert run_in_pool_sync(jobs.mail_backend) == DUMMY
