"""What a worker reports has bounds, and nothing makes it fail to report."""

from __future__ import annotations

import pickle

import pytest

from leasepool_django.backends.process import remote
from leasepool_django.exceptions import RemoteError
from tests import exception_jobs as jobs
from tests.arrivals import arrived, arrived_as_remote_error, entries, names, run_worker


def test_of_an_endless_recursion_both_ends_arrive() -> None:
    error = arrived(jobs.recurses)
    assert type(error) is RecursionError
    assert names(error) == ["recurses"] * remote.MAX_FRAMES_EACH
    assert [entry.tb_lineno for entry in entries(error)] == [
        entry.tb_frame.f_lineno for entry in entries(error)
    ]
    (note,) = error.__notes__
    assert note.endswith(" frames of its traceback in the worker were left out.")


def test_a_long_chain_is_cut() -> None:
    error: BaseException | None = arrived(jobs.fails_in_a_long_chain)
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    assert len(chain) == remote.MAX_DEPTH + 1
    assert chain[-1].__notes__ == ["Further exceptions chained to it in the worker were left out."]


def test_a_large_group_is_cut() -> None:
    group = arrived(jobs.fails_with_a_large_group)
    assert isinstance(group, ExceptionGroup)
    assert len(group.exceptions) == 1_500
    assert [str(member) for member in group.exceptions[:999]] == [str(i) for i in range(999)]
    last = group.exceptions[-1]
    assert isinstance(last, RemoteError)
    assert "no more than 1,000 exceptions travel at once" in str(last)


def test_a_deep_group_is_cut() -> None:
    error: BaseException = arrived(jobs.fails_with_a_deep_group)
    depth = 0
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
        depth += 1
    assert depth == remote.MAX_GROUP_DEPTH
    assert isinstance(error, RemoteError)
    assert f"it is nested in more than {depth} other groups" in str(error)


def test_a_long_text_is_cut() -> None:
    error = arrived_as_remote_error(jobs.says_a_lot)
    assert error.text == "y" * 10_000 + "… (990,000 more characters)"
    assert error.traceback_text is not None
    assert len(error.traceback_text) < 110_000


def test_many_notes_are_cut() -> None:
    cause = arrived(jobs.many_notes).__cause__
    assert cause is not None
    assert cause.__notes__ == [str(number) for number in range(remote.MAX_NOTES)]


def test_notes_that_are_not_texts_in_a_list_do_no_harm() -> None:
    assert vars(arrived(jobs.odd_notes))["__notes__"] == "not a list"
    error = arrived_as_remote_error(jobs.hostile_notes)
    assert error.type_name == "ValueError"
    assert "describing it raised RuntimeError" in str(error)
    error = arrived_as_remote_error(jobs.unreadable_notes)
    assert error.__notes__ == ["one"]
    assert error.traceback_text == (
        "<formatting the traceback of tests.exception_kinds.HoldsLock raised RuntimeError>\n"
    )


def test_an_exception_out_of_memory_arrives() -> None:
    sent = run_worker(
        "import resource, sys\n"
        "from leasepool_django.backends.process import remote\n"
        "sys.settrace(None)  # what measures coverage needs memory of its own\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000))\n"
        "def fill():\n"
        "    kept, size = [], 1 << 24\n"
        "    while True:\n"
        "        try:\n"
        "            kept.append(bytearray(size))\n"
        "        except MemoryError:\n"
        "            if size == 1: raise\n"
        "            size //= 2\n"
        "try:\n"
        "    fill()\n"
        "except MemoryError as error:\n"
        "    sent = remote.encode_exception(error)\n"
        "sys.stdout.buffer.write(sent)\n"
    )
    error = remote.decode_exception(sent)
    assert isinstance(error, MemoryError) or (
        isinstance(error, RemoteError) and "memory" in str(error).lower()
    )


def test_nothing_makes_the_encoding_fail() -> None:
    error = remote.decode_exception(remote.encode_exception("no exception"))  # type: ignore[arg-type]
    assert isinstance(error, RemoteError)
    assert "the worker had no memory left to describe it" in str(error)


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps([]), pickle.dumps([(1, 2)])])
def test_nothing_makes_the_decoding_fail(data: bytes) -> None:
    error = remote.decode_exception(data)
    assert isinstance(error, RemoteError)
    assert "it cannot be rebuilt from its pickle" in str(error)
