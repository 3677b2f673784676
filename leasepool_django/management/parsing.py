"""How the ``leasepool`` command reads its command line, where argparse and Django need help."""

from __future__ import annotations

import argparse
import math
import threading
from typing import Any

from django.core.management.base import CommandParser

__all__ = ["Once", "SubcommandParser", "add_common_options", "to_count", "to_seconds"]


class SubcommandParser(CommandParser):
    """Lets options stand between the positional arguments: ``run f --workers 2 10 20``."""

    _splitting = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which calls it again for the two kinds of arguments."""
        if self._splitting:
            return super().parse_known_args(args, namespace)
        self._splitting = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._splitting = False


class Once(argparse.Action):
    """Stores the value; a second one is a mistake, for it would replace the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - the interface's
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002 - the interface's
    ) -> None:
        """Take the value of one occurrence."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "may be given only once; it goes for every call")
        setattr(namespace, self.dest, values)


def add_common_options(parser: CommandParser) -> None:
    """Take the options of all Django commands after the subcommand too, where people put them."""
    for name in ("--settings", "--pythonpath"):
        parser.add_argument(name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in ("--traceback", "--no-color", "--force-color", "--skip-checks"):
        parser.add_argument(
            name, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    parser.add_argument(
        "-v", "--verbosity", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def to_count(text: str) -> int:
    """Read a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def to_seconds(text: str) -> float:
    """Read a finite number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    if seconds > threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is more seconds than a thread can wait")
    return seconds
