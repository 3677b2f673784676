"""A call on its way out: pickled in the caller's time, before any worker is taken."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ...exceptions import NotPicklableError
from ...worker import Reporting
from . import pickling, wire
from .carriers import Carriers
from .preparation import main_module
from .shared import COPIED_WHOLE, THRESHOLD, Payload, dump

if TYPE_CHECKING:
    from ...engine.progress import Listener

__all__ = ["Encoder"]

known = pickling.known


class Encoder:
    """The part of the ``process`` backend that every caller uses, on its own thread.

    ``main_importable``: whether workers can import this process's main module.
    """

    def __init__(self, hooks: str | None, context: Sequence[str]) -> None:
        self.main_importable = main_module() is not None
        # What of the caller's context goes along with each call.
        self._capture: Callable[[], Any] | None = None
        # What a test run has replaced in this process; not every hooks module knows of that.
        self._describe_tests: Callable[[], Any] = _nothing
        # Types of arguments that must not be sent although pickle may take them, and why.
        self._refused: Mapping[type, str] = {}
        if hooks is not None:
            module = importlib.import_module(hooks)
            self._capture = module.capture
            self._describe_tests = getattr(module, "describe_tests", _nothing)
            self._refused = getattr(module, "REFUSED", {})
        self._carriers = Carriers(context) if context else None
        self._context = tuple(context)

    def encode(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        listener: Listener | None = None,
    ) -> bytes | Payload:
        """Return the frame of a call, or its parts if it has large ones.

        ``NotPicklableError`` says what cannot travel. Buffers of a ``Payload`` are the caller's
        own memory, read when the call begins.
        """
        reference: Any = None
        if self.main_importable and type(function) is FunctionType:
            reference = known.get(function)
        if reference is None:
            reference = pickling.reference(function, main_importable=self.main_importable)
            if reference is None:
                reference = function
        if listener is not None:
            if isinstance(reference, str):
                reference = wire.REPORTS + reference
            else:
                reference = Reporting(reference)
        captured = self._capture() if self._capture is not None else None
        if self._carriers is not None:
            captured = (captured, self._carriers.capture())
        value = (reference, args, kwargs, captured)
        try:
            pieces = False
            for argument in (*args, *kwargs.values()) if kwargs else args:
                kind = type(argument)
                if kind in COPIED_WHOLE and len(argument) >= THRESHOLD:
                    pieces = True
                elif kind in self._refused:
                    raise pickling.refused(function, args, kwargs, kind, self._refused[kind])
            if pieces:
                return dump(value, pieces=True)
            buffers: list[pickle.PickleBuffer] = []
            body = pickle.dumps(value, 5, buffer_callback=buffers.append)
            if buffers or len(body) >= THRESHOLD:
                return Payload([body], [buffer.raw() for buffer in buffers])
        except (KeyboardInterrupt, NotPicklableError):
            raise
        except BaseException as error:  # noqa: BLE001 - an argument's own code may raise anything
            try:
                return dump(value, pieces=True)  # takes memoryviews too, and odd buffers
            except KeyboardInterrupt:
                raise
            except BaseException:  # noqa: BLE001 - the first error explains it
                # It has the culprit's own error as its cause.
                context = self._named_context(captured)
                raise pickling.explain(error, function, args, kwargs, context)  # noqa: B904
        return wire.pack(len(body) << 8 | wire.CALL) + body

    def _named_context(self, captured: Any) -> dict[str, Any]:
        """Give what carriers have captured, by their paths."""
        values = captured[1] if self._carriers is not None else ()
        return {self._context[index]: value for index, value in values}


def _nothing() -> None:
    return None
