"""``manage.py leasepool map``: from one file of JSON lines to another, in real processes.

Long because every way the command can end is run as a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from tests.command_jobs import RUNNING, STARTED
from tests.test_command import (
    JOBS,
    command,
    exists,
    interruptible,  # noqa: F401 - a fixture for every test of this module too
    json_lines,
    meeting,  # noqa: F401 - as above
    pids,
)
from tests.waiting import wait_until

QUIET = ("--verbosity", "0")


def map_(*arguments: str, given: str | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("map", *arguments),
        input=given,
        stdin=None if given is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **how,
    )


@contextlib.contextmanager
def mapping(*arguments: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, started and not waited for; killed if the test leaves it running."""
    with subprocess.Popen(
        command("map", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def written(path: Path, *values: Any) -> str:
    """``path``, with these values as its lines."""
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return str(path)


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def results(text: str) -> dict[int, Any]:
    """Line → result; each line must be there once, in order, and well."""
    found = json_lines(text)
    numbers = [one["line"] for one in found]
    assert numbers == sorted(set(numbers))
    assert all(one["ok"] for one in found)
    return {one["line"]: one["result"] for one in found}


class TestResults:
    def test_each_line_is_one_call_and_results_come_in_order(self, tmp_path: Path) -> None:
        source = written(tmp_path / "in.jsonl", 1, "two", [3, 4], None)
        target = tmp_path / "out.jsonl"
        done = map_("builtins.repr", "--input", source, "--output", str(target))
        assert done.returncode == 0, done.stderr
        assert results(target.read_text()) == {1: "1", 2: "'two'", 3: "[3, 4]", 4: "None"}
        assert done.stdout == ""
        assert done.stderr.startswith("4 lines on 2 workers of pool 'default': ")

    def test_a_result_tells_its_worker_and_its_time(self, meeting: Path) -> None:  # noqa: F811
        (line,) = json_lines(map_(f"{JOBS}.double", given="4").stdout)
        assert line.pop("pid") in pids(meeting, STARTED)
        assert line.pop("seconds") >= 0
        assert line == {"line": 1, "ok": True, "result": 8}

    def test_keywords_go_to_every_call(self) -> None:
        done = map_(f"{JOBS}.describe", "--kwargs", '{"unit": "m"}', *QUIET, given="1\n2\n")
        assert results(done.stdout) == {1: "(1,) {'unit': 'm'}", 2: "(2,) {'unit': 'm'}"}
        assert done.stderr == ""

    def test_lines_without_a_value_count_and_give_none(self) -> None:
        done = map_(f"{JOBS}.double", given="\ufeff1\r\n\r\n \t\n2")
        assert results(done.stdout) == {1: 2, 4: 4}

    def test_no_lines_give_no_results(self, tmp_path: Path) -> None:
        done = map_(f"{JOBS}.double", "--output", str(tmp_path / "out.jsonl"))
        assert done.returncode == 0
        assert done.stderr.startswith("0 lines on ")
        assert (tmp_path / "out.jsonl").read_text() == ""

    def test_what_json_cannot_say_is_shown(self) -> None:
        (line,) = json_lines(map_("builtins.bytes", given="[65]").stdout)
        assert line["result_repr"] == "b'A'"

    def test_results_come_while_the_input_is_still_open(self) -> None:
        with mapping(f"{JOBS}.double") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for number in (1, 2, 3):
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["result"] == 2 * number
            out, _ = process.communicate(timeout=30)
        assert (out, process.returncode) == ("", 0)

    def test_what_the_function_prints_is_not_among_the_results(self) -> None:
        for pool in ("default", "threads"):
            done = map_(f"{JOBS}.say", "--pool", pool, given='"hello"\n"there"\n')
            assert set(results(done.stdout)) == {1, 2}
            assert "hello" in done.stderr


class TestFailedLines:
    def test_a_failed_line_hides_no_other(self) -> None:
        done = map_(f"{JOBS}.fail_on_odd", given="0\n1\n2\n")
        assert done.returncode == 1
        assert done.stderr.rstrip().endswith("CommandError: 1 of 3 calls failed.")
        first, second, third = json_lines(done.stdout)
        assert (first["ok"], third["ok"]) == (True, True)
        assert (second["line"], second["ok"]) == (2, False)
        assert second["error"]["type_name"] == "ValueError"
        assert "line 2: fail_on_odd(1) failed in worker " in done.stderr
        assert "fail_on_odd" in second["error"]["traceback_text"]

    def test_a_worker_that_dies_costs_its_own_line(self) -> None:
        done = map_(f"{JOBS}.die_on_odd", given="0\n1\n2\n3\n4\n")
        lines = json_lines(done.stdout)
        assert [line["ok"] for line in lines] == [True, False, True, False, True]
        assert lines[1]["error"]["type_name"] == "WorkerCrashedError"

    def test_a_line_that_takes_too_long_is_stopped(self) -> None:
        done = map_(f"{JOBS}.hang_on_odd", "--timeout", "0.5", given="0\n1\n2\n")
        lines = json_lines(done.stdout)
        assert [line["ok"] for line in lines] == [True, False, True]
        assert lines[1]["error"]["message"] == "stopped after 0.5 s"

    def test_many_failures_are_told_with_the_results_only(self) -> None:
        done = map_(f"{JOBS}.fail_on_odd", given="1\n" * 20)
        assert len(json_lines(done.stdout)) == 20
        assert done.stderr.count("Traceback (most recent call last)") == 5
        assert done.stderr.count("Further failures are told with the results only.") == 1
        assert done.stderr.rstrip().endswith("20 of 20 calls failed.")


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("{", "Line 2 of standard input '{' is not JSON: "),
            ("one", "Line 2 of standard input 'one' is not JSON: "),
            ("[NaN]", "Line 2 of standard input '[NaN]' cannot be passed on: NaN is not a finite"),
            ("1 2", "Line 2 of standard input '1 2' is not JSON: "),
        ],
    )
    def test_those_before_a_line_that_is_wrong_are_done(self, line: str, said: str) -> None:
        done = map_(f"{JOBS}.double", *QUIET, given=f"1\n{line}\n3\n")
        assert done.returncode == 2
        assert results(done.stdout) == {1: 2}
        assert done.stderr.startswith(f"CommandError: {said}")

    def test_a_wrong_line_of_a_file_is_found_before_any_worker_starts(
        self,
        meeting: Path,  # noqa: F811
    ) -> None:
        source, target = meeting / "in.jsonl", meeting / "out.jsonl"
        source.write_bytes(b"1\n2\n\xff\n")
        done = map_(f"{JOBS}.double", "--input", str(source), "--output", str(target))
        assert done.returncode == 2
        assert done.stderr.startswith(f"CommandError: Line 3 of {source} is not UTF-8: ")
        assert not target.exists()
        assert not pids(meeting, STARTED)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((f"{JOBS}.doubel",), "did you mean 'double'?"),
            ((f"{JOBS}.nothing",), "cannot be called with the value of a line: too many"),
            ((f"{JOBS}.double", "--kwargs", "[]"), "--kwargs takes an object such as"),
            ((f"{JOBS}.double", "--kwargs", '{"value": 1}'), "multiple values for argument"),
            ((f"{JOBS}.double", "--input", "none.jsonl"), "none.jsonl cannot be used: No such"),
            ((f"{JOBS}.double", "--input", "."), ". cannot be used: Is a directory"),
            ((f"{JOBS}.double", "--output", "none/out"), "none/out cannot be used: No such"),
            ((f"{JOBS}.double", "--output", ".", "--overwrite"), ". is a directory; the results"),
            ((f"{JOBS}.double", "--output", ""), "--output needs the name of a file."),
            ((f"{JOBS}.double", "--input", ""), "--input needs the name of a file."),
            ((f"{JOBS}.double", "--resume"), "name it, --output"),
            ((f"{JOBS}.double", "--output", "x", "--resume", "--overwrite"), "not allowed with"),
            ((f"{JOBS}.double", "--pool", "reports"), "reports"),
        ],
    )
    def test_a_mistake_is_one_sentence_and_starts_no_worker(
        self,
        arguments: tuple[str, ...],
        said: str,
        meeting: Path,  # noqa: F811
    ) -> None:
        done = map_(*arguments, given="", cwd=meeting)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert not pids(meeting, STARTED)

    def test_a_standard_input_without_a_descriptor_is_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("1"))
        with pytest.raises(CommandError, match="has no descriptor: name a file, --input"):
            call_command("leasepool", "map", f"{JOBS}.double")

    def test_a_closed_standard_input_is_told(self) -> None:
        line = command("map", f"{JOBS}.double")
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *line],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert "Standard input is closed: name a file, --input." in done.stderr


