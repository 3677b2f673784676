"""The pytest plugin: the fixture ``leasepool``.

pytest imports this module in every run of every project that has the package installed. So it
imports nothing of Django, and nothing starts before a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .handler import Pools

__all__ = ["leasepool", "leasepool_session"]


@pytest.fixture(scope="session")
def leasepool_session() -> Iterator[None]:
    """Keep the pools that tests have started until the last test is over."""
    from .handler import pools
    from .testing import assert_no_workers

    yield
    managers = pools.existing()
    pools.reset()
    assert_no_workers(*managers)


@pytest.fixture
def leasepool(leasepool_session: None) -> Iterator[Pools]:  # noqa: ARG001 - for its end
    """``leasepool_django.pools``, started; their workers serve one test after the other.

    Fails a test at the end of which a lease is held or a call runs, and ends both, so that the
    next test finds the pools free.
    """
    from .handler import pools
    from .testing import assert_no_leases

    pools.start_all_sync()
    yield pools
    try:
        assert_no_leases()
    except AssertionError as left_behind:
        pools.reset()
        pytest.fail(str(left_behind), pytrace=False)
