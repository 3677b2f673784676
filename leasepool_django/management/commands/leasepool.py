"""``manage.py leasepool run`` and ``leasepool map``: call a function in leased workers.

Exit status: 0 when every call succeeded, 1 when one failed or no worker could be had, 2 for a
mistake on the command line or in the input (found before any worker starts, unless the input is a
pipe), 130 and 143 after Ctrl-C and SIGTERM, 141 when nobody reads the results any more.

Long because most of it says what the options mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser

from ...backends.base import Backend, resolve
from ...backends.process.texts import type_name
from ...engine import ExecutorLease, LeasedExecutorManager
from ...exceptions import CallTimeoutError, LeasePoolError, UnknownAliasError, WorkerStartError
from ...handler import pools
from ..calls import (
    Call,
    Outcome,
    check_call,
    find_function,
    parse_calls,
    parse_kwargs,
    run_call,
)
from ..failures import failure_of
from ..mapping import FileError, Lines, Results, map_lines
from ..parsing import Once, SubcommandParser, add_common_options, to_count, to_seconds
from ..report import MapReport, Printer, Report
from ..stopping import StoppableCommand

_USAGE_MISTAKE = 2
# For each worker, how many lines may be under way, from being read to being written.
_LINES_A_WORKER = 16


class Command(StoppableCommand):
    """``manage.py leasepool``, one method for each subcommand."""

    help = "Run functions of the project in leased workers."

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
        _add_options(run, self.handle_run)
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
            "--json",
            dest="as_json",
            action="store_true",
            help="print one JSON object a line; what the function prints goes to standard error",
        )
        run.add_argument(
            "--compare-serial",
            action="store_true",
            help="afterwards make the same calls one by one in this process and compare the times",
        )

        map_ = subcommands.add_parser(
            "map",
            help="call one function for each line of a file, and write the results to another",
            description="Call a function in leased workers for each line of JSON, within one "
            "lease. The results are written in the order of the lines, each as one line of JSON. "
            "Neither the input nor the results have to fit into memory.",
        )
        _add_options(map_, self.handle_map)
        map_.add_argument(
            "--input",
            metavar="FILE",
            default="-",
            help="JSON values, one a line; each is the argument of one call (default: standard "
            "input)",
        )
        map_.add_argument(
            "--output",
            metavar="FILE",
            help="write the results there, and not to standard output; it must not exist",
        )
        existing = map_.add_mutually_exclusive_group()
        existing.add_argument(
            "--overwrite", action="store_true", help="replace the output file if it exists"
        )
        existing.add_argument(
            "--resume",
            action="store_true",
            help="go on behind the last line that the output file has a result of",
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Hand over to the subcommand."""
        options["handle_subcommand"](options)

    def handle_run(self, options: dict[str, Any]) -> None:
        """``leasepool run``: refuse what could never run, make the calls, report."""
        self._require_stdout()
        path: str = options["function"]
        try:
            fn = find_function(path)
            calls = parse_calls(options["arguments"], options["lists"], options["kwargs"])
            if not (options["arguments"] or options["lists"]):
                check_call(fn, path, "without an ARG or --args", calls[0])
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
            progress=self._draws_progress(options),
        )
        # What is printed in this process: by threads, and while comparing.
        apart = options["as_json"] and self.has_own_process
        with (
            self.stopped_by_signals(report, backend),
            self.stopped_by_broken_output(report, backend),
            contextlib.redirect_stdout(sys.stderr) if apart else contextlib.nullcontext(),
        ):

            async def run_all(lease: ExecutorLease) -> None:
                async with asyncio.TaskGroup() as tasks:
                    for index, call in enumerate(calls):
                        tasks.create_task(run_one(lease, index, call))

            async def run_one(lease: ExecutorLease, index: int, call: Call) -> None:
                report.add(index, await self._outcome(lease, backend, path, call, options))

            seconds = self.run_on_loop(self._within_lease(manager, path, options, report, run_all))
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

    def handle_map(self, options: dict[str, Any]) -> None:
        """``leasepool map``: as ``run``, for each line of the input."""
        path: str = options["function"]
        results: Results | None = None
        with contextlib.ExitStack() as opened:
            try:
                fn = find_function(path)
                kwargs = parse_kwargs(options["kwargs"])
                check_call(fn, path, "with the value of a line", Call((None,), kwargs))
                manager = _manager(options["pool"], options["workers"])
                source = _open_input(options["input"], opened)
                if options["output"] is not None:
                    results = _results(options)
                elif options["overwrite"] or options["resume"]:
                    raise ValueError(
                        "--overwrite and --resume are about a file: name it, --output."
                    )
                else:
                    self._require_stdout()
                lines = Lines(*source, behind=results.behind if results is not None else 0)
            except (ValueError, OSError, UnknownAliasError, ImproperlyConfigured) as mistake:
                raise CommandError(_sentence(mistake), returncode=_USAGE_MISTAKE) from mistake
            backend = resolve(manager.backend)
            report = MapReport(
                path.rpartition(".")[2],
                self.stdout,
                self.stderr,
                progress=self._draws_progress(options),
            )

            async def run_all(lease: ExecutorLease) -> None:
                if results is not None and report.file is not None:
                    results.begin(report.file)
                await map_lines(
                    lines,
                    lambda call: self._outcome(lease, backend, path, call, options),
                    report.add,
                    kwargs,
                    at_once=_LINES_A_WORKER * lease.workers,
                )

            try:
                with (
                    self.stopped_by_signals(report, backend),
                    self.stopped_by_broken_output(report, backend),
                    contextlib.redirect_stdout(sys.stderr)
                    if self.has_own_process
                    else contextlib.nullcontext(),
                ):
                    total = lines.check()
                    if results is not None:
                        report.file = opened.enter_context(results.open())
                    report.begin(total)
                    self.run_on_loop(self._within_lease(manager, path, options, report, run_all))
            except BaseException as error:
                report.close()
                if results is not None and report.file is not None and not report.written:
                    results.forget()
                if isinstance(error, FileError):
                    raise CommandError(str(error), returncode=_USAGE_MISTAKE) from error
                raise
        if report.failed:
            raise CommandError(f"{report.failed} of {report.written} calls failed.")

    def _require_stdout(self) -> None:
        # Not sys.stdout: whoever calls the command may have given it another stream.
        if self.stdout._out is None:  # private: there is no other way to ask what it writes to
            raise CommandError("The results cannot be written: standard output is closed.")

    def _draws_progress(self, options: dict[str, Any]) -> bool:
        wanted = not options["no_progress"] and options["verbosity"] > 0
        return wanted and self.stderr.isatty()

    async def _within_lease(
        self,
        manager: LeasedExecutorManager,
        path: str,
        options: dict[str, Any],
        report: Printer,
        work: Callable[[ExecutorLease], Awaitable[None]],
    ) -> float:
        """Do ``work`` with one lease and return the seconds it took."""
        was_running = manager.started
        try:
            start = time.perf_counter()
            await manager.start()
            async with manager.lease(
                owner=f"manage.py leasepool {options['subcommand']} {path}",
                lease_seconds=math.inf,
                timeout=options["acquire_timeout"],
                workers=options["workers"],
            ) as lease:
                leased = time.perf_counter()
                await work(lease)
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
        if options["verbosity"] > 0:
            report.summary(
                seconds=seconds,
                start_seconds=leased - start,
                workers=lease.workers,
                pool=options["pool"],
            )
        return seconds

    async def _outcome(
        self,
        lease: ExecutorLease,
        backend: type[Backend],
        path: str,
        call: Call,
        options: dict[str, Any],
    ) -> Outcome:
        """Make one call. Its error must not hide the others' results, so that is an outcome too."""
        timeout: float | None = options["timeout"]
        within = lease if timeout is None else lease.options(call_timeout=timeout)
        # Where the results are JSON, nothing else may come in between.
        apart: bool = options.get("as_json", True)
        try:
            return await within.run(run_call, path, call, prints_to_stderr=apart)
        except Exception as error:  # noqa: BLE001 - as said above
            if isinstance(error, CallTimeoutError):
                self.calls_run_on |= not backend.supports_kill
            pid: int | None = getattr(error, "pid", None)
            return Outcome(path, pid, None, failure=failure_of(error, path, call, backend))


