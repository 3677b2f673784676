"""A worker as the parent sees it, and the two ways of driving its socket and its tray.

Whoever holds the worker's slot drives them: an event loop through a reader that stays
registered on the loop that last used it, or a thread that blocks. One call at a time, so nothing
here is locked but what the housekeeper touches as well (``_lock``: the process descriptor, who is
registered, whether the process has ended, and what is sent to a worker that nobody drives).

Long because both ways share the state of one socket, and how they take turns is the difficult part.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ...engine.answer import Answer
from ...engine.line import DONE, GONE
from ..base import Host, Worker
from . import wire
from .outbox import Outbox
from .outcomes import decode, ending, manner
from .system import has_ended
from .tray import LARGEST, Tray
from .turns import Turns

if TYPE_CHECKING:
    from ...engine.line import Call, Slot
    from ...engine.progress import Listener
    from .pool import ProcessBackend

__all__ = ["ProcessWorker"]

KEEP_SECONDS = 10.0  # how long shared memory is kept for the next large payload
HANG_UP_SECONDS = 0.5  # how long a worker may live on after closing its socket
# After so many outcomes taken without leaving the caller's frame the loop gets a turn.
EAGER_CALLS = 32
# After so many attempts in vain only one call in as many makes another: each is a system call.
EAGER_MISSES = 8
PEEKED = 1 << 18  # bytes looked at; a socket holds fewer
_REQUESTS = frozenset({wire.NEED, wire.FETCH})
_OUTCOMES = frozenset({wire.RESULT, wire.ERROR, wire.RESULT_PARTS, wire.RESULT_SHARED})


class ProcessWorker(Worker):
    """One worker process. Created when it is asked for; handed to the engine once it is ready.

    ``died_unasked``: it was found dead with a call that it had not read, before anybody had asked
    it to leave.
    """

    died_unasked = False

    def __init__(self, backend: ProcessBackend, host: Host, slot: Slot, number: int) -> None:
        self.slot = slot
        self.number = number
        self.ready = False
        self.failure: str | None = None  # why it could not get ready, as it said itself
        self.lost = False  # whether it died with its fork server
        self.unreported = False  # whether it had ended before, and the fork server did not say so
        self.offence = ""  # why this process had to end it, other than by kill()
        self.reader = wire.FrameReader()
        self.channel, self.theirs = socket.socketpair()
        try:
            self.tray = Tray.create()
        except OSError:
            self.channel.close()
            self.theirs.close()
            raise
        self.channel.setblocking(False)
        self.pidfd: int | None = None
        self._backend = backend
        self._host = host
        self._fd = self.channel.fileno()
        self._receive = self.channel.recv
        self._send = self.channel.send
        self._opens_tray = wire.OPENS_TRAY if self.tray is not None else frozenset()
        self._call: Call | None = None
        self._home: asyncio.AbstractEventLoop | None = None
        self._turns: Turns  # of the loop that last used it
        self._eager = 0
        self._misses = 0
        self._outbox = outbox = Outbox(
            self.channel, backend.max_shared_bytes, backend.closer.let_go
        )
        self._unsent = outbox.unsent
        self._memory_used = 0.0  # when it was used last (monotonic)
        self._memory_watched = False  # whether somebody looks after that
        self._call_taken = False  # the worker has said that it has received the call
        # Whether the worker will look in its tray for what comes next, and not on its socket.
        self._at_tray = self.tray is not None
        self._number: int | None = None  # of the running call in the tray, if it was put there
        self._kill_error: Callable[[], BaseException] | None = None
        self._reading: Call | None = None  # whose outcome was read last
        self._resuming = False  # whether its caller may go on when all is done here
        self._answer: Answer | None = None  # ... and is to go on
        self._untold: list[Call] = []  # who may not have been told, as that was interrupted
        self._lock = threading.Lock()
        self._readers: list[asyncio.AbstractEventLoop] = []
        self._threads = 0  # that drive the socket, or have just driven it
        self._ended = threading.Event()
        self.status: int | None = None  # exit code or minus a signal, once _ended is set
        self._hung_up = False

    @property
    def ends(self) -> list[int]:
        """The descriptors that the process is given: of the socket, and of the tray."""
        theirs = self.tray.theirs if self.tray is not None else []
        return [self.theirs.fileno(), *(end.fileno() for end in theirs)]

    def handed_over(self) -> None:
        """The process has its ends, or will never have them."""
        self.theirs.close()
        if self.tray is not None:
            self.tray.handed_over()

    # -- life (housekeeper) ------------------------------------------------------------------------

    def started(self, pid: int, pidfd: int | None) -> None:
        """The process exists."""
        self.pid = pid
        with self._lock:
            self.pidfd = pidfd

    def ended(self, status: int | None) -> None:
        """The kernel has reported the process gone: fail its call and close its socket."""
        with self._lock:
            if self.pidfd is not None:
                os.close(self.pidfd)
                self.pidfd = None
            self.status = status
            self._ended.set()
        self._host.worker_dead(self)
        with self._lock:
            readers = list(self._readers)
            if self._threads:
                # Wakes the thread even while a process the worker had started holds its end.
                with suppress(OSError):  # macOS, where the other end is closed
                    self.channel.shutdown(socket.SHUT_RDWR)
            elif not readers:
                self._close()
        for home in readers:
            try:
                home.call_soon_threadsafe(self._detach, home)
            except RuntimeError:  # closed: its selector is gone, and so is its caller
                self._forget(home)

    def _close(self) -> None:
        """Under the lock: nobody drives the socket any more."""
        self.channel.close()
        if self.tray is not None:
            self.tray.close()
        self._outbox.close()

    def discard(self) -> None:
        """After a fork, in the child: close this copy of the descriptors."""
        self._close()
        if self.pidfd is not None:
            os.close(self.pidfd)

    def retire(self) -> None:
        """See ``Worker.retire``: it leaves when its socket ends, or is killed a little later."""
        try:
            self.channel.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already
        with suppress(OSError), self._lock:  # then it is killed
            self._direct_to_socket()
        self._backend.expect_end(self)

    def kill(self, error: Callable[[], BaseException]) -> None:
        """See ``Worker.kill``."""
        self._kill_error = error
        self.end()

    def end(self) -> None:
        """Kill the process, from any thread. What it had started dies with it."""
        with self._lock:
            if self._ended.is_set():
                return
            self.killed = True
            by_number = self.pidfd is None
            if self.pidfd is not None:
                try:
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # dead, and its end is about to be reported
        self._host.housekeeper.post(partial(self._backend.ending, self, by_number=by_number))

    @property
    def is_dead(self) -> bool:
        """Whether the kernel says that the process has ended, reported or not."""
        with self._lock:
            return self._ended.is_set() or (self.pidfd is not None and has_ended(self.pidfd))

    def has_answered(self) -> bool:
        """See ``Worker.has_answered``. Looks without receiving: others may be about to receive."""
        with self._lock:
            if self._ended.is_set() or not self.reader.between_frames:
                return False
            try:
                data = memoryview(self.channel.recv(PEEKED, socket.MSG_PEEK | socket.MSG_DONTWAIT))
            except OSError:
                return False
        while len(data) >= wire.HEADER_SIZE:  # log records may come first
            (head,) = wire.unpack_from(data)
            kind = head & wire.LARGEST_KIND
            if kind == wire.NEED or kind & wire.PLAIN in _OUTCOMES:
                return True
            data = data[wire.HEADER_SIZE + (head >> 8) :]
        return False

    def receive_frames(self) -> list[tuple[int, bytes | bytearray]] | None:
        """Receive once; the frames that completes, or ``None`` at the end of the stream."""
        if self.reader.wanted is None:
            data = self._receive(wire.RECEIVE)
            return self.reader.feed(data) if data else None
        count = self.channel.recv_into(self.reader.wanted)
        if not count:
            return None
        frame = self.reader.filled(count)
        return [] if frame is None else [frame]

    # -- shared memory -----------------------------------------------------------------------------

    def _used_memory(self) -> None:
        self._memory_used = monotonic()
        if not self._memory_watched:
            self._memory_watched = True
            self._backend.watch_memory(self, KEEP_SECONDS)

    def look_after_memory(self) -> None:
        """Housekeeper: give shared memory up that nobody has used for ``KEEP_SECONDS``.

        A worker at work is told with its next call. One that is idle is told on the loop that used
        it last, and here if that was a thread: nobody else may send to it meanwhile.
        """
        left = self._memory_used + KEEP_SECONDS - monotonic()
        if left > 0:
            self._backend.watch_memory(self, left)
            return
        self._memory_watched = False
        # Both, so that the next call looks at all.
        self._outbox.stale = self._outbox.results_read = True
        with self._lock:
            home = self._home
            busy = self._call is not None
            if home is not None and home.is_closed():
                home = None
            if home is None and not self._threads and not busy:
                self._trim()
        if busy:
            self._memory_watched = True
            self._backend.watch_memory(self, KEEP_SECONDS)
        elif home is not None:
            try:
                home.call_soon_threadsafe(self._trim_idle, home)
            except RuntimeError:
                return  # closed; its next call does it

    def _trim_idle(self, home: asyncio.AbstractEventLoop) -> None:
        with self._lock:  # nobody else takes the worker over meanwhile
            if self._home is home and self._call is None:
                self._trim()

    def _trim(self) -> None:
        """Under the lock, while nobody drives the worker."""
        if self._ended.is_set() or not self._outbox.stale:
            return
        self._outbox.trim()
        try:
            self._direct_to_socket()
            self._outbox.flush()
        except OSError:
            pass  # it is gone
        except BaseException:
            self.end()  # nobody knows where it looks
            raise
        self._unsent.clear()  # word that does not get through does no harm

    # -- asyncio -----------------------------------------------------------------------------------

    def begin(self, call: Call, home: asyncio.AbstractEventLoop, *, eager: bool) -> None:
        """See ``Worker.begin``."""
        if (
            (self._home is not home and not self._attach(home))
            or self._hung_up
            or self._ended.is_set()
        ):
            self._undelivered(call)
            return
        self._call = call
        call.begun = monotonic()
        if call.timeout is not None:
            self._set_deadline(call)
        payload = call.payload
        try:
            if self._put_in_tray(payload):
                pass
            elif type(payload) is bytes and not self._outbox.results_read:
                sent = self._send(payload)
                if sent != len(payload):
                    self._unsent.append(memoryview(payload)[sent:])
            else:
                self._outbox.put(payload, in_thread=False)
                if type(payload) is not bytes:
                    self._used_memory()
                if self._outbox.unwritten is not None:
                    home.call_soon(self._write_on, home, call)
                    return
                self._outbox.flush()
        except BlockingIOError:
            self._unsent.append(memoryview(payload))
        except OSError:
            self._call = None
            self._unsent.clear()
            self._undelivered(call)
            return
        except Exception as error:  # noqa: BLE001 - a payload that cannot be copied, for one
            self._not_sent(call, error)
            return
        if self._unsent:
            home.add_writer(self._fd, self._writable, home)
        elif (
            eager
            and self._eager < EAGER_CALLS
            and (self._misses < EAGER_MISSES or not self.calls % EAGER_MISSES)
        ):
            self._eager += 1
            self._take(home)
            self._misses = self._misses + 1 if self._call is call else 0

    def _put_in_tray(self, payload: Any) -> bool:
        """Lay a call there if it may lie there; else the worker is told to look on its socket.

        ``OSError`` if it cannot be told.
        """
        if not self._at_tray:
            return False
        tray = self.tray
        assert tray is not None
        if type(payload) is bytes and len(payload) <= LARGEST and not self._outbox.results_read:
            self._number = tray.next
            tray.put(payload)
            return True
        self._direct_to_socket()
        return False

    def _direct_to_socket(self) -> None:
        """Have the worker look on its socket for what comes next; ``OSError`` if that fails."""
        if self._at_tray:
            assert self.tray is not None
            self.tray.put(wire.LOOK_FRAME)
            self._at_tray = False

    def may_put_ahead(self, call: Call) -> bool:
        """See ``Worker.may_put_ahead``."""
        running, payload = self._call, call.payload
        return (
            self.tray is not None
            and running is not None
            # While the loop is blocked, only the time of the one before is known to be over.
            and (
                call.timeout is None
                or (running.timeout is not None and running.timeout <= call.timeout)
            )
            and type(payload) is bytes
            and len(payload) <= LARGEST
            and not self.killed
            and not self._ended.is_set()
            # It has to be told something with it, or is still being sent the one before.
            and not self._unsent
            and self._outbox.unwritten is None
            and not self._outbox.results_read
        )

    def put_ahead(self, call: Call) -> bool:
        """See ``Worker.put_ahead``."""
        assert self.tray is not None
        try:
            self.tray.put(call.payload)
        except OSError:
            return False
        return True

    def take_back(self, taken: list[bytes]) -> None:
        """See ``Worker.take_back``."""
        assert self.tray is not None
        assert self.ahead is not None
        self.tray.take_back(self.ahead.payload, taken)

    def _go_on(self, call: Call) -> None:
        """The worker has taken ``call`` from its tray, or is about to."""
        assert self.tray is not None
        self._number = self.tray.next - 1
        self._call = call
        if call.timeout is not None:
            self._set_deadline(call)

    def _write_on(self, home: asyncio.AbstractEventLoop, call: Call) -> None:
        """On ``home``: write more of a large payload, and send word of it after its last piece."""
        if self._call is not call or call.state == GONE:
            return  # the process has ended meanwhile, or is being killed
        try:
            if not self._outbox.write_on():
                home.call_soon(self._write_on, home, call)
                return
            self._outbox.flush()
        except OSError:
            self._unsent.clear()  # the reader finds out what happened
        except Exception as error:  # noqa: BLE001 - as in begin()
            self._not_sent(call, error)
        if self._unsent:
            home.add_writer(self._fd, self._writable, home)

    def _not_sent(self, call: Call, error: Exception) -> None:
        """Nobody knows what the worker makes of what it has of ``call``: it goes."""
        self._call = None
        self.deadline = None
        self._unsent.clear()
        self._host.call_ended(self, call, call.home, retiring=True)
        self.end()
        if call.state != GONE:
            call.error = error
        call.wake()

    def _set_deadline(self, call: Call) -> None:
        assert call.timeout is not None
        self.deadline = deadline = call.begun + call.timeout
        self._host.housekeeper.wake_by(deadline)

    def _attach(self, home: asyncio.AbstractEventLoop) -> bool:
        """Register the reader on ``home``; false if the process has ended."""
        with self._lock:
            if self._ended.is_set():
                return False
            self._home = home
            registered = home in self._readers
            if not registered:
                self._readers = [loop for loop in self._readers if not loop.is_closed()]
                self._readers.append(home)
        self._turns = Turns.of(home)
        if not registered:
            home.add_reader(self._fd, self._readable, home)
        return True

    def _readable(self, home: asyncio.AbstractEventLoop) -> None:
        call = self._call
        if call is None or call.home is not home:
            self._read_idle(home)
            return
        del call  # with its result, which its task may let go of before this is left
        turns = self._turns
        worker = turns.choose(self)
        if worker is not None:  # or ``home`` has something else to do first
            worker._eager = 0
            worker._take(home, resuming=True)
            turns.over()

    def runs_for(self, home: asyncio.AbstractEventLoop) -> bool:
        """Whether the outcome of a call of ``home``'s is still to come."""
        call = self._call
        return call is not None and call.home is home and not self._hung_up

    def read_from(self, home: asyncio.AbstractEventLoop) -> None:
        """On ``home``: receive once, if an outcome is to come."""
        if self.runs_for(home):
            self._eager = 0
            self._take(home)

    def _read_idle(self, home: asyncio.AbstractEventLoop) -> None:
        """There is something to read, and no call of ``home``'s runs."""
        frames: list[tuple[int, bytes | bytearray]] | None = []
        with self._lock:  # nobody else takes the worker over meanwhile
            mine = self._home is home
            if mine:
                try:
                    frames = self.receive_frames()
                except BlockingIOError:
                    return
                except OSError:
                    frames = None
        if not mine:  # another loop or thread drives the worker now
            home.remove_reader(self._fd)
            self._forget(home)
        elif frames is None:
            self._hang_up(home, None)
        else:
            for kind, body in frames:
                if kind == wire.LOG:  # of a thread that a function has left behind
                    self.log(body, None)
                else:
                    self._interfered()

    def _take(self, home: asyncio.AbstractEventLoop, *, resuming: bool = False) -> None:
        """Receive once, and handle the frames that completes.

        ``resuming``: in a callback of the loop, which may let the caller go on itself.
        """
        self._reading = self._call
        self._resuming = resuming
        try:
            self._take_frames(home)
        except BaseException:
            # As by a signal handler, between any two steps: nobody knows which were done, and what
            # is read next would be taken for the outcome of another call.
            self.offence = self.offence or "this process was interrupted while it read its answer"
            self.leaving = True
            answer, self._answer = self._answer, None
            if answer is not None and not answer.done():
                answer.set_result(None)  # its outcome was received whole
            self._note_untold(home)
            self.end()
            raise
        finally:
            self._reading = None  # it refers to its result
            self._resuming = False
        answer, self._answer = self._answer, None
        if answer is not None:
            try:
                answer.resume()
            except BaseException:
                if not answer.done():  # a signal handler has raised before it began
                    answer.set_result(None)
                raise

    def _note_untold(self, home: asyncio.AbstractEventLoop) -> None:
        """Whose outcome it was, who may have been given the worker next, and who was to follow."""
        self._untold += [
            one
            for one in (self._reading, self.slot.call, self.ahead)
            if one is not None and one.home is home and self._has(one)
        ]

    def _has(self, call: Call) -> bool:
        return call.worker is self or call.ahead is self

    def _take_frames(self, home: asyncio.AbstractEventLoop) -> None:
        reader = self.reader
        try:
            if reader.wanted is not None:
                count = self.channel.recv_into(reader.wanted)
                frame = reader.filled(count) if count else None
                if frame is not None:
                    self._handle(home, *frame)
                if count:
                    return
                data = b""
            else:
                data = self._receive(wire.RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            self._hang_up(home, error)
            return
        if not data:
            self._hang_up(home, None)
            return
        if not reader.rest and len(data) >= wire.HEADER_SIZE:
            (head,) = wire.unpack_from(data)
            if len(data) == wire.HEADER_SIZE + (head >> 8):
                self._handle(home, head & wire.LARGEST_KIND, data[wire.HEADER_SIZE :])
                return
        for kind, body in reader.feed(data):
            self._reading = self._call
            self._handle(home, kind, body)

    def _handle(
        self, home: asyncio.AbstractEventLoop | None, kind: int, body: bytes | bytearray
    ) -> None:
        call = self._call
        if kind == wire.LOG:
            self.log(body, call)
            return
        if kind == wire.PROGRESS and call is not None and call.listener is not None:
            self._pass_on(body, call.listener, blocking=home is None)
            return
        if self.offence:
            return  # it is being killed, and what it says is not to be trusted
        plain = kind & wire.PLAIN
        if call is not None and kind in _REQUESTS:
            self._call_taken = True
            self._offer(kind, body)
            return
        if call is None or call.home is not home or plain not in _OUTCOMES:
            self._interfered()
            return
        self._call = self._number = None
        self._call_taken = False
        self.deadline = None
        self._at_tray = kind in self._opens_tray
        try:
            if kind & wire.KEPT:
                self._outbox.give_up_arguments()
            if plain == wire.RESULT_SHARED and call.state != GONE:
                # Before the worker may write to the segment again.
                decode(call, plain, body, self._outbox.results)
                self._outbox.results_read = True
                self._used_memory()
        except Exception:  # noqa: BLE001 - a frame costs the worker at most, and never a caller
            self._call = call  # who is told when the worker has ended
            self._interfered()
            return
        following = self._host.call_ended(
            self,
            call,
            home,
            retiring=kind >= wire.RETIRING,
            takes_ahead=self._at_tray,
        )
        try:
            if following is not None:
                assert home is not None
                if following.ahead is self:
                    self._go_on(following)
                else:
                    self.begin(following, home, eager=False)
                if self.tray is not None:
                    self._host.look_ahead(self, home)
            elif kind >= wire.RETIRING:
                self._backend.expect_end_soon(self)
        finally:
            if call.state != GONE:  # abandoned: nobody wants to know
                if plain != wire.RESULT_SHARED:
                    decode(call, plain, body, None)
                future = call.future
                if future is not None and not future.done():
                    if self._resuming and type(future) is Answer and self._answer is None:
                        self._answer = future
                    else:
                        future.set_result(None)

    def _interfered(self) -> None:
        """Only a function that writes to descriptors it does not own can cause this."""
        self.offence = "something wrote into its connection to this process"
        self.end()

    def _offer(self, kind: int, body: bytes | bytearray) -> None:
        """The worker asks for the segment of its call, or for one for a result of so many bytes."""
        size = int.from_bytes(body[:8], "little")
        if kind == wire.FETCH:
            valid = not body and self._outbox.has_arguments
        else:
            valid = len(body) == 8 and 0 < size <= self._backend.max_shared_bytes
        if not valid:
            self._interfered()
            return
        try:
            if kind == wire.FETCH:
                self._outbox.offer_arguments()
            else:
                assert self._call is not None
                if self.deadline is not None and self.deadline <= (now := monotonic()):
                    # The function has ended in time; it was this loop that was late.
                    assert self._call.timeout is not None
                    self.deadline = now + self._call.timeout
                    self._host.housekeeper.wake_by(self.deadline)
                by_socket = type(self._call.payload) is bytes
                self._outbox.offer_results(size, arguments_idle=by_socket)
        except OSError:
            self._unsent.clear()  # the reader finds out what happened
        if self._unsent:
            self.offence = "it did not read what it had asked for"
            self.end()

    def _writable(self, home: asyncio.AbstractEventLoop) -> None:
        try:
            self._outbox.flush()
        except OSError:
            self._unsent.clear()  # the reader finds out what happened
        if not self._unsent:
            home.remove_writer(self._fd)

    def _hang_up(self, home: asyncio.AbstractEventLoop, error: OSError | None) -> None:
        """The worker's end is closed. Its end as a process decides what becomes of the call."""
        self._stop_io(home)
        if not self._left_in_tray():
            self._undelivered_by_reset(error)
        if not self._ended.is_set():
            self._backend.expect_end_now(self)

    def _stop_io(self, home: asyncio.AbstractEventLoop) -> None:
        self._hung_up = True
        home.remove_reader(self._fd)
        if self._unsent:
            self._unsent.clear()
            home.remove_writer(self._fd)

    def _detach(self, home: asyncio.AbstractEventLoop) -> None:
        """On ``home``: the process has ended; take what it still said, and let go of the socket."""
        self._reading = self._call
        try:
            self._take_leave(home)
        except BaseException:  # as in _take
            self._note_untold(home)
            home.call_soon(self._detach, home)
            raise
        finally:
            self._reading = None
        for call in self._untold:
            told = call.future is None or call.future.done()
            if call.home is home and call.state != GONE and not told and self._has(call):
                call.error = call.error or self._death(call)
                call.state = DONE
                call.wake()
        self._forget(home)

    def _take_leave(self, home: asyncio.AbstractEventLoop) -> None:
        call = self._call
        if call is not None and call.home is home:
            while self._call is not None and not self._hung_up:
                try:
                    frames = self.receive_frames()
                except BlockingIOError:
                    break  # a process it had started holds the other end open
                except OSError as error:
                    self._undelivered_by_reset(error)
                    break
                if frames is None:
                    self._undelivered_by_reset(None)
                    break
                for kind, body in frames:
                    self._reading = self._call
                    self._handle(home, kind, body)
            self._stop_io(home)
            self._left_in_tray()
            following, self._call = self._call, None
            while (call := following) is not None:
                # One sent ahead may follow whose predecessor's outcome was lost on the way.
                following = self._host.call_ended(self, call, home, retiring=True)
                if call.state != GONE and call.error is None:
                    call.error = self._death(call)
                call.wake()
        else:
            home.remove_reader(self._fd)

    def _forget(self, home: asyncio.AbstractEventLoop) -> None:
        """``home`` no longer watches the socket; the last one to go closes it."""
        with self._lock:
            self._readers = [loop for loop in self._readers if loop is not home]
            if self._ended.is_set() and not self._readers and not self._threads:
                self._close()

    def __del__(self) -> None:
        # Of a loop that was closed before it ran ``_detach``; its selector referred to this. Any
        # moment will do, since this takes no lock. The outbox is missing if __init__ failed.
        if "_outbox" in self.__dict__:
            self._close()

    # -- blocking ----------------------------------------------------------------------------------

    def run_blocking(self, call: Call) -> None:
        """See ``Worker.run_blocking``. May be interrupted at any point; then the caller kills."""
        with self._lock:
            self._home = None
            ended = self._ended.is_set()
            self._threads += not ended
        if ended:
            self._undelivered(call)
            return
        self._call = call
        try:
            self._run_blocking(call)
        finally:
            # With its outcome the worker may have gone to another driver already.
            if self._call is call:
                self._call = None
            with self._lock:
                self._threads -= 1
                if self._ended.is_set() and not self._readers and not self._threads:
                    self._close()

    def _run_blocking(self, call: Call) -> None:
        call.begun = monotonic()
        if call.timeout is not None:
            self._set_deadline(call)
        try:
            if not self._put_in_tray(call.payload):
                self._send_blocking(call)
        except OSError:
            self._unsent.clear()
            if self._kill_error is None:  # or the call has been given up
                # Not all of it was sent, so the function cannot have begun.
                self._call = None
                self._undelivered(call)
                return
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while self._call is call:
            poller.poll()
            try:
                frames = self.receive_frames()
            except BlockingIOError:
                continue
            except OSError as error:
                self._undelivered_by_reset(error)
                break
            if frames is None:
                break
            for kind, body in frames:
                self._handle(None, kind, body)
        if self._call is not call or self._left_in_tray():
            return  # it has its outcome, or stands in line again
        if not self._ended.is_set():
            self._backend.expect_end_now(self)
            self._ended.wait()
            if self._left_in_tray():
                return
        self._call = None
        self._host.call_ended(self, call, None, retiring=True)
        if call.error is None:
            call.error = self._death(call)

    def _send_blocking(self, call: Call) -> None:
        """Send a call over the socket; ``OSError`` if the worker is gone."""
        self._outbox.put(call.payload, in_thread=True)
        if type(call.payload) is not bytes:
            self._used_memory()
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        while self._unsent:
            self._outbox.flush()
            if self._unsent:
                poller.poll()

    # -- outcomes ----------------------------------------------------------------------------------

    def _undelivered(self, call: Call) -> None:
        """The process was dead before it could read ``call``: another worker may have it."""
        # Only what is received piece by piece may have been too much for it.
        suspect = type(call.payload) is not bytes and self._outbox.streamed
        self._number = self.deadline = None
        # To the engine it is leaving from now on; its end is still an unasked one.
        self.died_unasked = self.died_unasked or not (self.leaving or self.killed)
        if not self._ended.is_set():
            self._backend.expect_end_now(self)
        if not self._host.call_undelivered(self, call, suspect=suspect):
            call.error = self._death(call)
            call.wake()

    def _undelivered_by_reset(self, error: OSError | None) -> None:
        # A stream socket is reset, instead of ended, when its reader died with data unread: the
        # call had not been taken off it, so it cannot have begun; unless the rest of it is what was
        # sent during the call. Nor can a call that is still being written.
        call = self._call
        if (
            (isinstance(error, ConnectionResetError) or self._outbox.unwritten is not None)
            and call is not None
            and not self._call_taken
            and self._number is None
            and self._kill_error is None
            and self.reader.between_frames
        ):
            self._call = None
            self._undelivered(call)

    def _left_in_tray(self) -> bool:
        """The worker is gone: whether it never saw its call, which then goes to another one."""
        call = self._call
        if call is None or self._number is None or self._kill_error is not None:
            return False
        assert self.tray is not None
        if not self.tray.never_seen(self._number, call.payload, dead=self.is_dead):
            return False
        self._call = None
        self._undelivered(call)
        return True

    def ending(self) -> tuple[str, dict[str, Any]]:
        """See ``Worker.ending``."""
        return "" if self.status is None else f": it {manner(self.status)}", ending(self.status)

    def _death(self, call: Call) -> BaseException:
        """The error for the call that was running when the process ended."""
        if self._kill_error is not None:
            return self._kill_error()
        return self._backend.crash(self, call)

    def _pass_on(self, body: bytes | bytearray, listener: Listener, *, blocking: bool) -> None:
        """Let the caller hear what the function reports."""
        try:
            value = pickle.loads(body)
        except BaseException as error:
            main = threading.current_thread() is threading.main_thread()
            if blocking and main and isinstance(error, KeyboardInterrupt):
                raise
            listener.cannot_read(error)
        else:
            listener.hear(value)

    def log(self, body: bytes | bytearray, call: Call | None) -> None:
        """Handle a record the worker logged, in the context of its call's caller."""
        from .records import decode_record

        try:
            record = decode_record(body)
            target = self._backend.log_target or logging.getLogger(record.name)
            if target.isEnabledFor(record.levelno):
                context = call.context if call is not None else None
                (context or Context()).run(target.handle, record)
        except Exception as error:  # noqa: BLE001 - a handler of the user's; no caller is at fault
            self._host.hand_over(partial(_log_failed, error))


def _log_failed(error: Exception) -> None:
    logging.getLogger("leasepool").error(
        "a log record of a worker could not be handled: %r", error, exc_info=error
    )
