"""What the tests of this project let workers do."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.auth.models import User
from django.core import mail
from django.db import connection, connections

_counted: list[int] = []


def count_users() -> int:
    return User.objects.count()


def create_user(name: str) -> int:
    return User.objects.create(username=name).pk


def add_user(names: list[str]) -> list[str]:
    """Change the argument, and a user who is there."""
    User.objects.filter(username=names[0]).update(first_name="changed")
    names.append("added")
    return names


def database_names() -> dict[str, str]:
    return {alias: str(connections[alias].settings_dict["NAME"]) for alias in connections}


def pid() -> int:
    return os.getpid()


def backend_pid() -> int:
    """The server process of PostgreSQL that serves this worker."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (number,) = cursor.fetchone()
    assert isinstance(number, int)
    return number


def send_mail(subject: str) -> int:
    """Send a message; how many the outbox of this process holds then."""
    mail.send_mail(subject, "text", "shop@example.com", ["ada@example.com"])
    return len(mail.outbox)


def mail_backend() -> str:
    """The module of the mail backend that this process uses."""
    mailers: Any = getattr(mail, "mailers", None)  # Django 6.1 and later
    backend = mail.get_connection() if mailers is None else mailers.default
    return type(backend).__module__


def remember_users() -> None:
    """An initializer that looks into the database."""
    _counted.append(User.objects.count())


def remembered() -> list[int]:
    return _counted
