"""A worker's end of its socket, spoken to frame by frame."""

from __future__ import annotations

from pathlib import Path

import pytest

from leasepool_django.backends.process import shared
from tests.process_pools import run_program

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")

# In a process of its own: a link closes its socket in every child of its process.
SPOKEN_TO = """
    import socket
    from leasepool_django.backends.process import wire
    from leasepool_django.backends.process.link import Link
    from leasepool_django.backends.process.shared import Segment, dump
    from tests.shared_jobs import shared_memory_in_use as mapped

    ours, theirs = socket.socketpair()
    link = Link(theirs, None)

    def say(kind, body, segment=None):
        socket.send_fds(ours, [wire.frame(kind, body)], [segment.fd] if segment else [])

    def hear():
        (frame,) = wire.FrameReader().feed(ours.recv(wire.RECEIVE))
        return frame

    def drop(body):
        say(wire.DROP, body)
        kind, body = link.receive()
        assert kind == wire.DROP
        link.drop(body)

    # An argument comes, and its segment stays mapped until it is to be dropped.
    payload = dump({"data": bytes(300_000)}, pieces=False)
    arguments = Segment.create(payload.size)
    arguments.write(payload)
    size = arguments.size.to_bytes(8, "little")
    say(wire.CALL_SHARED, size + payload.layout())
    kind, body = link.receive()
    assert kind == wire.CALL_SHARED
    say(wire.OFFER, size, arguments)
    link.fetch_arguments(body)
    assert hear() == (wire.FETCH, b"")
    assert len(link.read_arguments(body)["data"]) == 300_000
    assert not link.arguments_kept()
    arguments.close()
    assert mapped() == 1
    drop(b"")
    drop(b"\\x01")
    assert mapped() == 1
    drop(b"\\x02")
    assert mapped() == 0
    drop(b"\\x02")

    # A result asks for its segment, and may be told to drop the other one before it gets it.
    for body in (b"", b"\\x01"):
        results = Segment.create(payload.size)
        say(wire.DROP, b"\\x02")
        say(wire.OFFER, results.size.to_bytes(8, "little"), results)
        assert link.share(payload)
        kind, need = hear()
        assert kind == wire.NEED
        assert need == payload.size.to_bytes(8, "little")
        assert len(results.read(payload.layout())["data"]) == 300_000
        results.close()
        drop(b"\\x02")
        assert mapped() == 1
        drop(body)
        assert mapped() == 0
    ours.close()
    theirs.close()
    print("as agreed")
"""


def test_a_segment_is_dropped_when_the_parent_says_so(tmp_path: Path) -> None:
    ended = run_program(tmp_path, SPOKEN_TO)
    assert ended.stdout == "as agreed\n", ended.stderr
