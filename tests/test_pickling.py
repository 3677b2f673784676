"""What leaves for a worker: functions by name, and refusals that say where the trouble is."""

from __future__ import annotations

import functools
import math
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leasepool_django.backends.process import pickling, remote
from leasepool_django.exceptions import NotPicklableError
from tests import pickling_jobs as jobs

ROOT = Path(__file__).parents[1]
HERE = "tests.pickling_jobs"
MACHINE = jobs.Machine()

# --- functions that go by name -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jobs.plain, f"{HERE}:plain"),
        (jobs.decorated, f"{HERE}:decorated"),
        (jobs.decorated.__wrapped__, f"{HERE}:decorated.__wrapped__"),  # type: ignore[attr-defined]
        (
            jobs.decorated_twice.__wrapped__.__wrapped__,  # type: ignore[attr-defined]
            f"{HERE}:decorated_twice.__wrapped__.__wrapped__",
        ),
        (jobs.cached, f"{HERE}:cached"),
        (jobs.Machine, f"{HERE}:Machine"),
        (jobs.Machine.Part, f"{HERE}:Machine.Part"),
        (jobs.Machine.static, f"{HERE}:Machine.static"),
        (jobs.Machine.method, f"{HERE}:Machine.method"),
        (math.factorial, "math:factorial"),
        (len, "builtins:len"),
        (dict, "builtins:dict"),
        (os.path.join, f"{os.path.__name__}:join"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_a_name_goes_by_it_and_is_found_by_it(function: Any, name: str) -> None:
    assert pickling.reference(function) == name
    assert pickling.reference(function) == name
    assert remote.resolve(name) is function


@pytest.mark.parametrize(
    "function",
    [
        MACHINE.method,
        jobs.Machine.of_class,
        functools.partial(jobs.plain, 1),
        functools.partial(functools.partial(jobs.plain), 1),
        functools.partial(MACHINE.method),
        jobs.CallableObject(),
        jobs.Unhashable(),
        [].append,
        str.upper,
        dict.fromkeys,
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_name_of_its_own_is_pickled(function: Any) -> None:
    assert pickling.reference(function) is None
    assert pickling.reference(function) is None
    pickle.dumps(function)


def test_an_object_with_the_name_of_a_nested_function_is_pickled() -> None:
    assert pickling.reference(functools.lru_cache(jobs.nest())) is None


def test_an_object_that_is_not_found_under_the_name_it_has_is_pickled() -> None:
    assert pickling.reference(functools.lru_cache(jobs.plain)) is None


def test_an_object_that_fails_on_attributes_is_pickled() -> None:
    assert pickling.reference(jobs.Evasive()) is None


def test_names_once_found_can_be_looked_up() -> None:
    pickling.known.clear()
    pickling.reference(jobs.plain)
    pickling.reference(math.factorial)
    pickling.reference(MACHINE.method)
    assert pickling.known == {jobs.plain: f"{HERE}:plain", math.factorial: "math:factorial"}


def test_names_are_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickling, "_MAX_KNOWN", 3)
    for name in dir(math):
        if callable(getattr(math, name)):
            pickling.reference(getattr(math, name))
            assert len(pickling.known) <= 3


# --- functions that no worker can run ------------------------------------------------------------

ASYNCHRONOUS = "is an asynchronous function; a worker runs plain functions. Make it `def`"
GENERATOR = "is a generator function, and a generator cannot be sent back from a worker. Return a"
NESTED = "is defined inside a function, where a worker cannot find it. Move it to the top level"
TAKEN = "is not what a worker finds under that name: another object has taken its place"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (jobs.square, f"{HERE}.<lambda> is a lambda, which a worker cannot find. Define a funct"),
        (lambda: None, "test_pickling.<lambda> is a lambda"),
        (functools.partial(lambda: None), "test_pickling.<lambda> is a lambda"),
        (jobs.nest(), f"{HERE}.nest.<locals>.nested {NESTED}"),
        (functools.partial(jobs.nest()), f"{HERE}.nest.<locals>.nested {NESTED}"),
        (jobs.badly_decorated, f"{HERE}.without_wraps.<locals>.wrapper {NESTED}"),
        (jobs.coroutine, f"{HERE}.coroutine {ASYNCHRONOUS}"),
        (functools.partial(jobs.coroutine), f"{HERE}.coroutine {ASYNCHRONOUS}"),
        (MACHINE.async_method, f"{HERE}.Machine.async_method {ASYNCHRONOUS}"),
        (jobs.Machine.async_method, f"{HERE}.Machine.async_method {ASYNCHRONOUS}"),
        (jobs.Machine.async_of_class, f"{HERE}.Machine.async_of_class {ASYNCHRONOUS}"),
        (jobs.AsyncCallable(), f"a {HERE}.AsyncCallable object {ASYNCHRONOUS}"),
        (functools.partial(jobs.AsyncCallable()), f"a {HERE}.AsyncCallable object {ASYNCHRONOUS}"),
        (jobs.async_generator, f"{HERE}.async_generator {ASYNCHRONOUS}"),
        (jobs.generator, f"{HERE}.generator {GENERATOR}"),
        (functools.partial(jobs.generator), f"{HERE}.generator {GENERATOR}"),
        (MACHINE.steps, f"{HERE}.Machine.steps {GENERATOR}"),
        (jobs.GeneratorCallable(), f"a {HERE}.GeneratorCallable object {GENERATOR}"),
        (jobs.the_replaced, f"{HERE}.replaced {TAKEN}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_worker_can_run_is_refused(function: Any, text: str) -> None:
    with pytest.raises(NotPicklableError) as raised:
        pickling.reference(function)
    assert text in str(raised.value)
    assert isinstance(raised.value, TypeError)
    assert raised.value.path == "fn"


def test_a_function_that_is_marked_as_a_coroutine_function_is_refused() -> None:
    from asgiref.sync import markcoroutinefunction, sync_to_async

    def marked() -> None:
        """Gives a coroutine, says its author."""

    for function in (markcoroutinefunction(marked), sync_to_async(jobs.plain)):
        with pytest.raises(NotPicklableError, match="is an asynchronous function"):
            pickling.reference(function)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            5,
            "type int is not callable. Pass the function itself and its arguments after it",
        ),
        (None, "type NoneType is not callable. Pass the function itself"),
        (
            "shop.cpu.score",
            "type str is not callable. Pass the function itself, not its name",
        ),
    ],
)
def test_what_is_not_callable_is_refused(value: Any, text: str) -> None:
    with pytest.raises(NotPicklableError, match=text):
        pickling.reference(value)


