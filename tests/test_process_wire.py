"""Frames survive any way in which a stream cuts them up; what is no frame is recognised."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leasepool_django.backends.process import wire

Frames = list[tuple[int, bytes]]

KINDS = [wire.CALL, wire.LOG, wire.RESULT, wire.ERROR | wire.RETIRING, wire.STARTED, wire.REMARK]
# Around the header's size, and around the size from which a body is received in place.
SIZES = st.one_of(
    st.integers(0, 20),
    st.integers(wire.RECEIVE - 10, wire.RECEIVE + 10),
    st.integers(wire.RECEIVE, 3 * wire.RECEIVE),
)


@st.composite
def frames(draw: st.DrawFn) -> Frames:
    listed = draw(st.lists(st.tuples(st.sampled_from(KINDS), SIZES), max_size=6))
    # Bodies that differ from each other all over, without drawing every byte.
    pattern = bytes(range(251)) * (3 * wire.RECEIVE // 251 + 2)
    return [
        (kind, pattern[position : position + size]) for position, (kind, size) in enumerate(listed)
    ]


class Stream:
    """Delivers bytes as a socket does: at most what is asked for, cut at ``cuts``."""

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        ends = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        self.pieces = [data[start:end] for start, end in pairwise(ends)]

    def receive(self, size: int) -> bytes:
        piece = self.pieces.pop(0)
        if len(piece) > size:
            self.pieces.insert(0, piece[size:])
        return piece[:size]


def read_all(reader: wire.FrameReader, stream: Stream) -> Frames:
    """Do what the drivers do: receive into a large body, otherwise feed."""
    found: Frames = []
    while stream.pieces:
        if reader.wanted is None:
            found += [
                (kind, bytes(body)) for kind, body in reader.feed(stream.receive(wire.RECEIVE))
            ]
        else:
            data = stream.receive(len(reader.wanted))
            reader.wanted[: len(data)] = data
            frame = reader.filled(len(data))
            if frame is not None:
                found.append((frame[0], bytes(frame[1])))
    return found


@settings(deadline=None)
@given(frames(), st.lists(st.integers(0, 1 << 20), max_size=30))
def test_frames_arrive_whole_and_in_order_however_they_are_cut(
    sent: Frames, cuts: list[int]
) -> None:
    reader = wire.FrameReader()
    data = b"".join(wire.frame(kind, body) for kind, body in sent)
    assert read_all(reader, Stream(data, cuts)) == sent
    assert reader.between_frames


@settings(deadline=None)
@given(frames().filter(bool), st.integers(1, 1 << 20))
def test_a_stream_that_ends_inside_a_frame_is_not_between_frames(sent: Frames, cut: int) -> None:
    data = b"".join(wire.frame(kind, body) for kind, body in sent)
    last = len(wire.frame(*sent[-1]))
    reader = wire.FrameReader()
    assert read_all(reader, Stream(data[: len(data) - (cut % (last - 1)) - 1], [])) == sent[:-1]
    assert not reader.between_frames


def test_one_byte_at_a_time_is_enough() -> None:
    sent = [(wire.LOG, b"record"), (wire.RESULT, b""), (wire.RESULT, b"x" * 300)]
    data = b"".join(wire.frame(kind, body) for kind, body in sent)
    reader = wire.FrameReader()
    assert read_all(reader, Stream(data, list(range(len(data))))) == sent


def test_a_large_body_arrives_whole_though_room_is_made_for_it_bit_by_bit() -> None:
    body = bytes(range(256)) * ((3 * wire.FIRST_PIECE + 256) // 256)
    reader = wire.FrameReader()
    stream = Stream(wire.frame(wire.RESULT, body) + wire.frame(wire.LOG, b"after"), [])
    assert read_all(reader, stream) == [(wire.RESULT, body), (wire.LOG, b"after")]
    assert reader.between_frames


def test_a_header_alone_costs_little_memory() -> None:
    """A function may have forged it."""
    tracemalloc.start()
    try:
        reader = wire.FrameReader()
        assert reader.feed(wire.pack(1 << 38 | wire.RESULT)) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.wanted is not None
    assert peak < 2 * wire.FIRST_PIECE


def test_a_message_carries_its_values() -> None:
    ((kind, body),) = wire.FrameReader().feed(wire.message(wire.STARTED, 3, 4711, True))
    assert kind == wire.STARTED
    assert pickle.loads(body) == (3, 4711, True)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"Traceback (most recent call last):\n",
        b"\n" * 8,
        b"x" * 8,
        b"\xff" * 8,
        # More bytes than there is memory for.
        wire.pack(1 << 54 | wire.RESULT),
    ],
)
def test_what_is_no_frame_is_recognised_at_once(rubbish: bytes) -> None:
    """Waiting for the rest of such a frame would take for ever."""
    reader = wire.FrameReader()
    found = list(reader.feed(wire.frame(wire.LOG, b"a record") + rubbish))
    assert found == [(wire.LOG, b"a record"), (wire.GARBLED, b"")]
