"""Tests with real workers, for pytest with pytest-django."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.test import Client

from desk.accounts import invite
from leasepool_django.handler import Pools


@pytest.mark.django_db(transaction=True)
def test_an_account_is_created(leasepool: Pools) -> None:
    User.objects.create(username="ada")
    assert leasepool["default"].run_sync(invite, "grace") == 2
    assert User.objects.filter(username="grace").exists()


@pytest.mark.django_db(transaction=True)
def test_the_view(leasepool: Pools, client: Client) -> None:
    assert client.get("/invite/ada").json() == {"accounts": 1}


def test_a_lease(leasepool: Pools) -> None:
    with leasepool["default"].lease_sync(workers=2) as lease:
        assert list(lease.executor.map(pow, (2, 3), (10, 10))) == [1024, 59049]
