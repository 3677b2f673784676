"""Tracebacks between processes: taken apart in the worker, rebuilt in the parent.

A frame cannot be pickled. ``take`` notes all that a traceback is shown from (file, function,
line and columns, module, and variables where these may travel); ``rebuild`` makes real traceback
objects of it again, so that whatever reads tracebacks shows the worker's lines as if they had run
here: the interpreter, Django's debug page, error trackers, debuggers.

The rebuilt frames belong to generators that were never started. A frame that has run keeps its
``f_back``, and so the whole stack of the parent with all its variables, alive for as long as the
exception; a frame that has not run has none.

Standard library only: every worker imports this module.
"""

# The code of foreign objects runs here and may raise anything, which must not get further:
# ruff: noqa: BLE001
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import NamedTuple

__all__ = ["FrameLocals", "FrameRecord", "Variable", "rebuild", "take"]

FrameLocals = Callable[[FrameType], dict[str, str]]
"""Gives the representations of a frame's variables, by name."""

MAX_VARIABLES = 200
MAX_VARIABLE_CHARS = 5_000


class FrameRecord(NamedTuple):
    """One entry of a traceback. Travels as a plain tuple."""

    filename: str
    name: str
    qualname: str
    first_line: int
    line: int
    end_line: int
    # Columns are byte offsets; -1 where the interpreter knows none.
    column: int
    end_column: int
    module: str | None
    file: str | None
    variables: dict[str, str] | None


class Variable(str):
    """The representation of a variable of the worker; shown as it is, without quotes around it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str.__str__(self)


def take(
    traceback: TracebackType | None,
    frame_locals: FrameLocals | None = None,
    *,
    limit: int = 100,
) -> tuple[list[tuple[object, ...]], int]:
    """Give the entries of ``traceback`` as plain tuples, and how many were left out.

    Of more than ``limit`` entries the first and the last half are kept. Variables are taken only
    with ``frame_locals``; one that raises costs the variables of that frame only.
    """
    entries = _entries(traceback)
    kept = list(islice(entries, limit - limit // 2))
    tail = deque[TracebackType](maxlen=limit // 2)
    seen = len(kept)
    for entry in entries:
        tail.append(entry)
        seen += 1
    kept.extend(tail)
    return [tuple(_record(entry, frame_locals)) for entry in kept], seen - len(kept)


def rebuild(records: Sequence[Sequence[object]]) -> TracebackType | None:
    """Make a traceback of what ``take`` gave; ``None`` of nothing."""
    traceback = None
    for fields in reversed(records):
        record = FrameRecord(*fields)  # type: ignore[arg-type]
        variables = record.variables or {}
        positions: dict[str, int | bytes] = {"co_firstlineno": record.line}
        if _POSITIONS_KNOWN:
            positions = {"co_firstlineno": record.first_line, "co_linetable": _linetable(record)}
        code = _STUB.replace(
            co_filename=record.filename,
            co_name=record.name,
            co_qualname=record.qualname,
            co_varnames=tuple(variables),
            co_nlocals=len(variables),
            co_argcount=len(variables),
            **positions,  # type: ignore[arg-type]
        )
        generator = FunctionType(code, {"__name__": record.module, "__file__": record.file})
        frame = generator(*map(Variable, variables.values())).gi_frame
        traceback = TracebackType(traceback, frame, 0, record.line)
    return traceback


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _record(entry: TracebackType, frame_locals: FrameLocals | None) -> FrameRecord:
    frame = entry.tb_frame
    code = frame.f_code
    line, end_line, column, end_column = next(
        islice(code.co_positions(), entry.tb_lasti // 2, None), (None, None, None, None)
    )
    # An instruction can be without a line (``tb_lineno`` is then None, whatever its stub says).
    shown_line = entry.tb_lineno or line or code.co_firstlineno
    if line != shown_line or end_line is None or column is None or end_column is None:
        end_line, column, end_column = shown_line, -1, -1
    return FrameRecord(
        filename=code.co_filename,
        name=code.co_name,
        qualname=code.co_qualname,
        first_line=code.co_firstlineno,
        line=shown_line,
        end_line=end_line,
        column=column,
        end_column=end_column,
        module=_text_or_none(frame.f_globals.get("__name__")),
        file=_text_or_none(frame.f_globals.get("__file__")),
        variables=None if frame_locals is None else _variables(frame, frame_locals),
    )


def _text_or_none(value: object) -> str | None:
    return value if type(value) is str else None


def _variables(frame: FrameType, frame_locals: FrameLocals) -> dict[str, str]:
    try:
        shown = islice(frame_locals(frame).items(), MAX_VARIABLES)
        return {str(name): str(value)[:MAX_VARIABLE_CHARS] for name, value in shown}
    except BaseException as error:  # the variables' own code may run here, and raise anything
        return {"<variables>": f"<not shown: reading them raised {type(error).__name__}>"}


def _stub() -> Iterator[None]:
    yield  # pragma: no cover - never runs


_STUB: CodeType = _stub.__code__
_STUB_UNITS = len(_STUB.co_code) // 2


def _linetable(record: FrameRecord) -> bytes:
    """Say that each instruction of the stub stands at the record's line and columns.

    The format is CPython's location table, unchanged from 3.11 on:
    https://github.com/python/cpython/blob/main/InternalDocs/code_objects.md
    """
    table = bytearray()
    line_delta = record.line - record.first_line
    units = _STUB_UNITS
    while units > 0:
        count = min(units, 8)
        with_columns = record.column >= 0
        table.append(0x80 | (14 if with_columns else 13) << 3 | count - 1)
        _append_number(table, -line_delta << 1 | 1 if line_delta < 0 else line_delta << 1)
        if with_columns:
            _append_number(table, max(record.end_line - record.line, 0))
            _append_number(table, record.column + 1)
            _append_number(table, record.end_column + 1)
        line_delta = 0
        units -= count
    return bytes(table)


def _append_number(table: bytearray, number: int) -> None:
    while number > 63:
        table.append(64 | number & 63)
        number >>= 6
    table.append(number)


def _positions_known() -> bool:
    """Whether this interpreter reads a location table as ``_linetable`` writes it."""
    for expected in ((907, 1100, 70, 4_200), (907, 907, None, None)):
        line, end_line, column, end_column = expected
        record = FrameRecord(
            "", "", "", 1_000, line, end_line, -1 if column is None else column,
            end_column or 0, None, None, None,
        )  # fmt: skip
        code = _STUB.replace(co_firstlineno=1_000, co_linetable=_linetable(record))
        if list(code.co_positions()) != [expected] * _STUB_UNITS:
            return False
    return True


# An interpreter that reads it differently still shows the right lines (they are also in the
# traceback entries), without columns of its own.
_POSITIONS_KNOWN = _positions_known()
