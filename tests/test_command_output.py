"""``manage.py leasepool run`` where results, errors, arguments or the output itself are awkward."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from django.core.management import call_command
from django.core.management.base import OutputWrapper

from leasepool_django.management.calls import Call, Outcome
from leasepool_django.management.commands.leasepool import Command
from leasepool_django.management.report import Report
from tests.command_jobs import RUNNING, STARTED, nested
from tests.test_command import (
    JOBS,
    command,
    exists,
    interruptible,  # noqa: F401 - a fixture for every test of this module too
    json_lines,
    meeting,  # noqa: F401 - as above
    pids,
    run,
    running,
)
from tests.waiting import wait_until


class TestWhatCannotBeShown:
    def test_a_result_without_a_repr_hides_no_other_result(self) -> None:
        done = run("math.factorial", "3", "2000", "4")
        assert done.returncode == 0, done.stderr
        first, second, third, _ = done.stdout.splitlines()
        assert first.startswith("factorial(3) = 6  (worker ")
        assert second.startswith("factorial(2000) = <int: cannot be shown: ValueError: Exceeds ")
        assert third.startswith("factorial(4) = 24  (worker ")
        assert done.stderr == ""

    def test_nor_does_it_end_the_json_lines(self) -> None:
        done = run("math.factorial", "2000", "4", "--json")
        first, second = json_lines(done.stdout)
        assert first["result_repr"].startswith("<int: cannot be shown: ValueError: Exceeds ")
        assert second["result"] == 24

    @pytest.mark.parametrize("option", [[], ["--json"]])
    def test_a_repr_that_raises_is_told(self, option: list[str]) -> None:
        done = run(f"{JOBS}.unshowable", *option)
        assert done.returncode == 0, done.stderr
        shown = "<tests.command_jobs.Unshowable: cannot be shown: LookupError: nothing to show>"
        assert shown in done.stdout

    def test_arguments_nested_too_deeply_for_json_are_shown_as_python_shows_them(self) -> None:
        out = io.StringIO()
        deep = Call((nested(100_000),), {})
        stdout, stderr = OutputWrapper(out), OutputWrapper(io.StringIO())
        report = Report("double", [deep], stdout, stderr, as_json=True, progress=False)
        report.add(0, Outcome("double", 1, 0.5, 2))
        line = json.loads(out.getvalue())
        assert line["args_repr"].startswith("<tuple: cannot be shown: RecursionError: ")
        assert "args" not in line
        assert line["kwargs"] == {}
        assert line["result"] == 2

    def test_characters_that_the_output_lacks_are_escaped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        done = run(f"{JOBS}.double", '"\u00e9\u20ac"')
        assert done.returncode == 0, done.stderr
        assert r"double('\xe9\u20ac') = '\xe9\u20ac\xe9\u20ac'" in done.stdout

    def test_a_terminal_is_told_what_to_show_and_not_what_to_do(self) -> None:
        done = run(f"{JOBS}.fail_in_red")
        text = "ValueError: \\x1b[31mred\\x00\\rand\tover\ntwo lines"
        assert f"fail_in_red() failed: {text}  (worker " in done.stdout
        assert done.stderr.count(text) == 1

    def test_an_exception_may_say_nothing(self) -> None:
        done = run(f"{JOBS}.fail_without_a_word")
        assert "fail_without_a_word() failed: LookupError  (worker " in done.stdout

    def test_an_exception_without_a_text_is_an_ordinary_failure(self) -> None:
        done = run(f"{JOBS}.fail_mutely")
        assert done.returncode == 1
        assert "fail_mutely() failed: tests.command_jobs.MuteError: <its str() raised" in (
            done.stdout
        )
        assert re.search(r"fail_mutely\(\) failed in worker \d+:\nTraceback", done.stderr)
        assert "leasepool_django" not in done.stderr


class TestWhatCannotTravel:
    def test_arguments_nested_too_deeply_are_the_arguments_fault(self) -> None:
        """Some are refused by pickle, on Python 3.11 at least; JSON takes them all."""
        done = run(f"{JOBS}.double", *("[" * depth + "]" * depth for depth in (400, 800, 900)))
        assert done.returncode in {0, 1}, done.stderr
        assert "management.calls" not in done.stdout + done.stderr
        failures = re.findall(r"failed: (.*)", done.stdout)
        begin = f"NotPicklableError: The arguments of {JOBS}.double cannot be sent to a worker: "
        assert [text for text in failures if not text.startswith(begin)] == []

    def test_a_result_nested_too_deeply_is_told_in_the_engines_words(self) -> None:
        done = run(f"{JOBS}.nested", "2", "100000")
        assert done.returncode == 1
        assert "nested(2) = [[[]]]" in done.stdout
        assert (
            f"nested(100000) failed: NotPicklableError: The result of {JOBS}.nested cannot be sent "
            "back from the worker: result is nested too deeply to be pickled. Send a flatter "
            "structure.  (worker "
        ) in done.stdout
        assert "management" not in done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("pool", "function", "failure"),
        [
            ("default", "lock", "NotPicklableError"),
            ("default", "leave", "SystemExit"),
            ("default", "interrupt_itself", "KeyboardInterrupt"),
            ("stdlib", "lock", "NotPicklableError"),
            ("stdlib", "leave", "SystemExit"),
        ],
    )
    def test_the_worker_is_known_whatever_went_wrong_in_it(
        self, pool: str, function: str, failure: str
    ) -> None:
        arguments = ["3"] if function == "leave" else []
        done = run(f"{JOBS}.{function}", *arguments, "--pool", pool)
        assert done.returncode == 1
        assert re.search(rf"\) failed: {failure}.*  \(worker \d+, [\d.]+ s\)", done.stdout)
        assert re.search(r"\) failed in worker \d+:\n", done.stderr)
        assert "leasepool_django" not in done.stderr

    def test_a_result_that_cannot_be_rebuilt_is_told_without_internal_names(self) -> None:
        done = run(f"{JOBS}.make_in_worker")
        assert done.returncode == 1
        assert (
            f"NotPicklableError: The result of {JOBS}.make_in_worker cannot be unpickled here: "
            "LookupError: there is none here"
        ) in done.stdout

    @pytest.mark.parametrize("pool", ["default", "stdlib"])
    def test_memory_travels_as_it_is(self, pool: str) -> None:
        (line,) = json_lines(run(f"{JOBS}.filled", "100000", "--json", "--pool", pool).stdout)
        assert line["result_repr"] == repr(bytearray(b"x") * 100_000)

    def test_views_travel(self) -> None:
        done = run(f"{JOBS}.view", "100000")
        assert "view(100000) = <memory at " in done.stdout


class TestComparison:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("fail_on_odd", "1", "2"),
            ("leave", "0"),
            ("die_on_odd", "3"),
            ("hang_on_odd", "1", "2", "--timeout", "0.5"),
        ],
    )
    def test_calls_that_failed_are_not_made_again(self, arguments: tuple[str, ...]) -> None:
        function, *rest = arguments
        done = run(f"{JOBS}.{function}", *rest, "--compare-serial")
        assert done.returncode == 1
        assert "Not compared with doing it serially: calls failed.\n" in done.stderr
        assert "one after the other" not in done.stdout

    def test_a_call_that_fails_here_only_is_a_failure(self) -> None:
        done = run(f"{JOBS}.leave_outside_workers", "--compare-serial")
        assert done.returncode == 1
        assert done.stderr == (
            "Not compared with doing it serially: in this process leave_outside_workers() failed: "
            "SystemExit: 0.\nCommandError: The serial calls failed.\n"
        )

    @pytest.mark.parametrize("pool", ["default", "threads"])
    def test_what_the_function_prints_here_stays_out_of_the_json(self, pool: str) -> None:
        done = run(f"{JOBS}.say", "hello", "--json", "--compare-serial", "--pool", pool)
        assert len(json_lines(done.stdout)) == 2
        assert done.stderr.count("hello") == 2

    def test_a_reader_that_leaves_before_the_last_line_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        with running(f"{JOBS}.wait_outside_workers", "read", "--compare-serial") as process:
            wait_until(lambda: process.pid in pids(tmp_path, RUNNING))
            assert process.stdout is not None
            assert process.stdout.readline().startswith("wait_outside_workers('read') = None")
            assert process.stdout.readline().startswith("1 call on 2 workers")
            process.stdout.close()
            (tmp_path / "read").touch()
            assert process.stderr is not None
            assert process.stderr.read() == ""
            assert process.wait(timeout=30) == 141


class TestTimes:
    def test_waiting_for_all_workers_of_the_lease_counts_as_starting_them(self) -> None:
        done = run(f"{JOBS}.double", "1", "--pool", "uneven")
        found = re.search(r": ([\d.]+) s, after ([\d.]+) s to start the workers\.", done.stdout)
        assert found is not None, done.stderr
        assert float(found[2]) >= 1

    @pytest.mark.parametrize(
        ("pool", "backend"),
        [("threads", "thread"), ("stdlib", "concurrent.futures.process.ProcessPoolExecutor")],
    )
    def test_a_call_that_cannot_be_stopped_is_told_and_left(
        self, pool: str, backend: str, tmp_path: Path
    ) -> None:
        """The command ends, and the call with it."""
        done = run(f"{JOBS}.burn", "1", "--pool", pool, "--timeout", "0.3")
        assert done.returncode == 1
        assert (
            f"burn(1) failed: CallTimeoutError: took longer than 0.3 s (the backend '{backend}' "
            "cannot stop it)\n"
        ) in done.stdout
        assert "CommandError: 1 of 1 calls failed.\n" in done.stderr
        wait_until(lambda: not [pid for pid in pids(tmp_path, RUNNING) if exists(pid)], timeout=2)

    def test_a_crash_without_a_known_end_invents_none(self) -> None:
        done = run(f"{JOBS}.die_on_odd", "3", "--pool", "stdlib")
        assert done.returncode == 1
        assert (
            "die_on_odd(3) failed: WorkerCrashedError: a worker process died, which ends every "
            "call of its pool with this backend\n"
        ) in done.stdout


def run_closed(*arguments: str, closed: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a stream closed as a shell does it: ``>&-`` or ``2>&-``."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *command("run", *arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestOutput:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    @pytest.mark.parametrize("pool", ["default", "threads"])
    def test_a_full_disk_is_one_sentence(self, pool: str, tmp_path: Path) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                command("run", f"{JOBS}.hang_on_odd", "2", "1", "--pool", pool),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr == (
            "CommandError: The results cannot be written: No space left on device.\n"
        )
        assert not [pid for pid in pids(tmp_path, STARTED) if exists(pid)]

    def test_a_closed_output_is_one_sentence(self, tmp_path: Path) -> None:
        done = run_closed(f"{JOBS}.double", "2", closed=">&-")
        assert done.returncode == 1
        assert done.stderr == (
            "CommandError: The results cannot be written: standard output is closed.\n"
        )
        assert not pids(tmp_path, STARTED)

    def test_a_program_without_an_output_may_give_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdout", None)
        out = io.StringIO()
        call_command(Command(stdout=out), "run", "math.sqrt", "4")
        assert out.getvalue().startswith("sqrt(4) = 2.0")

    def test_closed_errors_hide_no_results(self) -> None:
        done = run_closed(f"{JOBS}.die_on_odd", "2", "1", closed="2>&-")
        assert done.returncode == 1
        assert "die_on_odd(2) = " in done.stdout
        assert "die_on_odd(1) failed: WorkerCrashedError: " in done.stdout
        done = run_closed(f"{JOBS}.nothing_of_this_name", closed="2>&-")
        assert (done.returncode, done.stdout) == (2, "")

    def test_ctrl_c_keeps_its_status_when_nobody_reads_what_it_says(self, tmp_path: Path) -> None:
        with running(
            f"{JOBS}.wait_for_file", "first", "second", stderr=subprocess.STDOUT
        ) as process:
            (tmp_path / "first").touch()
            assert process.stdout is not None
            assert process.stdout.readline().startswith("wait_for_file('first') = 'first'")
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130


class TestImpatience:
    @pytest.mark.parametrize(
        ("number", "status", "line"),
        [
            (signal.SIGINT, 130, "Interrupted: the work was stopped.\n"),
            (signal.SIGTERM, 143, "Terminated: the work was stopped.\n"),
        ],
    )
    def test_further_signals_change_neither_the_status_nor_the_text(
        self, number: int, status: int, line: str, tmp_path: Path
    ) -> None:
        with running(f"{JOBS}.burn", "1", "2") as process:
            workers = wait_until(lambda: len(found := pids(tmp_path, RUNNING)) == 2 and found)
            assert workers
            deadline = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < deadline:
                for _ in range(3):  # also in the middle of what the one before has begun
                    process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.01)
            out, err = process.communicate(timeout=10)
        assert process.returncode == status
        assert (out, err) == ("", line)
        wait_until(lambda: not [pid for pid in workers if exists(pid)])

    def test_who_insists_ends_it_also_while_nobody_reads_what_it_writes(
        self, tmp_path: Path
    ) -> None:
        """Python goes on writing after a signal, so the event loop does not turn to it."""
        with running(f"{JOBS}.filled", "300000", "1") as process:
            workers = wait_until(lambda: len(found := pids(tmp_path, STARTED)) == 2 and found)
            assert workers
            wchan = Path(f"/proc/{process.pid}/wchan")
            wait_until(lambda: "pipe_write" in wchan.read_text(), timeout=30)
            deadline = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < deadline:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
            assert process.poll() == 130
        wait_until(lambda: not [pid for pid in workers if exists(pid)])

    def test_sigterm_counts_where_ctrl_c_comes_with_it(self, tmp_path: Path) -> None:
        with running(f"{JOBS}.burn", "1") as process:
            wait_until(lambda: pids(tmp_path, RUNNING))
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (143, "Terminated: the work was stopped.\n")

    def test_a_program_that_calls_the_command_keeps_its_handlers(self, tmp_path: Path) -> None:
        def interrupt_once_it_runs() -> None:
            wait_until(lambda: pids(tmp_path, RUNNING))
            os.kill(os.getpid(), signal.SIGINT)

        def handlers() -> list[object]:
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

        before = handlers()
        thread = threading.Thread(target=interrupt_once_it_runs)
        thread.start()
        err = io.StringIO()
        with pytest.raises(SystemExit) as left:
            call_command("leasepool", "run", f"{JOBS}.burn", "1", stderr=err)
        thread.join()
        assert left.value.code == 130
        assert err.getvalue() == "Interrupted: the work was stopped.\n"
        assert handlers() == before
