"""What the ``leasepool`` command prints: results in order, failures, progress, times.

Results go to standard output, or to the file that was named, in the order of the calls, each as
soon as it and all before it are known. Worker tracebacks and the progress bar go to standard error.
Each line is flushed, so that whether it could be written is known at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from django.core.management.base import OutputWrapper
from django.core.serializers.json import DjangoJSONEncoder

from ..backends.process.texts import bounded
from .calls import Call, Failure, Outcome, shown
from .results import Results

__all__ = ["MapReport", "OutputError", "Printer", "Report", "counted", "visible"]

_BAR_WIDTH = 30
_BAR_SECONDS = 0.1  # between two drawings
_TRACEBACKS = 5  # of failed lines that are printed
_MAX_CALL_CHARS = 200  # of the call that such a line is
_CLEAR_LINE = "\r\x1b[K"
# What a terminal acts upon, but line ends and tabs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class OutputError(Exception):
    """A line could not be written, because of the ``OSError`` that ``Printer.broken`` is."""


class Printer:
    """Writes to both streams, and keeps a progress bar out of the way of all else.

    ``progress``: whether to draw one. ``failed``: how many calls have failed so far. ``broken``:
    what a write failed with. Methods that print raise ``OutputError`` then, ``close`` and
    ``last_words`` apart.
    """

    def __init__(self, stdout: OutputWrapper, stderr: OutputWrapper, *, progress: bool) -> None:
        self.failed = 0
        self.broken: OSError | None = None
        self._stdout = stdout
        self._stderr = stderr
        self._progress = progress
        self._bar_at = -_BAR_SECONDS

    def summary(self, *, seconds: float, start_seconds: float, workers: int, pool: str) -> None:
        """Say how long all calls took together."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the progress bar off the screen."""
        with contextlib.suppress(OutputError):
            self._clear_bar()
        self._progress = False

    def last_words(self, text: str) -> None:
        """Say on standard error why the command ends now."""
        self.close()
        with contextlib.suppress(OutputError):
            self._write(self._stderr, text)

    def stopped(self, what: str) -> None:
        """Say that the work was stopped, by ``what``."""
        self.last_words(f"{what}: the work was stopped.")

    def _draw_bar(self, known: int, total: int | None) -> None:
        """Show how many of ``total`` calls are done, unless that was just shown."""
        if not self._progress or known == total:
            return
        now = monotonic()
        if now - self._bar_at < _BAR_SECONDS:
            return
        self._bar_at = now
        if total is None:
            self._write_bar(f"\r{known} done")
            return
        filled = _BAR_WIDTH * known // total
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        self._write_bar(f"\r[{bar}] {known}/{total}")

    def _clear_bar(self) -> None:
        if self._progress:
            self._write_bar(_CLEAR_LINE)
            self._bar_at = -_BAR_SECONDS

    def _write_bar(self, text: str) -> None:
        self._write(self._stderr, text, style_func=str, ending="")

    def _write(self, stream: OutputWrapper, text: str, **how: Any) -> None:
        with self._noting_trouble():
            stream.write(_encodable(text, stream), **how)
            stream.flush()

    @contextlib.contextmanager
    def _noting_trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.broken = error
            raise OutputError(str(error)) from error


