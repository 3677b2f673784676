"""``manage.py leasepool run`` in real processes, as a person or a script runs it.

Long because every way the command can end is run as a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from leasepool_django import pools
from tests.command_jobs import MEETING, RUNNING, STARTED
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
JOBS = "tests.command_jobs"


@pytest.fixture(autouse=True)
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where jobs and the test meet; children find it in the environment."""
    monkeypatch.setenv(MEETING, str(tmp_path))
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.command_settings")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # All warnings, but not those of asyncio about steps that take long on a busy machine.
    monkeypatch.delenv("PYTHONDEVMODE", raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    (tmp_path / "broken_module.py").write_text("ANYTHING = 1 / 0\n")
    return tmp_path


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Let children react to Ctrl-C also when this run is a background job, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "manage.py"), "leasepool", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", *arguments), capture_output=True, text=True, timeout=60, check=False
    )


@contextlib.contextmanager
def running(
    *arguments: str, stderr: int = subprocess.PIPE, process_group: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command, started and not waited for; killed if the test leaves it running."""
    with subprocess.Popen(
        command("run", *arguments),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        process_group=process_group,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def pids(meeting: Path, kind: str) -> set[int]:
    return {int(path.name.removeprefix(kind)) for path in meeting.glob(f"{kind}*")}


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestResults:
    def test_each_argument_is_one_call_and_results_come_in_order(self, meeting: Path) -> None:
        done = run(f"{JOBS}.double", "20", '"text"', "plain text", "[1, 2]", "NaN", "1e999 or so")
        assert done.returncode == 0, done.stderr
        *results, summary = done.stdout.splitlines()
        assert [line.partition("  (")[0] for line in results] == [
            "double(20) = 40",
            "double('text') = 'texttext'",
            "double('plain text') = 'plain textplain text'",
            "double([1, 2]) = [1, 2, 1, 2]",
            "double('NaN') = 'NaNNaN'",
            "double('1e999 or so') = '1e999 or so1e999 or so'",
        ]
        workers = {line.partition("(worker ")[2].partition(",")[0] for line in results}
        assert {int(worker) for worker in workers} <= pids(meeting, STARTED)
        assert summary.startswith("6 calls on 2 workers of pool 'default': ")
        assert done.stderr == ""

    def test_the_function_is_called_once_when_no_argument_is_given(self) -> None:
        done = run(f"{JOBS}.nothing")
        assert done.stdout.startswith("nothing() = 'called without arguments'")

    def test_json_lists_and_an_object_give_full_signatures(self) -> None:
        done = run(
            f"{JOBS}.describe", "0", "--args", '[1, "b"]', "--args", "[]", "--kwargs", '{"k": null}'
        )
        assert done.returncode == 0, done.stderr
        assert [line.partition("  (")[0] for line in done.stdout.splitlines()[:-1]] == [
            "describe(0, k=None) = \"(0,) {'k': None}\"",
            "describe(1, 'b', k=None) = \"(1, 'b') {'k': None}\"",
            "describe(k=None) = \"() {'k': None}\"",
        ]

    def test_options_may_stand_between_the_arguments(self) -> None:
        done = run(f"{JOBS}.double", "1", "--workers", "1", "-2", "--pool=three", "--", "--json")
        assert done.returncode == 0, done.stderr
        assert [line.partition("  (")[0] for line in done.stdout.splitlines()[:-1]] == [
            "double(1) = 2",
            "double(-2) = -4",
            "double('--json') = '--json--json'",
        ]
        assert "on 1 worker of pool 'three'" in done.stdout

    def test_a_lease_takes_a_whole_pool_unless_told_otherwise(self) -> None:
        done = run(f"{JOBS}.double", "1", "--pool", "three")
        assert "1 call on 3 workers of pool 'three'" in done.stdout

    def test_results_are_printed_as_soon_as_they_are_known(self, meeting: Path) -> None:
        """The first line is there while the second call still waits for the test."""
        with running(f"{JOBS}.wait_for_file", "first", "second") as process:
            (meeting / "first").touch()
            assert process.stdout is not None
            assert process.stdout.readline().startswith("wait_for_file('first') = 'first'")
            assert process.poll() is None
            (meeting / "second").touch()
            out, _ = process.communicate(timeout=30)
            assert out.startswith("wait_for_file('second') = 'second'")

    def test_a_later_result_waits_for_an_earlier_one(self, meeting: Path) -> None:
        """The second call is done first, and opens the door for the first."""
        done = run(f"{JOBS}.describe_in_order", "wait", "open")
        assert [line.partition("(")[2][:6] for line in done.stdout.splitlines()[:2]] == [
            "'wait'",
            "'open'",
        ]

    def test_calls_run_at_the_same_time(self, meeting: Path) -> None:
        """Two calls that can only end together."""
        done = run(f"{JOBS}.meet", '"a"', '"b"', "--timeout", "30")
        assert done.returncode == 0, done.stderr

    def test_threads_run_the_calls_where_the_pool_is_of_threads(self) -> None:
        with running(f"{JOBS}.double", "2", "--pool", "threads", "--json") as process:
            out, _ = process.communicate(timeout=30)
            assert json_lines(out)[0]["pid"] == process.pid

    def test_comparison_tells_both_times_and_the_speed_up(self) -> None:
        done = run(f"{JOBS}.double", "1", "2", "--compare-serial")
        assert done.returncode == 0, done.stderr
        assert "one after the other in this process: " in done.stdout
        assert done.stdout.rstrip().endswith("times as fast.")
        line = json_lines(run(f"{JOBS}.double", "1", "--compare-serial", "--json").stdout)[-1]
        assert line["speed_up"] == pytest.approx(
            line["serial_seconds"] / line["leased_seconds"], rel=0.2, abs=0.01
        )


class TestJson:
    def test_each_line_is_one_call(self, meeting: Path) -> None:
        done = run(f"{JOBS}.fail_on_odd", "2", "3", "--json")
        assert done.returncode == 1
        good, bad = json_lines(done.stdout)
        assert good["index"] == 0
        assert good["args"] == [2]
        assert good["kwargs"] == {}
        assert good["ok"] is True
        assert good["result"] == 2
        assert good["pid"] in pids(meeting, STARTED)
        assert good["seconds"] >= 0
        assert bad["ok"] is False
        assert bad["error"]["type_name"] == "ValueError"
        assert bad["error"]["message"] == "3 is odd"
        assert "in fail_on_odd" in bad["error"]["traceback_text"]
        assert "result" not in bad

    @pytest.mark.parametrize(
        ("function", "key", "value"),
        [
            ("point", "result", {"x": 1, "y": 2}),
            ("not_json", "result_repr", "b'\\xff'"),
            ("not_a_number", "result_repr", "nan"),
            ("twins", "result_repr", "{1: 'a number', '1': 'a text'}"),
        ],
    )
    def test_what_json_cannot_say_is_shown_as_python_shows_it(
        self, function: str, key: str, value: object
    ) -> None:
        (line,) = json_lines(run(f"{JOBS}.{function}", "--json").stdout)
        assert line[key] == value

    def test_what_the_function_prints_stays_out_of_the_json(self) -> None:
        done = run(f"{JOBS}.say", "hello", "--json")
        (line,) = json_lines(done.stdout)
        assert line["result"] == 5
        assert "hello" in done.stderr
        assert "hello" in run(f"{JOBS}.say", "hello").stdout.splitlines()


class TestFailedCalls:
    def test_a_failed_call_shows_its_traceback_and_hides_no_other_result(self) -> None:
        done = run(f"{JOBS}.fail_on_odd", "1", "2", "3", "4")
        assert done.returncode == 1
        assert "fail_on_odd(2) = 2  (worker " in done.stdout
        assert "fail_on_odd(4) = 4  (worker " in done.stdout
        assert "fail_on_odd(1) failed: ValueError: 1 is odd  (worker " in done.stdout
        assert "fail_on_odd(3) failed: ValueError: 3 is odd" in done.stderr.replace("\n", " ") or (
            "ValueError: 3 is odd" in done.stderr
        )
        assert done.stderr.count("Traceback (most recent call last):\n  File ") == 2
        assert 'raise ValueError(f"{number} is odd")' in done.stderr
        assert "2 of 4 calls failed." in done.stderr

    def test_the_traceback_begins_in_the_function(self) -> None:
        done = run(f"{JOBS}.fail_on_odd", "1")
        _, _, frames = done.stderr.partition("Traceback (most recent call last):\n")
        assert f'File "{ROOT / "tests" / "command_jobs.py"}"' in frames.splitlines()[0]
        assert "leasepool_django" not in frames

    def test_wrong_arguments_fail_the_call(self) -> None:
        done = run(f"{JOBS}.fail_on_odd", "2", "--args", "[1, 2]")
        assert done.returncode == 1
        assert "fail_on_odd(2) = 2" in done.stdout
        assert "TypeError: fail_on_odd() takes 1 positional argument" in done.stderr

    def test_system_exit_of_the_function_is_a_failed_call(self) -> None:
        done = run(f"{JOBS}.leave_on_odd", "2", "3")
        assert done.returncode == 1
        assert "leave_on_odd(2) = 2" in done.stdout
        assert "leave_on_odd(3) failed: SystemExit: 3 is odd" in done.stdout
        assert "in leave_on_odd" in done.stderr

    def test_a_worker_that_dies_fails_its_call_only(self) -> None:
        done = run(f"{JOBS}.die_on_odd", "2", "3", "4", "6")
        assert done.returncode == 1
        for number in (2, 4, 6):
            assert f"die_on_odd({number}) = {number}" in done.stdout
        assert "die_on_odd(3) failed: WorkerCrashedError: the worker died during this call " in (
            done.stdout
        )
        assert "(exit code 9)" in done.stdout

    def test_a_call_that_takes_too_long_is_stopped_and_the_others_go_on(
        self, meeting: Path
    ) -> None:
        done = run(f"{JOBS}.hang_on_odd", "1", "2", "4", "--timeout", "0.5")
        assert done.returncode == 1
        assert "hang_on_odd(1) failed: CallTimeoutError: stopped after 0.5 s" in done.stdout
        assert "hang_on_odd(4) = 4" in done.stdout
        assert not [pid for pid in pids(meeting, RUNNING) if exists(pid)]

    def test_a_result_that_cannot_travel_fails_its_call(self) -> None:
        done = run(f"{JOBS}.lock")
        assert done.returncode == 1
        assert (
            "lock() failed: NotPicklableError: the result cannot leave the worker: result is of "
            "type _thread.lock" in done.stdout
        )
        nested = run(f"{JOBS}.with_a_lock", "3")
        assert "result['parts'][0] is of type _thread.lock" in nested.stdout

    def test_workers_that_cannot_start_are_one_message(self) -> None:
        done = run(f"{JOBS}.double", "1", "--pool", "broken")
        assert done.returncode == 1
        assert "WorkerStartError: " in done.stderr
        assert "OSError: the licence server is down" in done.stderr
        assert done.stdout == ""


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ((f"{JOBS}.dubble", "1"), "has no 'dubble'; did you mean 'double'?"),
            (("nowhere.to.be_found",), "there is no module 'nowhere'."),
            (("tests.nothing_here.double",), "'tests' has no 'nothing_here'."),
            (("double", "1"), "'double' is not a dotted path such as 'package.module.function'."),
            ((f"{JOBS}..double",), "is not a dotted path"),
            (("broken_module.anything",), "raised ZeroDivisionError: "),
            ((f"{JOBS}.NOT_A_FUNCTION",), "is an int, not a function."),
            ((f"{JOBS}.NEITHER_A_FUNCTION",), "is an OrderedDict, not a function."),
            ((f"{JOBS}.coroutine_function",), "is a coroutine function; "),
            ((f"{JOBS}.numbers", "3"), "is a generator function, whose result cannot leave"),
            ((f"{JOBS}.double", "--args", "[1"), "--args '[1' is not JSON: "),
            ((f"{JOBS}.double", "--args", '{"a": 1}'), "--args takes a list such as "),
            ((f"{JOBS}.double", "--kwargs", "oops"), "--kwargs 'oops' is not JSON: "),
            ((f"{JOBS}.double", "--kwargs", "[1]"), "--kwargs takes an object such as "),
            ((f"{JOBS}.double", "--kwargs", "{}", "--kwargs", "{}"), "may be given only once"),
            ((f"{JOBS}.double",), "without an ARG or --args: missing a required argument: 'value'"),
            ((f"{JOBS}.nothing", "--kwargs", '{"a": 1}'), "unexpected keyword argument 'a'"),
            ((f"{JOBS}.double", "[" * 100_000), f"ARG '{'[' * 99}… (99,902 more characters) is n"),
            ((f"{JOBS}.double", "--args", "[" * 100_000), "characters) is nested too deeply."),
            ((f"{JOBS}.double", "--kwargs", '{"a":' * 20_000), "is nested too deeply."),
            ((f"{JOBS}.double", "1", "[1e999]"), "ARG '[1e999]' cannot be passed on: 1e999 is not"),
            ((f"{JOBS}.double", "[NaN]"), "ARG '[NaN]' cannot be passed on: NaN is not a finite"),
            ((f"{JOBS}.double", "--args", "[-Infinity]"), "-Infinity is not a finite number."),
            (
                (f"{JOBS}.describe", "--kwargs", '{"a": -1e999}'),
                "--kwargs '{\"a\": -1e999}' cannot",
            ),
            ((f"{JOBS}.double", "9" * 5_000), "cannot be passed on: Exceeds the limit (4300 digi"),
            ((f"{JOBS}.double", "1", "--pool", "defualt"), "no pool alias 'defualt'"),
            ((f"{JOBS}.double", "1", "--workers", "3"), "more than the 2 workers of a pool"),
            ((f"{JOBS}.double", "1", "--workers", "0"), "'0' is not a whole number above 0"),
            ((f"{JOBS}.double", "1", "--timeout", "nan"), "'nan' is not a number of seconds"),
            ((f"{JOBS}.double", "1", "--acquire-timeout", "-1"), "'-1' is not a number of seconds"),
            ((f"{JOBS}.double", "1", "--timeout", "1e10"), "'1e10' is more seconds than a thread"),
            ((f"{JOBS}.double", "1", "--wrokers", "1"), "unrecognized arguments: --wrokers"),
            ((), "the following arguments are required: DOTTED.PATH"),
        ],
    )
    def test_a_mistake_is_one_clear_sentence_and_starts_no_worker(
        self, arguments: tuple[str, ...], sentence: str, meeting: Path
    ) -> None:
        done = run(*arguments)
        assert done.returncode == 2
        assert sentence in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert not pids(meeting, STARTED)

    def test_no_subcommand_is_a_mistake(self) -> None:
        done = subprocess.run(command(), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "required: SUBCOMMAND" in done.stderr


class TestStopping:
    @pytest.mark.parametrize(
        ("number", "status", "line"),
        [
            (signal.SIGINT, 130, "Interrupted: the work was stopped."),
            (signal.SIGTERM, 143, "Terminated: the work was stopped."),
        ],
    )
    def test_a_signal_stops_the_work_at_once_in_one_line(
        self, number: int, status: int, line: str, meeting: Path
    ) -> None:
        with running(f"{JOBS}.burn", "1", "2", "3") as process:
            workers = wait_until(lambda: len(found := pids(meeting, RUNNING)) == 2 and found)
            assert workers
            started = time.monotonic()
            process.send_signal(number)
            out, err = process.communicate(timeout=10)
            assert time.monotonic() - started < 2
        assert process.returncode == status
        assert out == ""
        assert err == line + "\n"
        assert not [pid for pid in workers if exists(pid)]

    def test_ctrl_c_of_a_terminal_reaches_all_processes_and_still_prints_one_line(
        self, meeting: Path
    ) -> None:
        """A terminal signals the whole foreground group: the command, the fork server, workers."""
        with running(f"{JOBS}.burn", "1", "2", process_group=0) as process:
            wait_until(lambda: len(pids(meeting, RUNNING)) == 2)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=10)
        assert process.returncode == 130
        assert (out, err) == ("", "Interrupted: the work was stopped.\n")

    def test_results_known_before_ctrl_c_stay(self, meeting: Path) -> None:
        with running(f"{JOBS}.hang_on_odd", "2", "1") as process:
            wait_until(lambda: pids(meeting, RUNNING))
            assert process.stdout is not None
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        assert first.startswith("hang_on_odd(2) = 2")
        assert process.returncode == 130

    def test_the_work_stops_when_nobody_reads_the_results(self, meeting: Path) -> None:
        with running(f"{JOBS}.wait_for_file", "first", "second", "third") as process:
            (meeting / "first").touch()
            assert process.stdout is not None
            assert process.stdout.readline().startswith("wait_for_file('first') = 'first'")
            process.stdout.close()
            (meeting / "second").touch()
            assert process.stderr is not None
            assert process.stderr.read() == ""
            assert process.wait(timeout=30) == 141

    def test_ctrl_c_stops_the_serial_comparison_too(self, meeting: Path) -> None:
        with running(f"{JOBS}.burn_outside_workers", "--compare-serial") as process:
            wait_until(lambda: process.pid in pids(meeting, RUNNING))
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
        assert process.returncode == 143
        assert "1 call on 2 workers" in out
        assert err == "Terminated: the work was stopped.\n"

    @pytest.mark.parametrize("pool", ["threads", "stdlib"])
    def test_ctrl_c_does_not_wait_for_calls_that_cannot_be_stopped(
        self, pool: str, meeting: Path
    ) -> None:
        with running(f"{JOBS}.burn", "1", "--pool", pool) as process:
            workers = wait_until(lambda: pids(meeting, RUNNING))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err.startswith("Interrupted: the work was stopped.\n")
        assert "Traceback" not in err
        wait_until(lambda: not [pid for pid in workers if exists(pid)])


class TestProgress:
    def on_a_terminal(self, *arguments: str) -> str:
        """What the command writes to standard error when that is a terminal."""
        ours, theirs = pty.openpty()
        with running(*arguments, stderr=theirs) as process:
            os.close(theirs)
            seen = b""
            with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
                while chunk := os.read(ours, 4096):
                    seen += chunk
            os.close(ours)
            process.communicate(timeout=30)
        return seen.decode()

    def test_a_bar_shows_progress_on_a_terminal_and_is_wiped_in_the_end(self) -> None:
        seen = self.on_a_terminal(f"{JOBS}.double", "1", "2")
        assert "] 0/2" in seen
        assert "] 1/2" in seen
        assert seen.endswith("\r\x1b[K")

    def test_no_progress_draws_no_bar(self) -> None:
        assert self.on_a_terminal(f"{JOBS}.double", "1", "2", "--no-progress") == ""

    def test_the_least_verbosity_prints_the_results_and_nothing_else(self) -> None:
        assert self.on_a_terminal(f"{JOBS}.double", "1", "2", "--verbosity", "0") == ""
        done = run(f"{JOBS}.double", "20", "--verbosity", "0")
        (line,) = done.stdout.splitlines()
        assert line.startswith("double(20) = 40  (worker ")


class TestCalledFromPython:
    def test_results_go_to_the_given_stream_and_no_pool_is_left(self) -> None:
        out = io.StringIO()
        call_command("leasepool", "run", f"{JOBS}.double", "4", workers=1, stdout=out)
        assert "double(4) = 8" in out.getvalue()
        assert not pools["default"].started

    def test_a_failed_call_is_a_command_error(self) -> None:
        with pytest.raises(CommandError, match=r"1 of 1 calls failed\."):
            call_command(
                "leasepool",
                "run",
                f"{JOBS}.fail_on_odd",
                "1",
                stdout=io.StringIO(),
                stderr=io.StringIO(),
            )

    def test_a_pool_that_was_running_goes_on_running(self) -> None:
        pools.start_all_sync()
        try:
            call_command("leasepool", "run", f"{JOBS}.double", "4", stdout=io.StringIO())
            assert pools["default"].started
        finally:
            pools.reset()
