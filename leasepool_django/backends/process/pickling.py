"""What leaves for a worker: functions by name, and what to say when something cannot travel.

Used by the parent before a call is sent, and, for results, by a worker whose result cannot be
pickled. ``remote.resolve`` is the other end of ``reference``; the search for the culprit among
arguments is in ``culprit``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from types import (
    BuiltinFunctionType,
    CoroutineType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any, NoReturn

from leasepool_django.exceptions import NotPicklableError

from .culprit import Part, blame, by_key
from .texts import type_name

__all__ = ["cannot_be_reported", "explain", "explain_result", "known", "reference", "shown_name"]

known: dict[Any, str] = {}
"""The names of the functions that ``reference`` has found before.

For callers on the hot path, who may look here first: ``known.get(fn)``, with ``TypeError`` for a
callable that cannot be hashed."""

_MAX_KNOWN = 4_096
_MAX_WRAPPERS = 8


def reference(fn: Callable[..., Any], *, main_importable: bool = True) -> str | None:
    """Give ``"module:qualname"``, by which a worker finds ``fn``, or ``None`` to pickle ``fn``.

    A function that its decorator hides is named through the decorator's result:
    ``"shop.cpu:score.__wrapped__"``. To be pickled by value are bound methods,
    ``functools.partial`` and other callable objects that have no name of their own.

    Raises ``NotPicklableError``, which says what to do instead, for what no worker can run:
    lambdas and nested functions, coroutine and generator functions (behind ``partial`` too),
    functions that are not found under their name, what is not callable, and functions of
    ``__main__`` if a worker cannot import that (``main_importable``).
    """
    try:
        name = known.get(fn)
    except TypeError:  # a callable object that cannot be hashed
        name = None
    if name is not None and (main_importable or not name.startswith("__main__:")):
        return name
    target: Any = fn
    while isinstance(target, functools.partial):
        target = target.func
    _refuse_kinds(target)
    name = _name_of(target, main_importable=main_importable)
    if target is not fn:
        return None
    if name is not None and (isinstance(fn, BuiltinFunctionType) or _hashed_by_identity(fn)):
        if len(known) >= _MAX_KNOWN:
            known.clear()
        known[fn] = name
    return name


def explain(
    error: BaseException,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Mapping[str, Any] = MappingProxyType({}),
) -> NotPicklableError:
    """Give the error to raise when a call could not be pickled because of ``error``.

    It names what is to blame and the way to it (``path``: ``kwargs['client'].pool``), its type,
    and what to send instead; what its pickling raised is its ``__cause__``. ``context``: the
    values that go along with the call, by the paths of their carriers.
    """
    try:
        named = reference(fn)
        if named is None and _error_of(fn) is not None:
            _refuse_local_wrapped(fn)
    except NotPicklableError as refusal:
        return refusal.with_traceback(None)
    for path, value in context.items():
        if its_error := _error_of(value):
            return blame(
                its_error,
                [Part(f"CONTEXT[{path!r}]", value)],
                subject=f"The context of {shown_name(fn)} cannot be sent to a worker",
            )
    sent = [] if named else [Part("fn", fn)]
    sent += [Part(f"args[{position}]", value) for position, value in enumerate(args)]
    sent += [
        Part(by_key("kwargs", name, position), value)
        for position, (name, value) in enumerate(kwargs.items())
    ]
    return blame(
        error, sent, subject=f"The arguments of {shown_name(fn)} cannot be sent to a worker"
    )


def _error_of(value: object) -> BaseException | None:
    """What pickling ``value`` by itself raises, if it does."""
    try:
        pickle.dumps(value, 5)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - foreign code, which may raise anything
        return error
    return None


def refused(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], kind: type, why: str
) -> NotPicklableError:
    """Give the error for an argument of a type that must not be sent, whatever pickle says."""
    paths = [f"args[{position}]" for position, value in enumerate(args) if type(value) is kind]
    paths += [
        by_key("kwargs", name, position)
        for position, (name, value) in enumerate(kwargs.items())
        if type(value) is kind
    ]
    name = f"{kind.__module__}.{kind.__qualname__}"
    return NotPicklableError(
        f"The arguments of {shown_name(fn)} cannot be sent to a worker: {paths[0]}: {name}; {why}.",
        path=paths[0],
        type_name=name,
    )


def explain_result(error: BaseException, result: object, function: str) -> NotPicklableError:
    """Give the error to raise when a result could not be pickled because of ``error``."""
    return blame(
        error,
        [Part("result", result)],
        subject=f"The result of {function} cannot be sent back from the worker",
        patient=True,
    )


def cannot_be_reported(error: BaseException, value: object) -> NotPicklableError:
    """Give the error to raise when a report could not be pickled because of ``error``."""
    return blame(error, [Part("value", value)], subject="A report of progress cannot be sent")


def shown_name(fn: object) -> str:
    """Give the name of a function for texts: ``"shop.cpu.score"``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    module, qualname = _names(fn)
    if qualname is None:
        return f"a {type_name(fn)} object"
    if module == "__mp_main__":
        module = "__main__"
    return f"{module}.{qualname}" if module and module != "builtins" else qualname


def _hashed_by_identity(fn: object) -> bool:
    # Another object equal to a known one would be taken for it.
    return type(fn).__hash__ is object.__hash__


def _attribute(target: object, name: str) -> Any:
    try:
        return getattr(target, name, None)
    except Exception:  # noqa: BLE001 - a foreign __getattr__ that fails does not have it
        return None


def _names(target: object) -> tuple[str | None, str | None]:
    """Give ``__module__`` and ``__qualname__`` where they are strings."""
    module = _attribute(target, "__module__")
    qualname = _attribute(target, "__qualname__")
    return (
        module if isinstance(module, str) else None,
        qualname if isinstance(qualname, str) else None,
    )


