"""Tests in one process and in one transaction."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.core import mail
from django.test import TestCase, override_settings

from desk.accounts import invite
from leasepool_django import run_in_pool_sync


@override_settings(LEASEPOOL={"default": {"BACKEND": "inline"}})
class InvitationTests(TestCase):
    def test_an_account_is_created(self) -> None:
        self.assertEqual(run_in_pool_sync(invite, "ada"), 1)
        self.assertTrue(User.objects.filter(username="ada").exists())

    def test_an_invitation_is_sent(self) -> None:
        run_in_pool_sync(invite, "ada")
        self.assertEqual([message.to for message in mail.outbox], [["ada@example.com"]])

    async def test_the_view(self) -> None:
        await User.objects.acreate(username="ada")
        response = await self.async_client.get("/invite/grace")
        self.assertEqual(response.json(), {"accounts": 2})