class TestFiles:
    def test_an_output_that_exists_is_kept(self, tmp_path: Path) -> None:
        source, target = written(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
        target.write_text("precious\n")
        line = (f"{JOBS}.double", "--input", source, "--output", str(target))
        done = map_(*line)
        assert done.returncode == 2
        assert "exists. --overwrite replaces it; --resume goes on" in done.stderr
        done = map_(*line, "--resume")
        assert done.returncode == 2
        assert "cannot be gone on with: its last line is no result of a line." in done.stderr
        assert target.read_text() == "precious\n"
        assert map_(*line, "--overwrite").returncode == 0
        assert results(target.read_text()) == {1: 2}

    @pytest.mark.parametrize(
        "foreign",
        [
            '{"precious": 1}',
            '{"precious": 1}\n',
            '{"line": 2, "said": "a log"}\n',
            "[" * 9999 + "\n",
        ],
    )
    def test_a_file_of_somebody_elses_is_not_gone_on_with(
        self, foreign: str, tmp_path: Path
    ) -> None:
        target = tmp_path / "out.jsonl"
        target.write_text(foreign)
        done = map_(f"{JOBS}.double", "--output", str(target), "--resume", given="1\n2\n3")
        assert done.returncode == 2
        assert "cannot be gone on with: its last line is no result of a line." in done.stderr
        assert target.read_text() == foreign

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("--input in --output in --overwrite", "in is the input; the results need another"),
            ("--output in --overwrite < in", "in is the input; the results need another file."),
            ("--input in >> in", "Standard output goes to in, which is read from."),
        ],
    )
    def test_the_input_is_not_written_to(self, line: str, said: str, tmp_path: Path) -> None:
        written(tmp_path / "in", 1)
        done = subprocess.run(
            f"{shlex.join(command('map', f'{JOBS}.double'))} {line}",
            shell=True,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert (tmp_path / "in").read_text() == "1\n"

    def test_what_is_to_be_replaced_stays_until_there_is_a_result(self, tmp_path: Path) -> None:
        target = tmp_path / "out.jsonl"
        target.write_text("precious\n")
        line = (f"{JOBS}.double", "--output", str(target), "--overwrite")
        assert map_(*line, given="{").returncode == 2
        assert target.read_text() == "precious\n"
        assert map_(*line, given="").returncode == 0
        assert target.read_text() == ""

    @pytest.mark.parametrize("how", ["file", "pipe"])
    def test_less_input_than_was_done_is_told(self, how: str, tmp_path: Path) -> None:
        source, target = written(tmp_path / "in.jsonl", 1, 2), tmp_path / "out.jsonl"
        line = (f"{JOBS}.double", "--output", str(target))
        assert map_(*line, given="1\n2\n3").returncode == 0
        line = (*line, "--resume", *(("--input", source) if how == "file" else ()))
        done = map_(*line, given="1\n2\n")
        assert done.returncode == 2
        assert "has 2 lines, and 3 have been done: --resume goes on with the same" in done.stderr
        assert len(results(target.read_text())) == 3

    def test_what_cannot_be_said_costs_no_result(self, tmp_path: Path) -> None:
        target = tmp_path / "out.jsonl"
        with open("/dev/full", "w") as full:  # noqa: PTH123
            done = subprocess.run(
                command("map", f"{JOBS}.double", "--output", str(target)),
                input="1\n2\n",
                stdout=subprocess.PIPE,
                stderr=full,
                text=True,
                timeout=60,
                check=False,
                env={**os.environ, "PYTHONUNBUFFERED": ""},  # what was kept is tried at the end
            )
        assert done.returncode == 0
        assert results(target.read_text()) == {1: 2, 2: 4}

    def test_what_a_function_starts_does_not_eat_the_input(self) -> None:
        done = map_(f"{JOBS}.read_all", "--pool", "threads", given="1\n2\n3\n")
        assert results(done.stdout) == {1: "", 2: "", 3: ""}

    def test_a_device_takes_results_as_well(self) -> None:
        done = map_(f"{JOBS}.double", "--output", "/dev/null", "--overwrite", given="1")
        assert done.returncode == 0, done.stderr

    def test_work_that_was_stopped_is_gone_on_with(self, meeting: Path) -> None:  # noqa: F811
        source = written(meeting / "in.jsonl", *range(0, 80, 2), 81, *range(82, 100, 2))
        target = meeting / "out.jsonl"
        line = (f"{JOBS}.hang_on_odd", "--input", source, "--output", str(target))
        with mapping(*line) as process:
            wait_until(lambda: pids(meeting, RUNNING) and target.read_text().count("\n") == 40)
            workers = pids(meeting, STARTED)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert told.startswith(f"Interrupted: the work was stopped. {target} holds what was done;")
        wait_until(lambda: not any(exists(pid) for pid in workers))
        # As where the power fails, too.
        with target.open("a") as file:
            file.write('{"line": 41, "ok": tr')
        done = map_(f"{JOBS}.double", *line[1:], "--resume")
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("10 lines on ")
        found = results(target.read_text())
        assert list(found) == list(range(1, 51))
        assert found[41] == 162

    def test_one_line_is_said_of_work_in_full_swing(self, meeting: Path) -> None:  # noqa: F811
        source = written(meeting / "in.jsonl", *range(100_000))
        target = meeting / "out.jsonl"
        with mapping(f"{JOBS}.double", "--input", source, "--output", str(target)) as process:
            wait_until(lambda: target.exists() and target.stat().st_size > 10_000)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert told.count("\n") == 1, told
        found = results(target.read_text())
        assert found == {n + 1: 2 * n for n in range(len(found))}

    def test_an_output_that_was_deleted_meanwhile_is_no_error(
        self,
        meeting: Path,  # noqa: F811
    ) -> None:
        target = meeting / "out.jsonl"
        with mapping(f"{JOBS}.double", "--output", str(target)) as process:
            wait_until(lambda: len(pids(meeting, STARTED)) == 2)
            target.unlink()
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert (process.returncode, told) == (130, "Interrupted: the work was stopped.\n")

    def test_ctrl_c_ends_it_while_nobody_writes_to_its_input(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        with mapping(f"{JOBS}.double", "--input", str(fifo)) as process:
            wait_until(lambda: catches_sigterm(process.pid))
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert (process.returncode, told) == (130, "Interrupted: the work was stopped.\n")

    def test_ctrl_c_ends_it_while_it_waits_for_input(self, meeting: Path) -> None:  # noqa: F811
        with mapping(f"{JOBS}.double") as process:
            wait_until(lambda: len(pids(meeting, STARTED)) == 2)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert told == "Interrupted: the work was stopped.\n"

    @pytest.mark.parametrize("before", [None, "precious\n"])
    def test_where_no_worker_starts_the_output_is_as_it_was(
        self,
        before: str | None,
        meeting: Path,  # noqa: F811
    ) -> None:
        target = meeting / "out.jsonl"
        if before is not None:
            target.write_text(before)
        line = ("--pool", "broken", "--output", str(target), "--overwrite")
        done = map_(f"{JOBS}.double", *line, given="1")
        assert done.returncode == 1
        assert "the licence server is down" in done.stderr
        assert (target.read_text() if target.exists() else None) == before

    def test_a_full_disk_is_told_and_what_was_written_can_be_gone_on_with(
        self, tmp_path: Path
    ) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

        source, target = written(tmp_path / "in.jsonl", *range(50)), tmp_path / "out.jsonl"
        line = (f"{JOBS}.double", "--input", source, "--output", str(target))
        done = map_(*line, preexec_fn=limit)
        assert done.returncode == 1
        assert done.stderr == "CommandError: The results cannot be written: File too large.\n"
        assert map_(*line, "--resume").returncode == 0
        assert results(target.read_text()) == {n + 1: 2 * n for n in range(50)}

    def test_a_reader_that_leaves_ends_the_work(self, tmp_path: Path) -> None:
        source = written(tmp_path / "in.jsonl", *range(20_000))
        with mapping(f"{JOBS}.double", "--input", source) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(30) == 141
            assert process.stderr is not None
            assert process.stderr.read() == ""


class TestProgress:
    @pytest.mark.parametrize(("given", "shown"), [("file", "] 0/2"), ("pipe", "0 done")])
    def test_a_bar_shows_how_many_are_done(self, given: str, shown: str, tmp_path: Path) -> None:
        source = written(tmp_path / "in.jsonl", 1, 2)
        ours, theirs = os.openpty()
        line = command("map", f"{JOBS}.double", "--output", str(tmp_path / "out.jsonl"))
        with subprocess.Popen(
            [*line, "--input", source] if given == "file" else line,
            stdin=subprocess.PIPE,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            assert process.stdin is not None
            process.stdin.write(b"1\n2\n")
            process.stdin.close()
            seen = b""
            with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
                while chunk := os.read(ours, 4096):
                    seen += chunk
            os.close(ours)
        assert process.returncode == 0
        assert shown in seen.decode()
