"""What a worker reports besides results: exceptions and log records; and how it finds a function.

The worker calls ``resolve``, ``encode_exception`` and ``encode_record``, the parent
``decode_exception`` and ``decode_record``. They do not trust the code of the objects they handle:
a ``__reduce__``, ``__str__`` or constructor that raises, be it ``SystemExit``, costs the report its
detail; never the worker, the parent's event loop or the report itself.

An exception travels as a list of nodes of built-in types, one for each exception that can be
reached over causes, contexts and members of groups. The exceptions themselves are pickled one by
one inside their nodes, each tried in the worker first, so that one that cannot travel is replaced
by ``RemoteError`` alone. Standard library only at import: every worker imports this module.
"""

# The code of foreign objects runs here and may raise anything, which must not get further:
# ruff: noqa: BLE001
from __future__ import annotations

import importlib
import io
import pickle
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import frames
from .errors import TBLIB, note, reducers, without_notes
from .records import decode_record, encode_record
from .texts import MAX_TEXT_CHARS, bounded, text_of, traceback_text, type_name

if TYPE_CHECKING:
    from leasepool_django.exceptions import RemoteError

__all__ = ["decode_exception", "decode_record", "encode_exception", "encode_record", "resolve"]

# Bounds of one report. Exceptions beyond MAX_EXCEPTIONS, links deeper than MAX_DEPTH and frames
# beyond the two frame limits are left out and counted in a note.
MAX_EXCEPTIONS = 1_000
MAX_DEPTH = 100
MAX_GROUP_DEPTH = 20
MAX_FRAMES_EACH = 100
MAX_FRAMES = 5_000
MAX_PICKLE_BYTES = 8 * 1024 * 1024
MAX_TRACEBACK_TEXTS = 10
MAX_NOTES = 100

_NONE = -1
_LEFT_OUT = -2

# Read and written through BaseException's own descriptors: a class may hide or freeze them.
_ARGS = BaseException.__dict__["args"]
_CAUSE = BaseException.__dict__["__cause__"]
_CONTEXT = BaseException.__dict__["__context__"]
_SUPPRESS = BaseException.__dict__["__suppress_context__"]
_TRACEBACK = BaseException.__dict__["__traceback__"]
_DICT = BaseException.__dict__["__dict__"]
_MEMBERS = BaseExceptionGroup.__dict__["exceptions"]

_resolved: dict[str, Callable[..., Any]] = {}
_MAX_RESOLVED = 4_096


def resolve(name: str) -> Callable[..., Any]:
    """Find the function that ``pickling.reference`` named ``"module:qualname"``.

    Raises what importing the module raises, or ``AttributeError``, with a note that says which
    function was looked for.
    """
    function = _resolved.get(name)
    if function is None:
        module_name, _, qualname = name.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for part in qualname.split("."):
                found = getattr(found, part)
        except BaseException as error:
            note(error, f"The worker was looking for the function {name!r}.")
            raise
        if len(_resolved) >= _MAX_RESOLVED:
            _resolved.clear()
        function = _resolved[name] = found
    return function


class _Node(NamedTuple):
    """One exception on its way. Travels as a plain tuple; links are positions in the list."""

    pickled: bytes | None
    """``(exception, its args)``; ``None`` if ``RemoteError`` stands for it."""
    is_group: bool
    reason: str
    """Why ``RemoteError`` stands for it."""
    type_name: str
    text: str
    traceback_text: str | None
    frames: list[tuple[object, ...]]
    cause: int
    context: int
    suppress_context: bool
    notes: list[str]


def encode_exception(
    exc: BaseException, frame_locals: frames.FrameLocals | None = None, skip_frames: int = 0
) -> bytes:
    """Give ``exc``, with all that is chained to it, in a form for ``decode_exception``.

    The first ``skip_frames`` entries of its own traceback, the worker's, are left out. Variables
    travel only as ``frame_locals`` represents them. Never raises: what cannot be described is
    reported as such.
    """
    try:
        entries = _TRACEBACK.__get__(exc)
        for _ in range(skip_frames):
            entries = entries and entries.tb_next
        nodes = _Encoder(exc, entries, frame_locals).nodes()
        return pickle.dumps([tuple(node) for node in nodes], 5)
    except BaseException as error:
        failure = type(error).__name__
    try:
        # Most likely memory is short, and the frames of the function hold most of it.
        traceback.clear_frames(_TRACEBACK.__get__(exc))
        node = _undescribed(type_name(exc), f"describing it raised {failure}")
        return pickle.dumps([tuple(node)], 5)
    except BaseException:  # prepared at import, this takes no memory and runs no code
        return _LAST_RESORT


def _undescribed(described_as: str, reason: str) -> _Node:
    return _Node(None, False, reason, described_as, "", None, [], _NONE, _NONE, False, [])


_LAST_RESORT = pickle.dumps(
    [tuple(_undescribed("an exception", "the worker had no memory left to describe it"))], 5
)


