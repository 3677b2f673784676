"""Log records on their way from a worker to the parent's logging.

Neither side trusts the code of what a record carries: what that raises goes no further. Standard
library only: every worker imports this module.
"""

# The code of foreign objects runs here and may raise anything, which must not get further:
# ruff: noqa: BLE001
from __future__ import annotations

import logging
import os
import pickle
from typing import TYPE_CHECKING

from . import wire
from .link import LOST
from .texts import MAX_TRACEBACK_CHARS, repr_of, text_of, traceback_text, type_name

if TYPE_CHECKING:
    from .link import Link

__all__ = ["decode_record", "encode_record", "forward_logs", "forwarding"]

MAX_EXTRA_BYTES = 64 * 1024
MAX_FRAMES = 100

_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
_FORMATTED = frozenset({"msg", "message", "args", "exc_info", "exc_text"})


class ForwardHandler(logging.Handler):
    """Puts each record on the wire, ahead of the outcome of the call that logged it.

    ``link`` is set in each worker. In the fork server, where only a thread that a preload module
    has started could log, records go where those go for which no handler is configured, if this is
    the ``only`` one. ``worker`` is what records have for the name of their process, which for
    ``logging`` is the main one of the interpreter, as it is in the process that handles them.
    """

    link: Link | None = None
    worker = ""
    only = True

    def emit(self, record: logging.LogRecord) -> None:
        if self.link is None:
            last = logging.lastResort
            if self.only and last is not None and record.levelno >= last.level:
                last.handle(record)
            return
        if os.getpid() != self.link.pid:
            return  # a child of the user's making has no line to the parent
        if record.processName == "MainProcess":
            record.processName = self.worker
        try:
            self.link.send(wire.frame(wire.LOG, encode_record(record)))
        except OSError as error:
            if error.errno not in LOST:
                raise  # by a signal handler of the function's, which expects it
            self.handleError(record)


forwarding = ForwardHandler()


def forward_logs(level: int, *, clear: bool, manager: str) -> None:
    """Send the records of every logger by ``forwarding``, and with ``clear`` nowhere else.

    ``manager`` is the name of the manager, after which its workers are called.

    Once, before workers are forked: to go through the loggers takes as long as a tenth of a start.
    """
    root = logging.getLogger()
    forwarding.worker = f"{manager}-worker"
    forwarding.only = clear or not root.handlers
    loggers = [logging.getLogger(name) for name in list(root.manager.loggerDict)]
    for logger in loggers:
        if clear:
            logger.handlers.clear()
        if not logger.propagate:
            logger.addHandler(forwarding)
    if clear:
        root.handlers.clear()
    root.addHandler(forwarding)
    root.setLevel(level)


def encode_record(record: logging.LogRecord) -> bytes:
    """Give ``record`` in a form for ``decode_record``.

    The message and the traceback are formatted here. Other attributes travel as they are, or as
    their bounded ``repr`` where they cannot be pickled or take over 64 KB. Never raises.
    """
    try:
        return pickle.dumps(_record_fields(record), 5)
    except BaseException as error:
        failure = type(error).__name__
    fields = {
        "msg": f"<a log record that could not be described: {failure}>",
        "name": text_of(record.__dict__.get("name")),
        "levelname": text_of(record.__dict__.get("levelname")),
    }
    fields |= {
        name: value
        for name, value in record.__dict__.items()
        if name in {"levelno", "created", "process"} and type(value) in _SCALARS
    }
    return pickle.dumps((fields, {}), 5)


def _record_fields(
    record: logging.LogRecord,
) -> tuple[dict[str, object], dict[str, tuple[str, bytes]]]:
    """Give the attributes of built-in types, and the pickles of the others with their types."""
    fields: dict[str, object] = {}
    pickles: dict[str, tuple[str, bytes]] = {}
    for name, value in record.__dict__.items():
        if name in _FORMATTED:
            continue
        if type(value) in _SCALARS:
            fields[name] = value
        elif (pickled := _pickled(value)) is not None:
            pickles[name] = (type_name(value), pickled)
        else:
            fields[name] = repr_of(value)
    fields["msg"] = _message(record)
    fields["args"] = ()
    fields["exc_info"] = None
    fields["exc_text"] = _exception_text(record)
    return fields, pickles


def _pickled(value: object) -> bytes | None:
    try:
        pickled = pickle.dumps(value, 5)
    except BaseException:  # code of the value's own; its repr will tell what it was
        return None
    return pickled if len(pickled) <= MAX_EXTRA_BYTES else None


def _message(record: logging.LogRecord) -> str:
    try:
        return str.__str__(record.getMessage())
    except BaseException as error:
        return (
            f"{text_of(record.msg)} [its arguments could not be put into it: "
            f"{type(error).__name__}: {text_of(error, 300)}]"
        )


def _exception_text(record: logging.LogRecord) -> str | None:
    if record.exc_text:
        return text_of(record.exc_text, MAX_TRACEBACK_CHARS)
    match record.exc_info:
        case (_, BaseException() as exc, entries):
            return traceback_text(exc, entries, MAX_FRAMES).removesuffix("\n")
    return None


def decode_record(data: bytes | bytearray | memoryview) -> logging.LogRecord:
    """Give the record that ``encode_record`` described, made by this process's record factory.

    The worker's attributes win over those that the factory sets. Raises what pickle raises for
    what ``encode_record`` has not written, as where a function has written into its own socket.
    """
    fields, pickles = pickle.loads(data)
    for name, (its_type, pickled) in pickles.items():
        try:
            fields[name] = pickle.loads(pickled)
        except BaseException as error:
            fields[name] = f"<{its_type} whose unpickling raised {type_name(error)}>"
    try:
        return logging.makeLogRecord(fields)
    except Exception:  # a factory of the application's own; the record matters more
        record = logging.LogRecord("", 0, "", 0, "", (), None)
        record.__dict__.update(fields)
        return record
