"""Large payloads: taken apart without copying, and moved through shared memory.

A payload is the stream of a pickle and the buffers that pickle protocol 5 leaves out of it. From
``THRESHOLD`` bytes on it travels in a ``Segment``, an unnamed file in memory that both sides have
mapped and that is used again for the next payload. The parent makes every segment and passes its
descriptor to the worker, so nothing is left behind by whoever dies. What is unpickled from a
segment refers to it: as long as any of that lives, ``in_use`` is true and the segment must be given
up instead of being written again.

Standard library only: every worker imports this module.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
from collections.abc import Iterator
from math import prod
from struct import Struct, calcsize
from typing import Any

from .wire import pack

__all__ = [
    "AVAILABLE",
    "COPIED_WHOLE",
    "THRESHOLD",
    "Payload",
    "Segment",
    "dump",
    "load_parts",
    "reduce_view",
]

THRESHOLD = 1 << 16  # bytes; below it the socket is faster
# Types that pickle copies into its stream, so that a large one is worth a slower pickler.
COPIED_WHOLE = frozenset({bytes, bytearray, memoryview})
AVAILABLE = sys.platform.startswith("linux") and hasattr(os, "memfd_create")
ALIGNMENT = 64  # what vector instructions like
_SMALLEST = 1 << 20
_CASTABLE = frozenset("?cbBhHiIlLqQnNfdP")  # the formats that memoryview.cast knows
_COUNTS = Struct("<QI")  # bytes of the stream, number of buffers
_LENGTH = Struct("<Q")

Buffer = bytes | bytearray | memoryview


class Payload:
    """The parts of a pickled object, in order: pieces of the stream, then the buffers."""

    __slots__ = ("buffers", "size", "stream")

    def __init__(self, stream: list[bytes], buffers: list[memoryview]) -> None:
        self.stream = stream
        self.buffers = buffers
        # With room for aligning each buffer.
        self.size = sum(map(len, stream)) + sum(len(part) + ALIGNMENT for part in buffers)

    def layout(self) -> bytes:
        """What the receiver must know to find the parts."""
        length = sum(map(len, self.stream))
        lengths = b"".join(_LENGTH.pack(len(part)) for part in self.buffers)
        return _COUNTS.pack(length, len(self.buffers)) + lengths

    def frame(self, kind: int) -> list[Buffer]:
        """The frame that carries all of it over a socket, in pieces; see ``load_parts``."""
        layout = self.layout()
        length = len(layout) + sum(map(len, self.stream)) + sum(map(len, self.buffers))
        return [pack(length << 8 | kind) + layout, *self.stream, *self.buffers]


def parse(layout: Buffer) -> tuple[int, list[int]]:
    """Return the stream's length and those of the buffers."""
    stream, count = _COUNTS.unpack_from(layout)
    start = _COUNTS.size
    return stream, [_LENGTH.unpack_from(layout, start + 8 * i)[0] for i in range(count)]


