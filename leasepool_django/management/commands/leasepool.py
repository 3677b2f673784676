"""``manage.py leasepool``: ``run`` and ``map`` call a function in leased workers.

``status`` shows what the pools of running processes are doing.

Exit status: 0 when every call succeeded, 1 when one failed or no worker could be had, 2 for a
mistake on the command line or in the input (found before any worker starts, unless the input is a
pipe), 130 and 143 after Ctrl-C and SIGTERM, 141 when nobody reads the results any more.

Long because it says what the options of all three mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser, OutputWrapper

from ...backends.base import Backend, resolve
from ...backends.process.texts import type_name
from ...conf import project_name
from ...engine import ExecutorLease, LeasedExecutorManager
from ...exceptions import CallTimeoutError, LeasePoolError, UnknownAliasError, WorkerStartError
from ...handler import pools
from ...status import Answer, ask_all, supported
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
from ..mapping import FileError, Lines, map_lines
from ..overview import Overview
from ..parsing import Once, SubcommandParser, add_common_options, to_count, to_seconds
from ..report import MapReport, Printer, Report
from ..results import Results
from ..stopping import INTERRUPTED, StoppableCommand

_USAGE_MISTAKE = 2
_WATCH_SECONDS = 1.0
# For each worker, how many lines may be under way, from being read to being written.
_LINES_A_WORKER = 16


class Command(StoppableCommand):
    """``manage.py leasepool``, one method for each subcommand."""

    help = "Run functions of the project in leased workers, or show what workers are doing."

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

        status = subcommands.add_parser(
            "status",
            help="show what the pools of this project's running processes are doing",
            description="Show the processes that use pools with the same settings module: their "
            "workers and the calls these run, leases, and who waits. Linux only.",
        )
        add_common_options(status)
        status.set_defaults(handle_subcommand=self.handle_status)
        status.add_argument("--pool", metavar="ALIAS", help="show only this one")
        status.add_argument(
            "--watch",
            metavar="SECONDS",
            type=to_seconds,
            nargs="?",
            const=_WATCH_SECONDS,
            help="show it again and again, until Ctrl-C; each second, or as often as is said",
        )
        status.add_argument(
            "--json",
            dest="as_json",
            action="store_true",
            help="one line of JSON: a list with an object for each process",
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Hand over to the subcommand."""
        options["handle_subcommand"](options)

    def handle_run(self, options: dict[str, Any]) -> None:
        """``leasepool run``: refuse what could never run, make the calls, report."""
        self._require_stdout()
        path: str = options["function"]
        with _mistakes():
            fn = find_function(path)
            calls = parse_calls(options["arguments"], options["lists"], options["kwargs"])
            if not (options["arguments"] or options["lists"]):
                check_call(fn, path, "without an ARG or --args", calls[0])
            manager = _manager(options["pool"], options["workers"])
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
                outcome = await self._outcome(
                    lease, backend, path, call, options, prints_to_stderr=options["as_json"]
                )
                report.add(index, outcome)

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
        with _mistakes():
            fn = find_function(path)
            kwargs = parse_kwargs(options["kwargs"])
            check_call(fn, path, "with the value of a line", Call((None,), kwargs))
            manager = _manager(options["pool"], options["workers"])
        backend = resolve(manager.backend)
        name = path.rpartition(".")[2]
        progress = self._draws_progress(options)
        report = MapReport(name, self.stdout, self.stderr, progress=progress)
        with (
            self.stopped_by_signals(report, backend),
            self.stopped_by_broken_output(report, backend),
            contextlib.redirect_stdout(sys.stderr)
            if self.has_own_process
            else contextlib.nullcontext(),
            contextlib.ExitStack() as opened,
        ):
            with _mistakes():
                lines = self._open_files(options, report, opened)
                total = lines.check()
                if report.results is not None:
                    opened.enter_context(report.results)
                report.begin(total)

            async def run(lease: ExecutorLease, call: Call) -> Outcome:
                return await self._outcome(
                    lease, backend, path, call, options, prints_to_stderr=True
                )

            async def run_all(lease: ExecutorLease) -> None:
                at_once = _LINES_A_WORKER * lease.workers
                await map_lines(lines, partial(run, lease), report.add, kwargs, at_once=at_once)

            try:
                self.run_on_loop(self._within_lease(manager, path, options, report, run_all))
            except FileError as error:
                raise CommandError(str(error), returncode=_USAGE_MISTAKE) from error
        if report.failed:
            raise CommandError(f"{report.failed} of {report.written} calls failed.")

    def handle_status(self, options: dict[str, Any]) -> None:
        """``leasepool status``: ask those that run, and show what they say."""
        self._require_stdout()
        if not supported():
            raise CommandError("The state of other processes can be seen on Linux only.")
        if options["pool"] is not None:
            with _mistakes():
                pools[options["pool"]]  # is there such a one?
        seconds: float | None = options["watch"]
        overview = Overview(
            self.stdout,
            self.stderr,
            as_json=options["as_json"],
            pool=options["pool"],
            redraws=seconds is not None and self.stdout.isatty() and _can_redraw(options),
        )
        project = project_name()
        nobody = (
            f"No process with the settings {project!r} uses its pools. They start with the server "
            "where it has a lifespan, or else when they are first used."
        )
        with self.stopped_by_broken_output(overview):
            if seconds is None:
                try:
                    answers = _ask(project)
                except KeyboardInterrupt:
                    sys.exit(INTERRUPTED)
                overview.show(answers)
                if not answers:
                    raise CommandError(nobody)
                if all(answer.trouble for answer in answers):
                    raise CommandError("No process told its state.")
                return
            with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                while True:
                    overview.show(_ask(project), nobody)
                    time.sleep(seconds)

    def _open_files(
        self, options: dict[str, Any], report: MapReport, opened: contextlib.ExitStack
    ) -> Lines:
        """The lines of ``--input``; ``report`` is told of ``--output``."""
        fd, name = self._open_input(options["input"], opened)
        read = os.fstat(fd)
        if options["output"] in {None, "-"}:
            if options["overwrite"] or options["resume"]:
                raise ValueError("--overwrite and --resume are about a file: name it, --output.")
            self._require_stdout()
            written = _status(self.stdout)
            if written and stat.S_ISREG(read.st_mode) and os.path.samestat(read, written):
                raise ValueError(f"Standard output goes to {name}, which is read from.")
            return Lines(fd, name)
        if not options["output"]:
            raise ValueError("--output needs the name of a file.")
        path = Path(options["output"])
        if path.exists() and stat.S_ISREG(read.st_mode) and os.path.samestat(read, path.stat()):
            raise ValueError(f"{path} is the input; the results need another file.")
        report.results = Results(path, overwrite=options["overwrite"], resume=options["resume"])
        return Lines(fd, name, behind=report.results.behind)

    def _open_input(self, name: str, opened: contextlib.ExitStack) -> tuple[int, str]:
        """The descriptor to read lines from, and what to call it."""
        if not name:
            raise ValueError("--input needs the name of a file.")
        if name != "-":
            return opened.enter_context(Path(name).open("rb")).fileno(), name
        if sys.stdin is None:
            raise ValueError("Standard input is closed: name a file, --input.")
        try:
            given = sys.stdin.fileno()
        except (OSError, AttributeError) as error:
            raise ValueError("Standard input has no descriptor: name a file, --input.") from error
        fd = os.dup(given)
        opened.callback(os.close, fd)
        if self.has_own_process:  # what functions start here must not eat the lines
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, given)
            os.close(nothing)
        return fd, "standard input"

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
        *,
        prints_to_stderr: bool,
    ) -> Outcome:
        """Make one call. Its error must not hide the others' results, so that is an outcome too."""
        timeout: float | None = options["timeout"]
        within = lease if timeout is None else lease.options(call_timeout=timeout)
        try:
            return await within.run(run_call, path, call, prints_to_stderr=prints_to_stderr)
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


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Turn what is wrong with the command line or the files into a sentence and exit status 2."""
    try:
        yield
    except (ValueError, OSError, UnknownAliasError, ImproperlyConfigured) as mistake:
        text = str(mistake)
        if isinstance(mistake, OSError) and mistake.filename is not None:
            text = f"{mistake.filename} cannot be used: {mistake.strerror}."
        raise CommandError(text, returncode=_USAGE_MISTAKE) from mistake


def _status(stream: OutputWrapper) -> os.stat_result | None:
    """What the system says of the file behind ``stream``, if there is one."""
    try:
        return os.fstat(stream.fileno())
    except (OSError, AttributeError):
        return None


def _can_redraw(options: dict[str, Any]) -> bool:
    return not options["no_color"] and os.environ.get("TERM", "dumb") != "dumb"


def _ask(project: str) -> list[Answer]:
    try:
        return ask_all(project)
    except OSError as error:
        raise CommandError(f"Which processes there are cannot be read: {error}.") from error


def _manager(alias: str, workers: int | None) -> LeasedExecutorManager:
    """The manager of ``alias``, not started; ``ValueError`` when it cannot give the workers."""
    manager = pools[alias]
    if workers is not None and workers > manager.workers_per_pool:
        raise ValueError(
            f"--workers {workers} is more than the {manager.workers_per_pool} workers of a pool "
            f"of {alias!r}; a lease is part of one pool."
        )
    return manager
