"""Why there are no figures, in words for the report: from an error, or from what a process wrote.

Libraries write warnings and log lines to the standard error too, often after what matters.
"""

from __future__ import annotations

import re

__all__ = ["of_error", "of_output"]

_LONGEST = 200
_TRACEBACK = "Traceback (most recent call last):"
_MEMBER = re.compile(r"^[ |]*\+-[-+]*-+ \d+ -+$")  # before each error of a group
_GROUP_MARGIN = re.compile(r"^[ +|-]*\| ?")
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: ")


def of_error(error: BaseException) -> str:
    """The type and text of ``error``; of a group of errors, those of its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return _line(type(error).__name__, str(error))


def of_output(text: str) -> str | None:
    """The error that the last traceback in ``text`` ends with, or else its last line.

    Lines of warnings do not count; ``None`` if nothing else is there.
    """
    lines = [line.rstrip() for line in text.splitlines()]
    begins = [n for n, line in enumerate(lines) if _TRACEBACK in line or _MEMBER.match(line)]
    lines = [_GROUP_MARGIN.sub("", line) for line in lines]
    # The frames are indented, the error is not.
    after = lines[begins[-1] + 1 :] if begins else []
    for line in after:
        if line and not line[0].isspace():
            name, _, said = line.partition(":")
            return _line(name.rpartition(".")[2], said.strip())
    # A warning's second line, the source, is indented.
    told = [line for line in lines if line and not line[0].isspace() and not _WARNING.match(line)]
    return told[-1][:_LONGEST] if told else None


def _line(name: str, said: str) -> str:
    first = said.strip().partition("\n")[0]
    return f"{name}: {first}"[:_LONGEST] if first else name