class Report(Printer):
    """Collects the outcomes of ``calls`` and prints them in order, as text or as JSON lines."""

    def __init__(
        self,
        function: str,
        calls: Sequence[Call],
        stdout: OutputWrapper,
        stderr: OutputWrapper,
        *,
        as_json: bool,
        progress: bool,
    ) -> None:
        super().__init__(stdout, stderr, progress=progress)
        self._function = function
        self._calls = calls
        self._as_json = as_json
        self._early: dict[int, Outcome] = {}
        self._known = 0
        self._printed = 0
        self._draw_bar(0, len(calls))

    def add(self, index: int, outcome: Outcome) -> None:
        """Take the outcome of call ``index`` and print all that is in order by now."""
        self._early[index] = outcome
        self._known += 1
        self._clear_bar()
        while self._printed in self._early:
            self._print(self._printed, self._early.pop(self._printed))
            self._printed += 1
        self._draw_bar(self._known, len(self._calls))

    def summary(self, *, seconds: float, start_seconds: float, workers: int, pool: str) -> None:
        """Say how long all calls took together; nothing in JSON, where each line stands alone."""
        if self._as_json:
            return
        calls = counted(len(self._calls), "call")
        self._write(self._stdout, _summary(calls, seconds, start_seconds, workers, pool))

    def comparison(self, *, seconds: float, serial_seconds: float) -> None:
        """Say how the same calls fared one after the other in one process."""
        speed_up = serial_seconds / seconds if seconds else float("inf")
        if self._as_json:
            line = {
                "leased_seconds": round(seconds, 6),
                "serial_seconds": round(serial_seconds, 6),
                "speed_up": round(speed_up, 3),
            }
            self._write(self._stdout, json.dumps(line))
        else:
            self._write(
                self._stdout,
                f"The same calls one after the other in this process: {serial_seconds:.2f} s. "
                f"Leased workers were {speed_up:.2f} times as fast.",
            )

    def no_comparison(self, why: str) -> None:
        """Say why there is none."""
        # A function that prints in this process may be the first to find that nobody reads.
        self._write(self._stdout, "", ending="")
        self._write(self._stderr, f"Not compared with doing it serially: {why}.")

    def text(self, call: Call) -> str:
        """The call as Python would write it."""
        return call.text(self._function)

    def _print(self, index: int, outcome: Outcome) -> None:
        call = self._calls[index]
        text = self.text(call)
        if self._as_json:
            self._write(self._stdout, _json_line(index, call, outcome))
        else:
            self._write(self._stdout, visible(f"{text} {_ending(outcome)}"))
        if outcome.failure is not None:
            self.failed += 1
            where = "" if outcome.pid is None else f" in worker {outcome.pid}"
            details = outcome.failure.traceback_text or _what(outcome.failure)
            self._write(self._stderr, visible(f"{text} failed{where}:\n{details.rstrip()}"))


class MapReport(Printer):
    """Writes the outcomes of lines, in their order, each as one JSON object a line.

    ``results``: where to, if not to standard output. ``written``: how many there have been. What
    cannot be said on standard error is left unsaid, for the results matter more.
    """

    results: Results | None = None
    written = 0
    _total: int | None = None

    def __init__(
        self,
        function: str,
        stdout: OutputWrapper,
        stderr: OutputWrapper,
        *,
        progress: bool,
    ) -> None:
        super().__init__(stdout, stderr, progress=progress)
        self._function = function

    def begin(self, total: int | None) -> None:
        """There are so many lines to write, if that is known."""
        self._total = total
        self._draw_bar(0, total)

    def add(self, line: int, call: Call, outcome: Outcome) -> None:
        """Write what became of ``line``, which comes after all that were written."""
        text = _outcome_line({"line": line}, outcome)
        if self.results is None:
            self._clear_bar()
            self._write(self._stdout, text)
        else:
            with self._noting_trouble():
                self.results.write(text)
        self.written += 1
        if outcome.failure is not None:
            self.failed += 1
            self._tell_failure(line, call, outcome.pid, outcome.failure)
        self._draw_bar(self.written, self._total)

    def _tell_failure(self, line: int, call: Call, pid: int | None, failure: Failure) -> None:
        if self.failed > _TRACEBACKS:
            return
        self._clear_bar()
        where = "" if pid is None else f" in worker {pid}"
        details = (failure.traceback_text or _what(failure)).rstrip()
        text = bounded(call.text(self._function), _MAX_CALL_CHARS)
        self._say(visible(f"line {line}: {text} failed{where}:\n{details}"))
        if self.failed == _TRACEBACKS:
            self._say("Further failures are told with the results only.")

    def summary(self, *, seconds: float, start_seconds: float, workers: int, pool: str) -> None:
        """Say how long all lines took together; on standard error, apart from the results."""
        lines = counted(self.written, "line")
        text = _summary(lines, seconds, start_seconds, workers, pool)
        self._say(text, style_func=str)

    def stopped(self, what: str) -> None:
        """Say what is there, too, where it can be gone on with."""
        if self.results is None or not self.results.has_lines:
            super().stopped(what)
            return
        self.last_words(
            f"{what}: the work was stopped. {self.results.path} holds what was done; the same "
            "command with --resume goes on behind it."
        )

    def _write_bar(self, text: str) -> None:
        self._say(text, style_func=str, ending="")

    def _say(self, text: str, **how: Any) -> None:
        try:
            self._write(self._stderr, text, **how)
        except OutputError:
            self.broken = None


