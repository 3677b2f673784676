"""Tables of pandas and PyArrow through shared memory: whole, and unchanged under their owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from leasepool_django.backends.process import shared
from tests import shared_jobs as jobs
from tests.process_pools import running

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="needs memfd_create (Linux)")

ROWS = 50_000


def columns(first: float) -> dict[str, Any]:
    return {
        "value": np.arange(ROWS, dtype=np.float64) + first,
        "count": np.arange(ROWS, dtype=np.int32),
        "name": [f"row {number}" for number in range(ROWS)],
    }


def frame(first: float) -> Any:
    return pd.DataFrame(columns(first))


def table(first: float) -> Any:
    return pa.table(columns(first))


each_kind = pytest.mark.parametrize("make", [frame, table])


@each_kind
def test_a_table_goes_there_and_back(make: Callable[[float], Any]) -> None:
    value = make(1.0)
    with running() as manager:
        for _ in range(2):  # the second time in a segment that was used before
            back = manager.run_sync(jobs.echo, value)
            assert type(back) is type(value)
            assert back.equals(value)
        nested = manager.run_sync(jobs.echo, {"tables": [value, (value,)], "rows": ROWS})
        assert nested["tables"][0].equals(value)
        assert nested["tables"][1][0].equals(value)
        assert manager.run_sync(jobs.shared_memory_in_use) > 0


@each_kind
def test_a_table_that_a_function_keeps_never_changes(make: Callable[[float], Any]) -> None:
    with running() as manager:
        for first in range(4):
            manager.run_sync(jobs.keep_table, make(float(first)))
        assert manager.run_sync(jobs.first_values) == [0.0, 1.0, 2.0, 3.0]


@each_kind
def test_a_table_that_a_caller_keeps_never_changes(make: Callable[[float], Any]) -> None:
    with running() as manager:
        kept = [manager.run_sync(jobs.echo, make(float(first))) for first in range(4)]
        manager.run_sync(jobs.echo, make(-1.0))
    assert [jobs.first_value(value) for value in kept] == [0.0, 1.0, 2.0, 3.0]
    assert all(value.equals(make(float(first))) for first, value in enumerate(kept))