def _add_options(parser: CommandParser, handle: Callable[[dict[str, Any]], None]) -> None:
    """What both subcommands take."""
    add_common_options(parser)
    parser.set_defaults(handle_subcommand=handle)
    parser.add_argument("function", metavar="DOTTED.PATH", help="such as shop.scoring.score")
    parser.add_argument(
        "--kwargs",
        action=Once,
        metavar="'{...}'",
        help="keyword arguments for every call, a JSON object",
    )
    parser.add_argument(
        "--pool", default="default", metavar="ALIAS", help="which pool of settings.LEASEPOOL"
    )
    parser.add_argument(
        "--workers",
        type=to_count,
        metavar="N",
        help="how many workers to lease (default: a whole pool)",
    )
    parser.add_argument(
        "--timeout",
        type=to_seconds,
        metavar="SECONDS",
        help="stop a call that runs longer (default: the pool's CALL_TIMEOUT)",
    )
    parser.add_argument(
        "--acquire-timeout",
        type=to_seconds,
        metavar="SECONDS",
        help="how long to wait for a lease (default: the pool's ACQUIRE_TIMEOUT)",
    )
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")


def _open_input(name: str, opened: contextlib.ExitStack) -> tuple[int, str]:
    """The descriptor to read lines from, and what to call it."""
    if name != "-":
        return opened.enter_context(Path(name).open("rb")).fileno(), name
    if sys.stdin is None:
        raise ValueError("Standard input is closed: name a file, --input.")
    return sys.stdin.fileno(), "standard input"


def _results(options: dict[str, Any]) -> Results:
    path = Path(options["output"])
    if options["input"] != "-" and path.exists() and path.samefile(options["input"]):
        raise ValueError(f"{path} is the input; the results need another file.")
    return Results(path, overwrite=options["overwrite"], resume=options["resume"])


def _sentence(mistake: Exception) -> str:
    if isinstance(mistake, OSError) and mistake.filename is not None:
        return f"{mistake.filename} cannot be used: {mistake.strerror}."
    return str(mistake)


def _manager(alias: str, workers: int | None) -> LeasedExecutorManager:
    """The manager of ``alias``, not started; ``ValueError`` when it cannot give the workers."""
    manager = pools[alias]
    if workers is not None and workers > manager.workers_per_pool:
        raise ValueError(
            f"--workers {workers} is more than the {manager.workers_per_pool} workers of a pool "
            f"of {alias!r}; a lease is part of one pool."
        )
    return manager