def _refuse_kinds(target: Any) -> None:
    if not callable(target):
        _refuse_uncallable(target)
    if isinstance(target, type):
        return
    called = target
    if not isinstance(target, FunctionType | MethodType | BuiltinFunctionType):
        called = getattr(type(target), "__call__", None)  # noqa: B004 - the function itself
    for function in (target, called):
        if _is_plain(function):
            continue
        if any(_says(question, function) for question in _ASYNCHRONOUS):
            raise _refusal(
                target,
                "is an asynchronous function; a worker runs plain functions. Make it `def`, or, "
                "if it waits more than it computes, await it here without a worker",
            )
        if _says(inspect.isgeneratorfunction, function):
            raise _refusal(
                target,
                "is a generator function, and a generator cannot be sent back from a worker. "
                "Return a list: `return list(...)`",
            )


def _says(question: Callable[[Any], bool], function: Any) -> bool:
    try:
        return question(function)
    except Exception:  # noqa: BLE001 - a foreign __getattr__ that fails is no answer
        return False


def _is_marked(function: Any) -> bool:
    """Whether Python 3.11 or asgiref has marked a plain function that gives a coroutine."""
    # Not imported here, where it takes long: whoever has marked a function has loaded it.
    mark = getattr(sys.modules.get("asyncio.coroutines"), "_is_coroutine", None)
    return mark is not None and getattr(function, "_is_coroutine", None) is mark


_ASYNCHRONOUS = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, _is_marked)


def _is_plain(function: object) -> bool:
    """Whether a look at the code tells that it is a plain function; inspect takes far longer."""
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType):
        return isinstance(function, BuiltinFunctionType)
    return not (function.__code__.co_flags & _NOT_PLAIN or function.__dict__)


_NOT_PLAIN = (
    inspect.CO_COROUTINE
    | inspect.CO_GENERATOR
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)


def _refuse_uncallable(target: object) -> NoReturn:
    if isinstance(target, CoroutineType):
        target.close()  # it will not be awaited, and the error says all there is to say
    advice = "Pass the function itself and its arguments after it: run(fn, 1, 2), not run(fn(1, 2))"
    if isinstance(target, str):
        advice = "Pass the function itself, not its name"
    raise NotPicklableError(
        f"A call needs a function, and an object of type {type_name(target)} is not callable. "
        f"{advice}.",
        path="fn",
        type_name=type_name(target),
    )


def _refusal(target: object, reason: str, cause: BaseException | None = None) -> NotPicklableError:
    error = NotPicklableError(
        f"{shown_name(target)} {reason}.", path="fn", type_name=type_name(target)
    )
    error.__cause__ = cause
    return error


def _name_of(target: Any, *, main_importable: bool) -> str | None:
    """Give the name under which exactly ``target`` is found; ``None`` to pickle it."""
    if isinstance(target, MethodType):
        return None
    # A method of an object of an extension type has the object in place of the module.
    if isinstance(target, BuiltinFunctionType) and not isinstance(
        target.__self__, ModuleType | None
    ):
        return None
    module_name, qualname = _names(target)
    must_be_found = isinstance(target, FunctionType | type)
    if qualname is None or (module_name is None and not must_be_found):
        return None
    if must_be_found:
        _refuse_local(target, qualname)
    elif "<locals>" in qualname:
        return None
    # A child of multiprocessing knows the main module by this name too.
    if module_name == "__mp_main__":
        module_name = "__main__"
    if module_name in (None, "__console__") or (module_name == "__main__" and not main_importable):
        where = "an interactive session or in `python -c`, where a worker cannot find it"
        if module_name == "__main__" and getattr(sys.modules["__main__"], "__spec__", None):
            where = "the `__main__` of a package, directory or zip file, which no worker can import"
        raise _refusal(
            target, f"is defined in {where}. Move it to a module and import it from there"
        )
    name = f"{module_name}:{qualname}"
    found = _found(target, str(module_name), qualname)
    for _ in range(_MAX_WRAPPERS):
        if found is target:
            return name
        found = _attribute(found, "__wrapped__")
        name += ".__wrapped__"
    if not must_be_found:
        return None
    if _found(target, str(module_name), qualname) is None:
        raise _refusal(
            target,
            f"is not in the module {module_name}, where a worker looks for it: it was removed, or "
            "was defined in an interactive shell. Move it to a module and import it from there",
        )
    raise _refusal(
        target,
        "is not what a worker finds under that name: another object has taken its place. If a "
        "decorator did that, let it use functools.wraps; or pass the object that has the name",
    )


def _refuse_local(target: object, qualname: str) -> None:
    if qualname.rpartition(".")[2] == "<lambda>":
        raise _refusal(
            target,
            "is a lambda, which a worker cannot find. Define a function with `def` in a module",
        )
    if "<locals>" in qualname:
        raise _refusal(
            target,
            "is defined inside a function, where a worker cannot find it. Move it to the top "
            "level of its module; if a decorator made it, let the decorator use functools.wraps",
        )


def _refuse_local_wrapped(fn: Any) -> None:
    """Refuse what a decorator has made of a lambda or nested function, with the same advice."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    wrapped = fn
    for _ in range(_MAX_WRAPPERS):
        wrapped = _attribute(wrapped, "__wrapped__")
        if isinstance(wrapped, FunctionType):
            _refuse_local(fn, wrapped.__qualname__)


def _found(target: object, module_name: str, qualname: str) -> object:
    try:
        found: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
    except Exception as error:  # whatever a module raises on import
        raise _refusal(
            target,
            f"cannot be found by a worker: importing its module {module_name} raised "
            f"{type_name(error)}",
            error,
        ) from error
    for part in qualname.split("."):
        found = _attribute(found, part)
    return found
