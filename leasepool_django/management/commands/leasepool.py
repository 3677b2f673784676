"""``manage.py leasepool run``: call a function of the project in leased workers.

Exit status: 0 when every call succeeded, 1 when one failed or no worker could be had, 2 for a
mistake on the command line (found before any worker starts), 130 and 143 after Ctrl-C and SIGTERM,
141 when nobody reads the results any more.

Long because what a signal does depends on what the command is about, down to each of its endings.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser, OutputWrapper

from ...backends.base import Backend, resolve
from ...backends.process.texts import type_name
from ...engine import ExecutorLease, LeasedExecutorManager
from ...exceptions import CallTimeoutError, LeasePoolError, UnknownAliasError, WorkerStartError
from ...handler import pools
from ..calls import Call, Outcome, check_bare_call, find_function, parse_calls, run_call
from ..failures import failure_of
from ..parsing import Once, SubcommandParser, add_common_options, to_count, to_seconds
from ..report import OutputError, Report

_USAGE_MISTAKE = 2
_INTERRUPTED = 130
_TERMINATED = 143
_OUTPUT_CLOSED = 141

# Seconds after the first Ctrl-C from which another one raises, where the loop has not turned to
# that one yet, and where it has.
_DEAF = 1.0
_SLOW = 10.0


class Command(BaseCommand):
    """``manage.py leasepool``, one method for each subcommand."""

    help = "Run functions of the project in leased workers."

    _has_own_process = False
    # Set when a call was given up that the backend cannot stop.
    _calls_run_on = False
    # While calls run on the event loop: cancels them, however often it is called.
    _cancel_calls: Callable[[], None] | None = None

    def run_from_argv(self, argv: list[str]) -> None:
        """Called by ``manage.py``, which ends with this command; ``call_command`` does not."""
        self._has_own_process = True
        if sys.stderr is None:  # closed, as by ``2>&-``: what is said there is said to nobody
            self.stderr = OutputWrapper(io.StringIO())
        try:
            super().run_from_argv(argv)
        except SystemExit as ending:
            _discard_unwritable()
            if self._calls_run_on:
                # A normal exit would wait for them, in threads or in processes of the standard
                # library's kind.
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(ending.code if isinstance(ending.code, int) else 1)
            raise

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the subcommands."""
        subcommands = parser.add_subparsers(
            dest="subcommand", metavar="SUBCOMMAND", required=True, parser_class=SubcommandParser
        )
        run = subcommands.add_parser(
            "run",
            help="call one function, once for each argument, at the same time",
            description="Call a function in leased workers: once for each ARG, all within one "
            "lease, at most one call per worker at a time. Results are printed in order.",
        )
        add_common_options(run)
        run.set_defaults(handle_subcommand=self.handle_run)
        run.add_argument("function", metavar="DOTTED.PATH", help="such as shop.scoring.score")
        run.add_argument(
            "arguments",
            metavar="ARG",
            nargs="*",
            help="one call with this argument: JSON where it parses as JSON, else the text itself; "
            "one that begins with '-' and is no number such as -5 or -0.5 goes after '--', or into "
            "--args; without any there is one call without arguments",
        )
        run.add_argument(
            "--args",
            dest="lists",
            metavar="'[...]'",
            action="append",
            default=[],
            help="one call with these positional arguments, a JSON list; repeat for more calls",
        )
        run.add_argument(
            "--kwargs",
            action=Once,
            metavar="'{...}'",
            help="keyword arguments for every call, a JSON object",
        )
        run.add_argument(
            "--pool", default="default", metavar="ALIAS", help="which pool of settings.LEASEPOOL"
        )
        run.add_argument(
            "--workers",
            type=to_count,
            metavar="N",
            help="how many workers to lease (default: a whole pool)",
        )
        run.add_argument(
            "--timeout",
            type=to_seconds,
            metavar="SECONDS",
            help="stop a call that runs longer (default: the pool's CALL_TIMEOUT)",
        )
        run.add_argument(
            "--acquire-timeout",
            type=to_seconds,
            metavar="SECONDS",
            help="how long to wait for a lease (default: the pool's ACQUIRE_TIMEOUT)",
        )
        run.add_argument(
            "--json",
            dest="as_json",
            action="store_true",
            help="print one JSON object a line; what the function prints goes to standard error",
        )
        run.add_argument("--no-progress", action="store_true", help="draw no progress bar")
        run.add_argument(
            "--compare-serial",
            action="store_true",
            help="afterwards make the same calls one by one in this process and compare the times",
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Hand over to the subcommand."""
        options["handle_subcommand"](options)

    def handle_run(self, options: dict[str, Any]) -> None:
        """``leasepool run``: refuse what could never run, make the calls, report."""
        # Not sys.stdout: whoever calls the command may have given it another stream.
        if self.stdout._out is None:  # private: there is no other way to ask what it writes to
            raise CommandError("The results cannot be written: standard output is closed.")
        path: str = options["function"]
        try:
            fn = find_function(path)
            calls = parse_calls(options["arguments"], options["lists"], options["kwargs"])
            if not (options["arguments"] or options["lists"]):
                check_bare_call(fn, path, calls[0].kwargs)
            manager = _manager(options["pool"], options["workers"])
        except (ValueError, UnknownAliasError, ImproperlyConfigured) as mistake:
            raise CommandError(str(mistake), returncode=_USAGE_MISTAKE) from mistake
        backend = resolve(manager.backend)
        report = Report(
            path.rpartition(".")[2],
            calls,
            self.stdout,
            self.stderr,
            as_json=options["as_json"],
            progress=self.stderr.isatty()
            and not options["no_progress"]
            and options["verbosity"] > 0,
        )
        # What is printed in this process: by threads, and while comparing.
        apart = options["as_json"] and self._has_own_process
        with (
            self._stopped_by_signals(report, backend),
            self._stopped_by_broken_output(report, backend),
            contextlib.redirect_stdout(sys.stderr) if apart else contextlib.nullcontext(),
        ):
            seconds = self._run_on_loop(
                self._run_leased(manager, backend, path, calls, options, report)
            )
            if options["compare_serial"]:
                self._compare(path, calls, options, report, seconds)
        if report.failed:
            raise CommandError(f"{report.failed} of {len(calls)} calls failed.")

    def _compare(
        self,
        path: str,
        calls: Sequence[Call],
        options: dict[str, Any],
        report: Report,
        seconds: float,
    ) -> None:
        """Make the calls again in this process, where nothing limits their time or a crash."""
        if report.failed:
            report.no_comparison("calls failed")
            return
        start = time.perf_counter()
        for call in calls:
            failure = run_call(path, call, prints_to_stderr=options["as_json"]).failure
            if failure is not None:
                report.no_comparison(
                    f"in this process {report.text(call)} failed: "
                    f"{failure.type_name}: {failure.message}"
                )
                raise CommandError("The serial calls failed.")
        report.comparison(seconds=seconds, serial_seconds=time.perf_counter() - start)

    async def _run_leased(
        self,
        manager: LeasedExecutorManager,
        backend: type[Backend],
        path: str,
        calls: Sequence[Call],
        options: dict[str, Any],
        report: Report,
    ) -> float:
        """Make the calls within one lease and return the seconds they took together."""
        was_running = manager.started
        try:
            start = time.perf_counter()
            await manager.start()
            async with manager.lease(
                owner=f"manage.py leasepool run {path}",
                lease_seconds=math.inf,
                timeout=options["acquire_timeout"],
                workers=options["workers"],
            ) as lease:
                leased = time.perf_counter()
                async with asyncio.TaskGroup() as tasks:
                    for index, call in enumerate(calls):
                        tasks.create_task(
                            self._run_one(lease, backend, path, index, call, options, report)
                        )
                seconds = time.perf_counter() - leased
        except LeasePoolError as error:
            report.close()
            if isinstance(error, WorkerStartError) and error.traceback_text:
                self.stderr.write(error.traceback_text)
            raise CommandError(f"{type_name(error)}: {error}") from error
        finally:
            report.close()
            if not was_running:
                await manager.stop(grace=0)
        if options["verbosity"]:
            report.summary(
                seconds=seconds,
                start_seconds=leased - start,
                workers=lease.workers,
                pool=options["pool"],
            )
        return seconds

    async def _run_one(
        self,
        lease: ExecutorLease,
        backend: type[Backend],
        path: str,
        index: int,
        call: Call,
        options: dict[str, Any],
        report: Report,
    ) -> None:
        as_json: bool = options["as_json"]
        timeout: float | None = options["timeout"]
        within = lease if timeout is None else lease.options(call_timeout=timeout)
        try:
            outcome = await within.run(run_call, path, call, prints_to_stderr=as_json)
        except Exception as error:  # noqa: BLE001 - one call's error must not hide the others
            if isinstance(error, CallTimeoutError):
                self._calls_run_on |= not backend.supports_kill
            pid: int | None = getattr(error, "pid", None)
            outcome = Outcome(path, pid, None, failure=failure_of(error, path, call, backend))
        report.add(index, outcome)

    def _run_on_loop(self, work: Coroutine[Any, Any, float]) -> float:
        """Run ``work``; ``KeyboardInterrupt``, once it has ended, if signals asked for that.

        Signals cancel it, and only once: an exception that a signal handler raises between two
        steps of the loop may undo one of them, and what was to follow never comes. Only where the
        loop does not turn to that, as while nobody reads what it writes, one is raised.
        """
        asked_at: float | None = None
        heard = False

        async def cancellable() -> float:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None

            def cancel_now() -> None:
                nonlocal heard
                heard = True
                task.cancel()

            def cancel() -> None:
                nonlocal asked_at
                if asked_at is None:
                    asked_at = time.monotonic()
                    with contextlib.suppress(RuntimeError):  # just closed
                        loop.call_soon_threadsafe(cancel_now)
                elif time.monotonic() - asked_at > (_SLOW if heard else _DEAF):
                    raise KeyboardInterrupt

            self._cancel_calls = cancel
            return await work

        main = cancellable()
        try:
            seconds = asyncio.run(main)
        except asyncio.CancelledError:
            if asked_at is None:
                raise
        finally:
            if asked_at is None:  # else more signals go on to change nothing
                self._cancel_calls = None
            for one in (main, work):
                one.close()  # if it has not begun
        if asked_at is not None:
            raise KeyboardInterrupt
        return seconds

    @contextlib.contextmanager
    def _stopped_by_signals(self, report: Report, backend: type[Backend]) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into one line and an exit status."""
        status = 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal status
            # SIGTERM also where both came at once, whichever is handled first.
            status = _TERMINATED if number == signal.SIGTERM else status or _INTERRUPTED
            if self._cancel_calls is not None:
                self._cancel_calls()
            else:
                signal.default_int_handler(number, frame)

        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, handle)
            # Where Ctrl-C is ignored, as in a background job, or somebody else's, it stays so.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                previous[signal.SIGINT] = signal.signal(signal.SIGINT, handle)
        try:
            yield
        except KeyboardInterrupt:
            # The end is near, and a second signal would only change how it looks.
            if self._has_own_process:
                for which in (signal.SIGINT, signal.SIGTERM):
                    # One that has arrived and was not handled yet needs a handler.
                    signal.signal(which, _nothing)
                    signal.signal(which, signal.SIG_IGN)
                previous.clear()
            what = "Terminated" if status == _TERMINATED else "Interrupted"
            report.last_words(f"{what}: the work was stopped.")
            self._leave(backend, status or _INTERRUPTED)
        finally:
            self._cancel_calls = None
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _stopped_by_broken_output(self, report: Report, backend: type[Backend]) -> Iterator[None]:
        """End when results cannot be written; quietly where nobody reads, as in ``… | head -1``."""
        try:
            yield
        except* OutputError:
            report.close()
        match report.broken:
            case BrokenPipeError():
                self._leave(backend, _OUTPUT_CLOSED)
            case OSError() as error:
                self._calls_run_on |= not backend.supports_kill
                why = error.strerror or error
                raise CommandError(f"The results cannot be written: {why}.") from error

    def _leave(self, backend: type[Backend], status: int) -> NoReturn:
        """End with ``status``; ``run_from_argv`` sees to it that calls which run on are left."""
        self._calls_run_on |= not backend.supports_kill
        sys.exit(status)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal that no longer matters."""


def _discard_unwritable() -> None:
    """Let go of what cannot be written: Python tries once more when it ends, and would complain."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _manager(alias: str, workers: int | None) -> LeasedExecutorManager:
    """The manager of ``alias``, not started; ``ValueError`` when it cannot give the workers."""
    manager = pools[alias]
    if workers is not None and workers > manager.workers_per_pool:
        raise ValueError(
            f"--workers {workers} is more than the {manager.workers_per_pool} workers of a pool "
            f"of {alias!r}; a lease is part of one pool."
        )
    return manager
