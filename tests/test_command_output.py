"""``manage.py leasepool run`` where results, errors, arguments or the output itself are awkward."""

from __future__ import annotations

import re

import pytest

from tests.test_command import (
    JOBS,
    interruptible,  # noqa: F401 - a fixture for every test of this module too
    json_lines,
    meeting,  # noqa: F401 - as above
    run,
)


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