def test_a_coroutine_in_place_of_a_function_is_refused_and_closed() -> None:
    """No warning follows that it was never awaited."""
    coroutine: Any = jobs.coroutine()
    with pytest.raises(NotPicklableError, match="an object of type coroutine is not callable"):
        pickling.reference(coroutine)
    assert coroutine.cr_frame is None


def made_in(module: str | None) -> Callable[[], None]:
    scope: dict[str, Any] = {} if module is None else {"__name__": module}
    exec("def made(): pass", scope)
    made: Callable[[], None] = scope["made"]
    return made


@pytest.mark.parametrize("module", [None, "__console__"])
def test_a_function_of_an_interactive_session_is_refused(module: str | None) -> None:
    with pytest.raises(NotPicklableError, match="made is defined in an interactive session"):
        pickling.reference(made_in(module))


def test_a_function_of_a_module_that_cannot_be_imported_is_refused() -> None:
    with pytest.raises(NotPicklableError) as raised:
        pickling.reference(made_in("no_such_module_here"))
    assert str(raised.value) == (
        "no_such_module_here.made cannot be found by a worker: importing its module "
        "no_such_module_here raised ModuleNotFoundError."
    )
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_a_function_that_its_module_does_not_have_is_refused() -> None:
    with pytest.raises(NotPicklableError, match=r"is not in the module tests\.pickling_jobs"):
        pickling.reference(made_in(HERE))


@pytest.fixture
def main_function(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    function = made_in("__main__")
    monkeypatch.setattr(sys.modules["__main__"], "made", function, raising=False)
    # As in an interactive session; these tests may run in `python -m pytest`.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    return function


def test_a_function_of_the_main_module_goes_by_name(main_function: Callable[[], None]) -> None:
    assert pickling.reference(main_function) == "__main__:made"
    assert remote.resolve("__main__:made") is main_function


def test_a_function_of_a_main_module_that_is_not_a_file_is_refused(
    main_function: Callable[[], None],
) -> None:
    """Also when its name is known already, and behind partial."""
    pickling.reference(main_function)
    for function in (main_function, functools.partial(main_function)):
        with pytest.raises(NotPicklableError, match=r"in an interactive session or in `python -c`"):
            pickling.reference(function, main_importable=False)


def test_a_child_of_multiprocessing_names_the_main_module_as_its_parent_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = made_in("__mp_main__")
    main = types.ModuleType("__main__")
    main.made = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert pickling.reference(function) == "__main__:made"
    assert pickling.shown_name(function) == "__main__.made"


def test_a_script_names_the_functions_of_its_own_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from leasepool_django.backends.process.pickling import reference\n"
        "def work(): pass\n"
        "print(reference(work))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, env=environment
    )
    assert answer.stdout == "__main__:work\n"