def _summary(what: str, seconds: float, start_seconds: float, workers: int, pool: str) -> str:
    return (
        f"{what} on {counted(workers, 'worker')} of pool {pool!r}: {seconds:.2f} s, after "
        f"{start_seconds:.2f} s to start the workers."
    )


def counted(count: int, noun: str) -> str:
    """``1 call``, ``2 calls``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _encodable(text: str, stream: OutputWrapper) -> str:
    """Give ``text`` with escapes for the characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None)
    if encoding is None:  # a stream in memory
        return text
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _ending(outcome: Outcome) -> str:
    facts = []
    if outcome.pid is not None:
        facts.append(f"worker {outcome.pid}")
    if outcome.seconds is not None:
        facts.append(f"{outcome.seconds:.3f} s")
    where = f"  ({', '.join(facts)})" if facts else ""
    if outcome.failure is not None:
        return f"failed: {_what(outcome.failure)}{where}"
    return f"= {shown(outcome.result)}{where}"


def _what(failure: Failure) -> str:
    """The type and the message, as Python gives them at the end of a traceback."""
    return f"{failure.type_name}: {failure.message}" if failure.message else failure.type_name


def visible(text: str) -> str:
    """Give ``text`` with escapes for what a terminal would act upon."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _json_line(index: int, call: Call, outcome: Outcome) -> str:
    head: dict[str, Any] = {"index": index}
    for name, value in (("args", call.args), ("kwargs", call.kwargs)):
        # Python reads JSON that is nested a little deeper than what it writes here.
        said = _json({name: value}) is not None
        head |= {name: value} if said else {f"{name}_repr": shown(value)}
    return _outcome_line(head, outcome)


def _outcome_line(head: dict[str, Any], outcome: Outcome) -> str:
    line = head | {
        "ok": outcome.failure is None,
        "pid": outcome.pid,
        "seconds": None if outcome.seconds is None else round(outcome.seconds, 6),
    }
    if outcome.failure is not None:
        return json.dumps(line | {"error": dataclasses.asdict(outcome.failure)})
    # What JSON cannot say (bytes, NaN, keys that are tuples) is shown as Python shows it.
    return _json(line | {"result": outcome.result}) or json.dumps(
        line | {"result_repr": shown(outcome.result)}
    )


def _json(value: Any) -> str | None:
    """Give ``value`` as JSON; ``None`` where it cannot be said in JSON."""
    try:
        text = json.dumps(value, cls=_Encoder, allow_nan=False)
        json.loads(text, object_pairs_hook=_refuse_twins)
    except Exception:  # noqa: BLE001 - foreign code may raise anything
        return None
    return text


def _refuse_twins(pairs: list[tuple[str, Any]]) -> None:
    """Keys that are different in Python may be the same in JSON, such as ``1`` and ``"1"``."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError


class _Encoder(DjangoJSONEncoder):
    def default(self, o: Any) -> Any:
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        return super().default(o)
