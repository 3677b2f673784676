"""What the ``leasepool`` command prints: results in order, failures, progress, times.

Results go to standard output in the order of the calls, each as soon as it and all before it are
known. Worker tracebacks and the progress bar go to standard error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from django.core.management.base import OutputWrapper
from django.core.serializers.json import DjangoJSONEncoder

from .calls import Call, Outcome

__all__ = ["Report"]

_BAR_WIDTH = 30
_CLEAR_LINE = "\r\x1b[K"


class Report:
    """Collects the outcomes of ``calls`` and prints them in order, as text or as JSON lines.

    ``progress``: whether to draw a bar. ``failed``: how many calls have failed so far.
    """

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
        self.failed = 0
        self._function = function
        self._calls = calls
        self._stdout = stdout
        self._stderr = stderr
        self._as_json = as_json
        self._progress = progress
        self._early: dict[int, Outcome] = {}
        self._known = 0
        self._printed = 0
        self._draw_bar()

    def add(self, index: int, outcome: Outcome) -> None:
        """Take the outcome of call ``index`` and print all that is in order by now."""
        self._early[index] = outcome
        self._known += 1
        self._clear_bar()
        while self._printed in self._early:
            self._print(self._printed, self._early.pop(self._printed))
            self._printed += 1
        self._draw_bar()

    def close(self) -> None:
        """Take the progress bar off the screen."""
        self._clear_bar()
        self._progress = False

    def summary(self, *, seconds: float, start_seconds: float, workers: int, pool: str) -> None:
        """Say how long all calls took together; nothing in JSON, where each line stands alone."""
        if self._as_json:
            return
        count = len(self._calls)
        self._stdout.write(
            f"{count} {'call' if count == 1 else 'calls'} on {workers} "
            f"{'worker' if workers == 1 else 'workers'} of pool {pool!r}: {seconds:.2f} s, after "
            f"{start_seconds:.2f} s to start the workers."
        )
        self._stdout.flush()

    def comparison(self, *, seconds: float, serial_seconds: float) -> None:
        """Say how the same calls fared one after the other in one process."""
        speed_up = serial_seconds / seconds if seconds else float("inf")
        if self._as_json:
            line = {
                "leased_seconds": round(seconds, 6),
                "serial_seconds": round(serial_seconds, 6),
                "speed_up": round(speed_up, 3),
            }
            self._stdout.write(json.dumps(line))
        else:
            self._stdout.write(
                f"The same calls one after the other in this process: {serial_seconds:.2f} s. "
                f"Leased workers were {speed_up:.2f} times as fast."
            )

    def _print(self, index: int, outcome: Outcome) -> None:
        call = self._calls[index]
        text = call.text(self._function)
        if self._as_json:
            self._stdout.write(_json_line(index, call, outcome))
        else:
            self._stdout.write(f"{text} {_ending(outcome)}")
        self._stdout.flush()
        if outcome.failure is not None:
            self.failed += 1
            where = "" if outcome.pid is None else f" in worker {outcome.pid}"
            details = outcome.failure.traceback_text or (
                f"{outcome.failure.type_name}: {outcome.failure.message}"
            )
            self._stderr.write(f"{text} failed{where}:\n{details.rstrip()}")

    def _draw_bar(self) -> None:
        if not self._progress or self._known == len(self._calls):
            return
        filled = _BAR_WIDTH * self._known // len(self._calls)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        self._write_bar(f"[{bar}] {self._known}/{len(self._calls)}")

    def _clear_bar(self) -> None:
        if self._progress:
            self._write_bar(_CLEAR_LINE)

    def _write_bar(self, text: str) -> None:
        self._stderr.write(text, style_func=str, ending="")
        self._stderr.flush()


def _ending(outcome: Outcome) -> str:
    facts = []
    if outcome.pid is not None:
        facts.append(f"worker {outcome.pid}")
    if outcome.seconds is not None:
        facts.append(f"{outcome.seconds:.3f} s")
    where = f"  ({', '.join(facts)})" if facts else ""
    if outcome.failure is not None:
        return f"failed: {outcome.failure.type_name}: {outcome.failure.message}{where}"
    return f"= {outcome.result!r}{where}"


def _json_line(index: int, call: Call, outcome: Outcome) -> str:
    line: dict[str, Any] = {
        "index": index,
        "args": call.args,
        "kwargs": call.kwargs,
        "ok": outcome.failure is None,
        "pid": outcome.pid,
        "seconds": None if outcome.seconds is None else round(outcome.seconds, 6),
    }
    if outcome.failure is not None:
        line["error"] = dataclasses.asdict(outcome.failure)
        return json.dumps(line)
    try:
        return json.dumps(line | {"result": outcome.result}, cls=_Encoder, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        # What JSON cannot say (bytes, NaN, keys that are tuples) is shown as Python shows it.
        return json.dumps(line | {"result_repr": repr(outcome.result)})


class _Encoder(DjangoJSONEncoder):
    def default(self, o: Any) -> Any:
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        return super().default(o)
