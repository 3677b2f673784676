"""What the operating system offers: marks of a process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest

from leasepool_django.backends.process import system


@pytest.mark.parametrize("linux", [True, False])
@pytest.mark.parametrize("fork", [os.fork, ctypes.PyDLL(None).fork], ids=["python", "c"])
def test_a_forked_child_does_not_have_its_parents_mark(
    fork: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *, linux: bool
) -> None:
    monkeypatch.setattr(system, "LINUX", linux and system.LINUX)
    mark = system.mark_of_this_process()
    assert mark[0]
    child = fork()
    if not child:
        os._exit(bool(mark[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mark[0]
