"""Work with the database and with mail."""

from __future__ import annotations

from django.contrib.auth.models import User
from django.core.mail import send_mail


def invite(name: str) -> int:
    """Create an account and send the invitation; the number of accounts then."""
    address = f"{name}@example.com"
    User.objects.create(username=name, email=address)
    send_mail("Welcome", "Your account is ready.", "desk@example.com", [address])
    return User.objects.count()
