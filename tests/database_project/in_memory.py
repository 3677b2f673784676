"""Tests that run in Django's usual test database for SQLite, which is in the process's memory."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, Client, TestCase, TransactionTestCase, override_settings
from django.urls import path

from leasepool_django import run_in_pool, run_in_pool_sync
from tests.database_project import jobs


async def count(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"users": await run_in_pool(jobs.count_users)})


def count_sync(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"users": run_in_pool_sync(jobs.count_users)})


urlpatterns = [path("count", count), path("count-sync", count_sync)]


class Processes(TransactionTestCase):
    def test_a_worker_says_that_it_cannot_see_the_database(self) -> None:
        for _ in range(2):
            with pytest.raises(ImproperlyConfigured) as raised:
                run_in_pool_sync(jobs.count_users)
        said = "'default' is an SQLite database in the memory of the test process"
        assert said in str(raised.value)
        for remedy in ("['TEST'] = {'NAME':", "TransactionTestCase", "'inline'"):
            assert remedy in str(raised.value)

    def test_functions_that_do_without_the_database_run(self) -> None:
        assert run_in_pool_sync(jobs.pid) != jobs.pid()


@override_settings(LEASEPOOL={"default": {"BACKEND": "inline"}}, ROOT_URLCONF=__name__)
class Inline(TestCase):
    def setUp(self) -> None:
        User.objects.create(username="ada")

    def test_inline_calls_are_in_the_transaction(self) -> None:
        assert run_in_pool_sync(jobs.count_users) == 1
        run_in_pool_sync(jobs.create_user, "grace")
        assert User.objects.count() == 2

    async def test_inline_calls_of_asynchronous_code_are_too(self) -> None:
        assert await run_in_pool(jobs.count_users) == 1
        await run_in_pool(jobs.create_user, "grace")
        assert await User.objects.acount() == 2

    def test_so_are_those_of_views(self) -> None:
        for url in ("/count", "/count-sync"):
            assert Client().get(url).json() == {"users": 1}

    async def test_so_are_those_of_views_under_asgi(self) -> None:
        for url in ("/count", "/count-sync"):
            response = await AsyncClient().get(url)
            assert response.json() == {"users": 1}

    def test_arguments_are_copies_all_the_same(self) -> None:
        names = ["ada"]
        assert run_in_pool_sync(jobs.add_user, names) == ["ada", "added"]
        assert names == ["ada"]
        assert User.objects.get().first_name == "changed"

    def test_mail_is_in_the_tests_outbox(self) -> None:
        assert run_in_pool_sync(jobs.send_mail, "hello") == 1
        assert [message.subject for message in mail.outbox] == ["hello"]
