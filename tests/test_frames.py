"""Tracebacks taken apart in the worker and rebuilt here: frames, variables, the debug page."""

from __future__ import annotations

import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import pytest
from django.test import RequestFactory, override_settings
from django.views.debug import technical_500_response

from leasepool_django.backends.process import frames, remote
from tests import exception_jobs as jobs
from tests.arrivals import arrived, entries, from_worker, names


def test_variables_travel_only_as_they_were_represented() -> None:
    (entry,) = entries(arrived(jobs.fails, "with_locals"))
    assert dict(entry.tb_frame.f_locals) == {"password": "***", "numbers": "[1, 2, 3]"}
    assert repr(entry.tb_frame.f_locals["numbers"]) == "[1, 2, 3]"
    assert jobs.PASSWORD.encode() not in from_worker()[0]["fails"]["sent"]


@override_settings(DEBUG=True)
@pytest.mark.parametrize("job", [jobs.fails_with_a_cause, jobs.fails_with_a_group, jobs.exits])
def test_djangos_debug_page_shows_the_workers_lines_and_variables(job: Any) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - several kinds
        raise arrived(job, "with_locals")
    response = technical_500_response(
        RequestFactory().get("/"), raised.type, raised.value, raised.tb
    )
    page = response.content.decode()
    assert f'<code class="fname">{jobs.__file__}</code>' in page
    assert job.__name__ in page
    if job is jobs.fails_with_a_cause:
        assert "raise ValueError(f&quot;{len(numbers)} numbers&quot;)" in page
        assert "<pre>[1, 2, 3]</pre>" in page
        assert jobs.PASSWORD not in page


def test_variables_are_bounded() -> None:
    def many(frame: FrameType) -> dict[str, str]:
        return {f"name{number}": "z" * 10_000 for number in range(1_000)}

    error = remote.decode_exception(remote.encode_exception(jobs.caught(jobs.fails), many))
    shown = entries(error)[0].tb_frame.f_locals
    assert len(shown) == frames.MAX_VARIABLES
    assert {len(value) for value in shown.values()} == {frames.MAX_VARIABLE_CHARS}


def test_variables_that_cannot_be_read_cost_no_more_than_themselves() -> None:
    def refuses(frame: FrameType) -> dict[str, str]:
        raise SystemExit(3)

    error = remote.decode_exception(remote.encode_exception(jobs.caught(jobs.fails), refuses))
    assert type(error) is ValueError
    shown = dict(entries(error)[0].tb_frame.f_locals)
    assert shown == {"<variables>": "<not shown: reading them raised SystemExit>"}


# --- frames of unusual code ----------------------------------------------------------------------


def test_the_workers_own_frames_are_left_out() -> None:
    error = jobs.caught(jobs.fails_below_others)
    assert names(remote.decode_exception(remote.encode_exception(error)))[0] == "caught"
    assert names(remote.decode_exception(remote.encode_exception(error, None, 1)))[0] == (
        "fails_below_others"
    )
    assert names(remote.decode_exception(remote.encode_exception(error, None, 99))) == []


@pytest.mark.parametrize("first_line", [1, 5_000])
def test_code_of_any_lines_arrives(first_line: int) -> None:
    """Also code whose lines lie before its first one, and code without a file or a module."""
    code = compile("def made(): raise OSError", "<made>", "exec")
    scope: dict[str, Any] = {"__name__": 5}
    exec(code, scope)
    scope["made"].__code__ = scope["made"].__code__.replace(co_firstlineno=first_line)
    error = remote.decode_exception(remote.encode_exception(jobs.caught(scope["made"]), None, 1))
    (entry,) = entries(error)
    assert entry.tb_lineno == first_line
    assert entry.tb_frame.f_globals == {"__name__": None, "__file__": None}


def test_code_without_lines_arrives() -> None:
    function = jobs.without_lines()
    error = remote.decode_exception(remote.encode_exception(jobs.caught(function), None, 1))
    (entry,) = entries(error)
    assert entry.tb_lineno == function.__code__.co_firstlineno


def test_lines_that_run_backwards_arrive() -> None:
    records, _ = frames.take(jobs.caught(jobs.fails_within_an_expression).__traceback__)
    backwards = frames.FrameRecord(*records[-1])._replace(first_line=90_000)  # type: ignore[arg-type]
    traceback_ = frames.rebuild([backwards])
    assert traceback_ is not None
    line, *_ = next(iter(traceback_.tb_frame.f_code.co_positions()))
    assert line == backwards.line == traceback_.tb_lineno


def test_where_columns_are_unknown_lines_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``-X no_debug_ranges``, or an interpreter whose tables are of another format."""
    records, _ = frames.take(jobs.caught(jobs.fails).__traceback__)
    record = frames.FrameRecord(*records[-1])  # type: ignore[arg-type]
    for known in (True, False):
        monkeypatch.setattr(frames, "_POSITIONS_KNOWN", known)
        rebuilt = frames.rebuild([record._replace(column=-1, end_column=-1)])
        assert rebuilt is not None
        shown = traceback.format_tb(rebuilt)[0].splitlines()
        assert shown[0] == f'  File "{jobs.__file__}", line {record.line}, in fails'
        assert shown[1].strip().startswith("raise ValueError(")
    assert len(shown) == 2 or set(shown[2].strip()) <= {"^", "~"}


def test_the_first_and_the_last_frames_are_kept() -> None:
    def descend(depth: int) -> NoReturn:
        if depth == 0:
            jobs.fails()
        descend(depth - 1)

    with pytest.raises(ValueError, match="3 numbers") as raised:
        descend(20)
    records, left_out = frames.take(raised.value.__traceback__, limit=5)
    function_names = [record[1] for record in records]
    here = sys._getframe().f_code.co_name
    assert function_names == [here, "descend", "descend", "descend", "fails"]
    assert left_out == 23 - 5


def test_tables_of_another_format_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frames._positions_known()
    monkeypatch.setattr(frames, "_linetable", lambda record: b"")
    assert not frames._positions_known()