class _Encoder:
    """Walks from one exception to all it is linked with, outermost first."""

    def __init__(
        self,
        root: BaseException,
        entries: TracebackType | None,
        frame_locals: frames.FrameLocals | None,
    ) -> None:
        self._found = [root]
        self._depths = [0]
        self._group_depths = [0]
        self._positions = {id(root): 0}
        self._entries = entries
        self._frame_locals = frame_locals
        self._frames_left = MAX_FRAMES
        self._bytes_left = MAX_PICKLE_BYTES
        self._texts_left = MAX_TRACEBACK_TEXTS

    def nodes(self) -> list[_Node]:
        nodes = []
        position = 0
        while position < len(self._found):  # _node finds further ones
            nodes.append(self._node(position))
            position += 1
        return nodes

    def _node(self, position: int) -> _Node:
        exc = self._found[position]
        notes = _notes(exc)
        entries = _TRACEBACK.__get__(exc) if position else self._entries
        records, left_out = frames.take(
            entries, self._frame_locals, limit=min(MAX_FRAMES_EACH, self._frames_left)
        )
        self._frames_left -= len(records)
        if left_out:
            notes.append(f"{left_out:,} frames of its traceback in the worker were left out.")
        cause = self._chained(_CAUSE.__get__(exc), position)
        context = self._chained(_CONTEXT.__get__(exc), position)
        if _LEFT_OUT in (cause, context):
            notes.append("Further exceptions chained to it in the worker were left out.")
        pickled, reason = self._pickled(exc, position)
        shown = None
        if pickled is None and self._texts_left:
            self._texts_left -= 1
            shown = traceback_text(exc, entries, MAX_FRAMES_EACH)
        return _Node(
            pickled=pickled,
            is_group=isinstance(exc, BaseExceptionGroup),
            reason=reason,
            type_name=type_name(exc),
            text=text_of(exc),
            traceback_text=shown,
            frames=records,
            cause=cause,
            context=context,
            suppress_context=_SUPPRESS.__get__(exc),
            notes=notes,
        )

    def _chained(self, linked: BaseException | None, origin: int) -> int:
        if linked is not None and self._depths[origin] >= MAX_DEPTH:
            return self._positions.get(id(linked), _LEFT_OUT)
        return self._link(linked, origin)

    def _link(self, linked: BaseException | None, origin: int, into_group: int = 0) -> int:
        if linked is None:
            return _NONE
        position = self._positions.get(id(linked))
        if position is None:
            if len(self._found) >= MAX_EXCEPTIONS:
                return _LEFT_OUT
            position = self._positions[id(linked)] = len(self._found)
            self._found.append(linked)
            self._depths.append(self._depths[origin] + 1)
            self._group_depths.append(self._group_depths[origin] + into_group)
        return position

    def _pickled(self, exc: BaseException, position: int) -> tuple[bytes | None, str]:
        """Give the pickle of ``exc`` and its args, or ``None`` and why there is none."""
        if position == 0 and not _may_be_raised(type(exc)):
            return None, _NOT_RAISABLE
        members: dict[int, int] = {}
        if isinstance(exc, BaseExceptionGroup):
            if self._group_depths[position] >= MAX_GROUP_DEPTH:
                return None, f"it is nested in more than {MAX_GROUP_DEPTH} other groups"
            for member in _MEMBERS.__get__(exc):
                members[id(member)] = self._link(member, position, into_group=1)
        try:
            with without_notes(exc):  # they travel by themselves
                try:
                    pickled = _dumps((exc, _ARGS.__get__(exc)), members)
                except Exception:  # a __reduce__ may do without args that cannot be pickled
                    pickled = _dumps((exc, None), members)
        except BaseException as error:
            return None, (
                f"it cannot be pickled ({type_name(error)}: {text_of(error, 300)}); keep only "
                "simple values in it or give its class a __reduce__"
            )
        if len(pickled) > self._bytes_left:
            return None, f"its pickle is too large ({len(pickled):,} bytes)"
        try:
            copy = _loads(pickled, self._member if members else None)
        except BaseException as error:
            return None, _cannot_be_rebuilt(error)
        if not isinstance(copy, BaseException):
            return None, f"its __reduce__ gives a {type_name(copy)}, which is no exception"
        if position == 0 and not _may_be_raised(type(copy)):
            return None, _NOT_RAISABLE
        self._bytes_left -= len(pickled)
        return pickled, ""

    def _member(self, position: int) -> BaseException:
        return Exception() if position == _LEFT_OUT else self._found[position]


_NOT_RAISABLE = (
    "raising it here would end or confuse the caller's event loop; "
    "let the function raise another subclass of Exception"
)


def _cannot_be_rebuilt(error: BaseException) -> str:
    return (
        f"it cannot be rebuilt from its pickle ({type_name(error)}: {text_of(error, 300)}); "
        "pass all arguments of its constructor on to super().__init__() "
        "or give its class a __reduce__"
    )


