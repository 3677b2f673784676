"""Where a call lies that is sent to a busy worker ahead of its turn.

Whoever receives it first has it: the worker, which begins it then, or the server, which wants it
back; the kernel gives a datagram to one reader only. So it is known whether a call has been begun,
also when the worker has died, and none is begun twice; unless a function reads here by force.

There are two such places, which take turns: one for the call that is the worker's next, or was and
may not have been taken yet, and one for the call after it, which nobody can take before its turn.
Both are the two ends of one pair of sockets, and both processes have both.

Standard library only: every worker imports this module.
"""

from __future__ import annotations

import os
import socket

from .system import LINUX

__all__ = ["IN_ORDER", "LARGEST", "SUPPORTED", "Tray"]

LARGEST = 2048  # bytes of a call that is sent ahead; a larger one takes longer anyway
# A worker asks for what is here and on its socket in one system call, and must not overlook on its
# socket what was sent there first: Linux looks in the order in which it was asked.
SUPPORTED = LINUX
# Whether the processor does as well. Elsewhere the worker asks for its socket once more.
IN_ORDER = SUPPORTED and os.uname().machine in ("x86_64", "i686")


class Tray:
    """One process's view of it: how many calls it has put or taken so far says which is next."""

    def __init__(self, ends: tuple[socket.socket, socket.socket]) -> None:
        for end in ends:
            end.settimeout(None)  # the flag below says what it needs, and no default counts
        self.ends = ends
        self.turn = 0
        self.last = 0  # where something was put last

    @classmethod
    def create(cls) -> Tray:
        """A new one; ``OSError`` if there are no descriptors left."""
        return cls(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))

    def put(self, message: bytes) -> bool:
        """Lay ``message`` there; false if the kernel does not take it."""
        self.last = turn = self.turn
        self.turn = turn ^ 1
        try:
            self.ends[turn ^ 1].send(message, socket.MSG_DONTWAIT)
        except OSError:
            self.turn = turn
            return False
        return True

    def take_back(self, message: bytes, taken: list[bytes]) -> None:
        """Take ``message``, which was put there last, into ``taken``, unless the worker has it."""
        self.take_from(self.last, message, taken)
        if taken:
            self.turn = self.last

    def take_from(self, turn: int, message: bytes, taken: list[bytes]) -> None:
        """Take ``message``, which was put there at ``turn``, into ``taken``; what it has, it keeps.

        What a function has put there does not count.
        """
        receive = self.ends[turn].recv
        while taken != [message]:
            taken.clear()
            try:
                # Where a signal handler raises, no assignment follows a call that has returned.
                taken.extend(map(receive, [LARGEST], [socket.MSG_DONTWAIT]))
            except OSError:
                return

    def close(self) -> None:
        """Let go of both ends."""
        for end in self.ends:
            end.close()