class _Sink:
    """A file that a pickler writes to: keeps large ``bytes`` as they are, without copying."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Buffer) -> int:
        # Anything but bytes is the pickler's own memory, or may be changed by its owner.
        self.pieces.append(data if type(data) is bytes else bytes(data))
        return len(data)


def dump(value: Any, *, pieces: bool) -> Payload:
    """Pickle ``value`` with protocol 5 and out-of-band buffers.

    ``pieces``: whether large ``bytes`` in it are worth a slower pickler that does not copy them.
    """
    found: list[pickle.PickleBuffer] = []
    try:
        if pieces:
            sink = _Sink()
            _Pickler(sink, 5, buffer_callback=found.append).dump(value)
            stream = sink.pieces
        else:
            stream = [pickle.dumps(value, 5, buffer_callback=found.append)]
    except BaseException:
        # The error refers to this frame. A memoryview that becomes garbage together with a buffer
        # of it crashes the interpreter, up to Python 3.12.6 (gh-77894).
        found.clear()
        raise
    try:
        return Payload(stream, [buffer.raw() for buffer in found])
    except BufferError:  # not contiguous: only a copy can travel
        return Payload([pickle.dumps(value, 5)], [])


class _Pickler(pickle.Pickler):
    """Lets ``memoryview`` travel, which cannot be pickled otherwise."""

    def reducer_override(self, value: Any) -> Any:
        return reduce_view(value) if type(value) is memoryview else NotImplemented


def reduce_view(view: memoryview) -> Any:
    """How a ``memoryview`` travels.

    ``NotImplemented`` if Python cannot make another of its format or shape: those of structures,
    complex numbers and other byte orders, and shapes with a zero behind the first number.
    """
    if view.format.removeprefix("@") not in _CASTABLE or 0 in (view.shape or ())[1:]:
        return NotImplemented
    # What is in Fortran's order can only as a copy in C's be given its shape again.
    content = pickle.PickleBuffer(view) if view.c_contiguous else view.tobytes()
    return _view, (content, view.format, view.shape)


def _view(buffer: Any, form: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(buffer)
    if view.format == form and view.shape == shape:
        return view
    if 0 in shape:  # which cast() refuses
        one = memoryview(bytes(calcsize(form) * prod(shape[1:])))
        return one.cast(form, (1, *shape[1:]))[:0]  # type: ignore[call-overload, no-any-return]
    return view.cast("B").cast(form, shape)  # type: ignore[call-overload, no-any-return]


def load_parts(body: Buffer) -> Any:
    """Unpickle a payload that came over the socket as its layout and its parts."""
    memory = memoryview(body)
    length, lengths = parse(body)
    start = _COUNTS.size + _LENGTH.size * len(lengths)
    stream = memory[start : start + length]
    start += length
    buffers = []
    for size in lengths:
        # Each in memory of its own, which is aligned.
        buffers.append(bytearray(memory[start : start + size]))
        start += size
    return pickle.loads(stream, buffers=buffers)


class Segment:
    """A piece of shared memory. ``fd`` is open until ``close``; the size never changes.

    ``reserved``: bytes that have memory, as far as this process has written them.
    ``OSError`` if it cannot be mapped; ``fd`` is then still the caller's to close.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map: mmap.mmap | None = mmap.mmap(fd, size)
        self.reserved = 0

    @classmethod
    def create(cls, size: int, at_most: int | None = None) -> Segment:
        """Make a segment of at least ``size`` bytes, and no more than ``at_most``.

        ``OSError`` when there is no memory.
        """
        room = max(_SMALLEST, 1 << (size - 1).bit_length())
        size = room if at_most is None else max(size, min(room, at_most))
        fd = os.memfd_create("leasepool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            seal(fd)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    def write(self, payload: Payload, *, in_thread: bool = False) -> None:
        """Copy a payload in; ``OSError`` when there is no memory, instead of a signal later.

        ``in_thread``: let other threads run meanwhile, at half the speed.
        """
        if in_thread:
            self._write_file(payload)
            return
        if payload.size > self.reserved:
            os.posix_fallocate(self.fd, self.reserved, payload.size - self.reserved)
            self.reserved = payload.size
        assert self._map is not None
        start = 0
        with memoryview(self._map) as memory:
            for piece in payload.stream:
                memory[start : start + len(piece)] = piece
                start += len(piece)
            for buffer in payload.buffers:
                start = -(-start // ALIGNMENT) * ALIGNMENT
                memory[start : start + len(buffer)] = buffer
                start += len(buffer)

    def steps(self, payload: Payload, size: int) -> Iterator[None]:
        """Do as ``write``, pausing after ``size`` bytes each: a loop may run in between."""
        start = 0
        assert self._map is not None
        with memoryview(self._map) as memory:
            parts: list[Buffer] = [*payload.stream, *payload.buffers]
            for index, part in enumerate(parts):
                if index >= len(payload.stream):
                    start = -(-start // ALIGNMENT) * ALIGNMENT
                view = memoryview(part)
                for first in range(0, len(view), size):
                    piece = view[first : first + size]
                    end = start + len(piece)
                    if end > self.reserved:
                        os.posix_fallocate(self.fd, self.reserved, end - self.reserved)
                        self.reserved = end
                    memory[start:end] = piece
                    start = end
                    if len(piece) == size:
                        yield

    def _write_file(self, payload: Payload) -> None:
        start = 0
        parts: list[Buffer] = [*payload.stream, *payload.buffers]
        for index, part in enumerate(parts):
            if index >= len(payload.stream):
                start = -(-start // ALIGNMENT) * ALIGNMENT
            rest = memoryview(part)
            while rest:
                written = os.pwrite(self.fd, rest, start)
                rest = rest[written:]
                start += written
                self.reserved = max(self.reserved, start)

    def read(self, layout: Buffer) -> Any:
        """Unpickle the payload that was written; large values in it refer to the segment."""
        assert self._map is not None
        length, lengths = parse(layout)
        memory = memoryview(self._map)
        views = []
        start = length
        for size in lengths:
            start = -(-start // ALIGNMENT) * ALIGNMENT
            views.append(memory[start : start + size])
            start += size
        return pickle.loads(memory[:length], buffers=views)

    @property
    def in_use(self) -> bool:
        """Whether anything unpickled from it is still alive."""
        if self._map is None:
            return True
        try:
            # Refused while a buffer is exported; otherwise it changes nothing.
            self._map.resize(self.size)
        except BufferError:
            return True
        return False

    def close(self) -> None:
        """Let go of it, once and for all; what was unpickled from it stays valid."""
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                pass  # unmapped with the last object that refers to it
            self._map = None
        fd, self.fd = self.fd, -1  # the number may be somebody else's next
        if fd >= 0:
            os.close(fd)


def seal(fd: int) -> None:
    """Let nobody change the size: who shrank it would have the other side killed by SIGBUS."""
    import fcntl

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
