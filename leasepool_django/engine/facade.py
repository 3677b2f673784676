"""A lease dressed as a ``concurrent.futures.Executor``.

For libraries that want an executor. Its threads (as many as the lease has workers, started at the
first ``submit``) wait for outcomes; they are daemons, so they never hold up the interpreter's exit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from .calls import Calls
    from .lease import LeaseState
    from .line import Call

__all__ = ["LeaseExecutor"]

P = ParamSpec("P")
T = TypeVar("T")
_Job = tuple[Future[Any], "Call"]


class LeaseExecutor(Executor):
    """``submit`` and ``map`` over the workers of one lease; the lease owns its life."""

    def __init__(self, calls: Calls, lease: LeaseState) -> None:
        # Not the ExecutorLease: one dropped together with its executor can still be found.
        self._calls = calls
        self._lease = lease
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._jobs, lease.workers)
        self._end.atexit = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn`` on a worker; a future that is cancelled in time is never sent.

        What cannot be sent is the future's error, as with other executors.
        """
        lease = self._lease
        if not lease.open:
            raise lease.refusal()
        future: Future[T] = Future()
        try:
            # Here and not where it is waited for: a call takes its caller's context along.
            call = self._calls.new_call(None, fn, args, kwargs, self._calls.call_timeout)
        except Exception as error:  # noqa: BLE001 - the future carries it
            future.set_exception(error)
            return future
        finally:
            del args, kwargs
        with self._lock:
            if not lease.open:
                raise lease.refusal()
            if len(self._threads) < lease.workers:
                thread = threading.Thread(
                    target=_serve,
                    args=(self._jobs, self._calls, lease),
                    name=f"{lease.lease_id}-executor-{len(self._threads)}",
                    daemon=True,
                )
                thread.start()
                self._threads.append(thread)
            self._jobs.put((future, call))
        return future

    def shutdown(
        self,
        wait: bool = True,  # noqa: ARG002, FBT001, FBT002 - the signature is Executor's
        *,
        cancel_futures: bool = False,  # noqa: ARG002
    ) -> None:
        """Refused: release the lease instead."""
        raise RuntimeError(
            "This executor is a lease's: release the lease (leave its `with` block or call "
            "release()) instead of shutting the executor down."
        )

    def close(self) -> None:
        """End the threads once the jobs before are done; the released lease refuses those."""
        with self._lock:  # no job may come behind what ends the threads
            self._end()

    def __exit__(self, *exc_info: object) -> None:
        """Leave the executor as it is: the lease's own ``with`` block ends it."""


def _end(jobs: SimpleQueue[_Job | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


def _serve(jobs: SimpleQueue[_Job | None], calls: Calls, lease: LeaseState) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        future, call = job
        del job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = calls.run_sync(lease, call, None)
        except BaseException as error:  # noqa: BLE001 - the future carries it
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del future, call
