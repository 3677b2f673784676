"""Tests with real workers, for unittest and Django's test runner."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.test import TransactionTestCase

from desk.accounts import invite
from leasepool_django import pools, run_in_pool, run_in_pool_sync
from leasepool_django.testing import assert_no_leases


class InvitationTests(TransactionTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.addClassCleanup(pools.reset)  # stops the workers

    def setUp(self) -> None:
        self.addCleanup(assert_no_leases)

    def test_an_account_is_created(self) -> None:
        User.objects.create(username="ada")
        self.assertEqual(run_in_pool_sync(invite, "grace"), 2)
        self.assertTrue(User.objects.filter(username="grace").exists())

    async def test_from_asynchronous_code(self) -> None:
        await User.objects.acreate(username="ada")
        self.assertEqual(await run_in_pool(invite, "grace"), 2)