def _may_be_raised(cls: type[BaseException]) -> bool:
    """Whether a caller that awaits the call survives an exception of this class, and gets it."""
    if not issubclass(cls, Exception) or issubclass(cls, StopIteration | StopAsyncIteration):
        return False
    # A class may be an Exception and, for example, a CancelledError as well.
    return all(
        issubclass(base, Exception)
        for base in cls.__mro__
        if issubclass(base, BaseException) and base not in (BaseException, BaseExceptionGroup)
    )


class _Pickler(pickle.Pickler):
    """Pickles a group without its members, which have nodes of their own."""

    members: dict[int, int]

    def persistent_id(self, obj: object) -> int | None:
        return self.members.get(id(obj))


class _Unpickler(pickle.Unpickler):
    """Reads what ``_Pickler`` wrote; ``member`` gives a member by its position."""

    member: Callable[[int], BaseException]

    def persistent_load(self, pid: Any) -> BaseException:
        return self.member(pid)


def _dumps(value: object, members: dict[int, int]) -> bytes:
    if not members and TBLIB not in sys.modules:
        return pickle.dumps(value, 5)
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, 5)
    pickler.members = members
    pickler.dispatch_table = reducers
    pickler.dump(value)
    return buffer.getvalue()


def _loads(pickled: bytes, member: Callable[[int], BaseException] | None) -> object:
    if member is None:
        exc, args = pickle.loads(pickled)
    else:
        unpickler = _Unpickler(io.BytesIO(pickled))
        unpickler.member = member
        exc, args = unpickler.load()
    if args is not None and isinstance(exc, BaseException):
        # A constructor that composes its message would compose it once more from the message.
        _ARGS.__set__(exc, args)
    return exc


def _notes(exc: BaseException) -> list[str]:
    notes = _DICT.__get__(exc).get("__notes__")
    if not isinstance(notes, list):
        return []
    texts = (note for note in notes[:MAX_NOTES] if isinstance(note, str))
    return [bounded(str.__str__(note), MAX_TEXT_CHARS) for note in texts]


def decode_exception(
    data: bytes | bytearray | memoryview, let_through: tuple[type[BaseException], ...] = ()
) -> Exception:
    """Give the exception that ``encode_exception`` described: as itself, or as ``RemoteError``.

    Whatever it is may be raised in the caller: it is an ``Exception``, and none that an event loop
    takes for something else. Raises nothing but what is in ``let_through``, from outside.
    """
    try:
        return _Decoder([_Node._make(node) for node in pickle.loads(data)], let_through).exception()
    except Exception as error:
        return _stand_in(_undescribed("an exception", _cannot_be_rebuilt(error)))


class _Decoder:
    def __init__(self, nodes: list[_Node], let_through: tuple[type[BaseException], ...]) -> None:
        self._nodes = nodes
        self._let_through = let_through
        self._built: dict[int, BaseException] = {}

    def exception(self) -> Exception:
        for position, node in enumerate(self._nodes):
            exc = self._build(position)
            if node.notes:
                _DICT.__get__(exc)["__notes__"] = node.notes
            _TRACEBACK.__set__(exc, frames.rebuild(node.frames))
            if node.cause >= 0:
                _CAUSE.__set__(exc, self._build(node.cause))
            if node.context >= 0:
                _CONTEXT.__set__(exc, self._build(node.context))
            _SUPPRESS.__set__(exc, node.suppress_context)
        root = self._build(0)
        assert isinstance(root, Exception)  # _rebuilt sees to it
        return root

    def _build(self, position: int) -> BaseException:
        if position == _LEFT_OUT:
            reason = f"no more than {MAX_EXCEPTIONS:,} exceptions travel at once"
            return _stand_in(_undescribed("a further exception", reason))
        exc = self._built.get(position)
        if exc is None:
            exc = self._built[position] = self._rebuilt(position, self._nodes[position])
        return exc

    def _rebuilt(self, position: int, node: _Node) -> BaseException:
        if node.pickled is None:
            return _stand_in(node)
        try:
            exc = _loads(node.pickled, self._build if node.is_group else None)
        except self._let_through:
            raise
        except BaseException as error:  # a class may behave differently in this process
            return _stand_in(node._replace(reason=_cannot_be_rebuilt(error)))
        if not isinstance(exc, BaseException) or (position == 0 and not _may_be_raised(type(exc))):
            return _stand_in(node._replace(reason=_NOT_RAISABLE))
        return exc


def _stand_in(node: _Node) -> RemoteError:
    from leasepool_django.exceptions import RemoteError

    said = f": {node.text}" if node.text else ""
    return RemoteError(
        f"The worker raised {node.type_name}{said}. "
        f"It arrives as RemoteError because {node.reason}.",
        type_name=node.type_name,
        text=node.text,
        traceback_text=node.traceback_text,
    )
