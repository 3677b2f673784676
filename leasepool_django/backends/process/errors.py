"""What a worker reads and changes on exceptions of any class, also of one that forbids changes.

A frozen dataclass or a ``__setattr__`` that raises would end the worker that only wants to add a
note. Standard library only: every worker imports this module.
"""

from __future__ import annotations

import copyreg
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["TBLIB", "forget_frames", "leading_frames", "note", "reducers", "without_notes"]

TBLIB = "tblib.pickling_support"
_DICT = BaseException.__dict__["__dict__"]
_TRACEBACK = BaseException.__dict__["__traceback__"]


def note(exc: BaseException, text: str) -> None:
    """Add a note to ``exc``, also where its notes are of another kind than ``add_note`` makes."""
    noted = _DICT.__get__(exc)
    notes = noted.get("__notes__")
    if issubclass(type(notes), list):
        list.append(notes, text)  # as add_note() does it, without code of a subclass
    else:
        noted["__notes__"] = [*notes, text] if type(notes) is tuple else [text]


@contextmanager
def without_notes(exc: BaseException) -> Iterator[None]:
    """Hide the notes of ``exc`` from pickle: one that forbids changes could not be given them."""
    noted = _DICT.__get__(exc)
    notes = noted.pop("__notes__") if type(noted.get("__notes__")) is list else None
    try:
        yield
    finally:
        if notes is not None:
            noted["__notes__"] = notes


def leading_frames(exc: BaseException, modules: Collection[str]) -> int:
    """How many of the first frames in the traceback of ``exc`` are of code of ``modules``."""
    count = 0
    entry = _TRACEBACK.__get__(exc)
    while entry is not None:
        module = dict.get(entry.tb_frame.f_globals, "__name__")
        if type(module) is not str or module not in modules:
            break
        count += 1
        entry = entry.tb_next
    return count


def forget_frames(exc: BaseException) -> None:
    """Let go of the frames of ``exc``, and of the variables in them."""
    _TRACEBACK.__set__(exc, None)


class _Reducers:
    """What ``copyreg`` has registered, but for tblib's way of pickling exceptions.

    That takes their frames along, which have been described already, and what chains them. It is
    there for all exception classes once anything in the process has asked for it, as Dask does.
    """

    def __getitem__(self, cls: type) -> Any:
        reducer = copyreg.dispatch_table[cls]
        if getattr(reducer, "__module__", None) == TBLIB:
            raise KeyError(cls)
        return reducer


reducers: Any = _Reducers()
