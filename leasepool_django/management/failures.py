"""What the ``leasepool`` command says of a call that brought no outcome back.

The engine's texts name the function that it was given, which is ``run_call``; here they are put in
terms of the function and the arguments that stand on the command line.
"""

from __future__ import annotations

from ..backends.base import Backend
from ..backends.process.culprit import Part, blame, by_key
from ..backends.process.texts import text_of, traceback_text, type_name
from ..exceptions import (
    CallTimeoutError,
    LeasePoolError,
    NotPicklableError,
    RemoteError,
    WorkerCrashedError,
)
from .calls import Call, Failure, run_call

__all__ = ["failure_of"]

_INTERNAL_NAME = f"{run_call.__module__}.{run_call.__qualname__}"


def failure_of(error: Exception, path: str, call: Call, backend: type[Backend]) -> Failure:
    """Describe ``error``, which the engine raised for ``call`` of the function named ``path``."""
    kind = type(error).__name__
    match error:
        case RemoteError(type_name=str(name)):
            return Failure(name, error.text or "", error.traceback_text or "")
        case WorkerCrashedError():
            return Failure(kind, _crash(error, backend), "")
        case CallTimeoutError():
            text = (
                f"stopped after {error.timeout:g} s"
                if backend.supports_kill
                else f"took longer than {error.timeout:g} s (the backend {backend.name!r} cannot "
                "stop it)"
            )
            return Failure(kind, text, "")
        case NotPicklableError() if not (error.path or "").startswith("result"):
            return Failure(kind, str(_blamed(error, path, call)), "")
        case LeasePoolError():
            return Failure(kind, str(error).replace(_INTERNAL_NAME, path), "")
    return Failure(type_name(error), text_of(error), traceback_text(error, error.__traceback__))


def _crash(error: WorkerCrashedError, backend: type[Backend]) -> str:
    if not backend.supports_isolation:
        return "a worker process died, which ends every call of its pool with this backend"
    end = error.signal_name
    if end is None and error.exitcode is not None:
        end = f"exit code {error.exitcode}"
    return "the worker died during this call" + (f" ({end})" if end else "")


def _blamed(error: NotPicklableError, path: str, call: Call) -> NotPicklableError:
    """The engine's error for arguments that cannot be sent, had they been sent by themselves."""
    sent = [Part(f"args[{index}]", value) for index, value in enumerate(call.args)]
    sent += [
        Part(by_key("kwargs", name, index), value)
        for index, (name, value) in enumerate(call.kwargs.items())
    ]
    subject = f"The arguments of {path} cannot be sent to a worker"
    return blame(error.__cause__ or error, sent, subject=subject)
