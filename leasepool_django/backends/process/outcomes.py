"""What a call came to: its frame decoded, or the error for a worker that died."""

from __future__ import annotations

import pickle
import signal
import threading
from typing import TYPE_CHECKING, Any

from ...exceptions import NotPicklableError, WorkerCrashedError
from . import wire
from .pickling import shown_name
from .shared import load_parts

if TYPE_CHECKING:
    from ...engine.line import Call
    from .shared import Segment

__all__ = ["crashed", "decode", "ending", "manner"]


def decode(call: Call, kind: int, body: bytes | bytearray, segment: Segment | None) -> None:
    """Put the outcome into ``call``; a shared one is in ``segment``. Never raises.

    Ctrl-C of a blocking caller, on the main thread, becomes the call's error, which that caller
    raises; the worker has done its work and may be used again. On a loop it cannot be told from
    what the unpickling itself may raise, and must not end the loop in the middle of its own work.
    """
    if kind != wire.ERROR:
        try:
            if kind == wire.RESULT:
                call.value = pickle.loads(body)
            elif kind == wire.RESULT_PARTS:
                call.value = load_parts(body)
            else:
                assert segment is not None
                call.value = segment.read(body)
        except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
            if isinstance(error, KeyboardInterrupt) and _interrupts(call):
                call.error = error
                return
            call.error = NotPicklableError(
                f"The result of {shown_name(call.function)} cannot be unpickled here: "
                f"{type(error).__name__}: {error}",
                path="result",
            )
            call.error.__cause__ = error if isinstance(error, Exception) else None
    else:
        from .remote import decode_exception

        try:
            call.error = decode_exception(body, (KeyboardInterrupt,) if _interrupts(call) else ())
        except KeyboardInterrupt as error:
            call.error = error


def _interrupts(call: Call) -> bool:
    return call.home is None and threading.current_thread() is threading.main_thread()


def crashed(name: str, pid: int | None, status: int | None, hint: str) -> WorkerCrashedError:
    """The error for a call whose worker died by itself."""
    what = "died" if status is None else manner(status)
    facts = ending(status)
    if facts["signal_name"] == "SIGKILL":
        hint = hint or "often that is the kernel's out-of-memory killer"
    elif facts["signal_name"] in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL"):
        hint = hint or "usually a fault in an extension module"
    elif facts["exitcode"] is not None:
        hint = hint or "something called os._exit() or ended the process"
    text = f"The worker (pid {pid}) running {name} {what}" + (f"; {hint}" if hint else "")
    return WorkerCrashedError(
        f"{text}. It has been replaced; the call was not repeated.",
        pid=pid,
        **facts,
        function=name,
    )


def manner(status: int) -> str:
    """How a process ended: "exited with status 3", "was killed by SIGKILL"."""
    return f"was killed by {signal_of(status)}" if status < 0 else f"exited with status {status}"


def ending(status: int | None) -> dict[str, Any]:
    """How a process ended, as facts: ``exitcode`` or ``signal_name``; neither if unknown."""
    return {
        "exitcode": status if status is not None and status >= 0 else None,
        "signal_name": signal_of(status) if status is not None and status < 0 else None,
    }


def signal_of(status: int) -> str:
    """The name of the signal that ended a process whose exit status is negative."""
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal
        return f"signal {-status}"
