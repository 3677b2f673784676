"""Log records on their way from a worker to this process's logging."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import pytest

from leasepool_django.backends.process import remote
from tests import exception_jobs, pickling_jobs
from tests import exception_kinds as kinds
from tests.arrivals import from_worker


def record_of(message: object, *args: object, **attributes: object) -> logging.LogRecord:
    record = logging.LogRecord("shop", logging.WARNING, __file__, 7, message, args, None, "f")
    record.__dict__.update(attributes)
    return record


def sent(record: logging.LogRecord) -> logging.LogRecord:
    return remote.decode_record(remote.encode_record(record))


def test_a_record_arrives_formatted() -> None:
    record = record_of("hello %s, %d", "you", 5, processName="leasepool-3", stack_info="Stack:")
    got = sent(record)
    assert got.getMessage() == "hello you, 5"
    assert got.args == ()
    unchanged = record.__dict__.keys() - {"msg", "args"}
    assert {name: got.__dict__[name] for name in unchanged} == {
        name: record.__dict__[name] for name in unchanged
    }


def test_a_record_brings_its_traceback_as_text() -> None:
    error = exception_jobs.caught(exception_jobs.fails_with_a_cause)
    got = sent(record_of("it failed", exc_info=(type(error), error, error.__traceback__)))
    assert got.exc_info is None
    assert got.exc_text is not None
    assert got.exc_text.startswith("Traceback (most recent call last):\n")
    assert got.exc_text.endswith("\nKeyError: 'outer'")
    text = logging.Formatter("%(levelname)s %(message)s").format(got)
    assert text == f"WARNING it failed\n{got.exc_text}"


@pytest.mark.parametrize("exc_info", [None, (None, None, None), (), "true", 1])
def test_a_record_without_an_exception_has_no_traceback(exc_info: object) -> None:
    assert sent(record_of("fine", exc_info=exc_info)).exc_text is None


def test_a_traceback_that_was_formatted_before_is_kept() -> None:
    assert sent(record_of("it failed", exc_text="as it was")).exc_text == "as it was"


def test_attributes_arrive_as_they_are_or_as_their_repr() -> None:
    class Local:
        """Cannot be pickled."""

    got = sent(
        record_of(
            "hello",
            number=5,
            numbers={"a": [1, 2]},
            request_id=kinds.Frozen(7),
            local=Local(),
            raising=pickling_jobs.RaisesInReduce(),
            exiting=pickling_jobs.ExitsInReduce(),
            large=["w" * 50] * 5_000 + [Local()],
            evasive=pickling_jobs.Holder(lock=Local()),
        )
    )
    attributes: dict[str, Any] = got.__dict__
    assert attributes["number"] == 5
    assert attributes["numbers"] == {"a": [1, 2]}
    assert attributes["request_id"] == kinds.Frozen(7)
    assert "Local object at" in attributes["local"]
    assert "RaisesInReduce" in attributes["raising"]
    assert "ExitsInReduce" in attributes["exiting"]
    assert len(attributes["large"]) <= 500


def test_an_attribute_that_is_too_large_arrives_as_its_repr() -> None:
    got = sent(record_of("hello", large=list(range(100_000))))
    assert got.__dict__["large"] == "[0, 1, 2, 3, 4, 5, ...]"


def test_an_attribute_that_nothing_can_be_said_of_says_so() -> None:
    class Silent:
        def __repr__(self) -> NoReturn:
            raise SystemExit

    got = sent(record_of("hello", silent=Silent()))
    assert got.__dict__["silent"].endswith("Silent whose repr() raised SystemExit>")


def test_an_attribute_that_exists_in_the_worker_only_says_so() -> None:
    got = remote.decode_record(from_worker()[1])
    assert got.getMessage() == "hello you"
    assert got.__dict__["strange"] == "<__main__.Strange whose unpickling raised AttributeError>"


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("%d of them", ("many",), "%d of them [its arguments could not be put into it: TypeError"),
        ("none", ("one",), "none [its arguments could not be put into it: TypeError: not all"),
        (kinds.Unprintable(), (), "<its str() raised RuntimeError> [its arguments could not be"),
        ("%s", (kinds.Unprintable(),), "%s [its arguments could not be put into it: RuntimeError"),
    ],
)
def test_a_message_that_cannot_be_formatted_arrives_as_it_was_written(
    message: object, args: tuple[object, ...], expected: str
) -> None:
    assert sent(record_of(message, *args)).getMessage().startswith(expected)


def test_a_record_that_cannot_be_described_still_arrives() -> None:
    record = record_of("hello")
    del record.exc_info
    got = sent(record)
    assert (got.name, got.levelno, got.levelname) == ("shop", logging.WARNING, "WARNING")
    assert got.getMessage() == "<a log record that could not be described: AttributeError>"


def test_the_applications_own_records_are_made_here() -> None:
    class OwnRecord(logging.LogRecord):
        from_factory = True

    def refuse(*args: object, **kwargs: object) -> logging.LogRecord:
        raise RuntimeError("no record")

    previous = logging.getLogRecordFactory()
    try:
        logging.setLogRecordFactory(OwnRecord)
        assert isinstance(sent(record_of("hello")), OwnRecord)
        logging.setLogRecordFactory(refuse)
        assert sent(record_of("hello %s", "you")).getMessage() == "hello you"
    finally:
        logging.setLogRecordFactory(previous)
