"""Refusals that say what it is that cannot be sent, where it is, and what to do instead.

Long because there are so many kinds of objects that cannot travel.
"""

from __future__ import annotations

import asyncio
import functools
import pickle
import re
import socket
import sys
import threading
import time
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache, caches
from django.core.exceptions import SynchronousOnlyOperation
from django.core.files.uploadedfile import TemporaryUploadedFile
from django.core.handlers.wsgi import WSGIRequest
from django.db import connection
from django.test import RequestFactory
from django.utils.functional import SimpleLazyObject
from hypothesis import given, settings
from hypothesis import strategies as st

from leasepool_django.backends.process import culprit, hints, pickling
from leasepool_django.exceptions import NotPicklableError
from tests import pickling_jobs as jobs

HERE = "tests.pickling_jobs"


class Pair(NamedTuple):
    left: Any
    right: Any


LOCK = "A lock works in one process only: leave it out, or make it in the worker."


def explained(fn: Any, *args: Any, **kwargs: Any) -> NotPicklableError:
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - whatever pickling raises
        pickle.dumps((fn, args, kwargs), 5)
    error = pickling.explain(raised.value, fn, args, kwargs)
    assert error.__cause__ is not None
    assert error.__traceback__ is None
    return error


class Attributed(dict[str, Any]):
    """A dict with an attribute."""

    lock: Any


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow or busy machine changes nothing of what is found."""
    monkeypatch.setattr(culprit, "SEARCH_SECONDS", 1000)
    monkeypatch.setattr(culprit, "SEARCH_SECONDS_IN_ALL", 1000)


def a_lock() -> Any:
    return threading.Lock()


def holder_in_a_circle() -> jobs.Holder:
    first, second = jobs.Holder(), jobs.Holder()
    first.next, second.next = second, first  # type: ignore[attr-defined]
    second.lock = a_lock()  # type: ignore[attr-defined]
    return first


def attributed() -> Attributed:
    value = Attributed(fine=1)
    value.lock = a_lock()
    return value


def in_two_rings() -> list[Any]:
    """Fail in the first part too, but only because that leads back to the whole."""
    value: list[Any] = []
    value += [[value], a_lock()]
    return value


def in_its_own_list() -> list[Any]:
    value: list[Any] = [1]
    value += [value, a_lock()]
    return value


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (a_lock, ""),
        (lambda: [1, 2, {"items": (3, a_lock())}], "[2]['items'][1]"),
        (lambda: {"two words": a_lock()}, ".values()[0]"),
        (lambda: {5: 1, 6: a_lock()}, ".values()[1]"),
        (lambda: {a_lock(): 5}, ".keys()[0]"),
        (lambda: {"x" * 41: a_lock()}, ".values()[0]"),
        (lambda: frozenset([a_lock()]), "[0]"),
        (jobs.Client, ".pool.lock"),
        (lambda: jobs.Slotted(a_lock()), ".held"),
        (lambda: jobs.Renaming(a_lock()), "._lock"),
        (lambda: Pair(1, a_lock()), ".right"),
        (lambda: deque([1, a_lock()]), "[1]"),
        (lambda: UserDict(a=a_lock()), ".data['a']"),
        (lambda: OrderedDict(a=a_lock()), "['a']"),
        (lambda: defaultdict(list, a=[a_lock()]), "['a'][0]"),
        (attributed, ".lock"),
        (lambda: types.SimpleNamespace(a=a_lock()), ".a"),
        (lambda: ValueError("text", a_lock()), ".args[1]"),
        (lambda: functools.partial(print, 1, a_lock()), ".args[1]"),
        (lambda: functools.partial(jobs.plain, value=a_lock()), ".keywords['value']"),
        (lambda: jobs.Client().pool.__init__, ".__self__.lock"),  # type: ignore[misc]
        (holder_in_a_circle, ".next.lock"),
        (in_its_own_list, "[2]"),
        (in_two_rings, "[1]"),
        (jobs.TupleState, ".__getstate__()[0]"),
        (jobs.ReducesToPairs, "['a']"),
        (jobs.ObjectState, ".__getstate__()"),
        (lambda: [*range(300_000), a_lock()], "[300000]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_way_to_the_culprit_is_named(make: Callable[[], Any], path: str) -> None:
    error = explained(jobs.plain, 1, make())
    assert error.path == f"args[1]{path}"
    assert error.type_name == "_thread.lock"
    assert str(error) == (
        f"The arguments of {HERE}.plain cannot be sent to a worker: {error.path}: _thread.lock. "
        f"{LOCK}"
    )
    error = explained(jobs.plain, client=make())
    assert error.path == f"kwargs['client']{path}"


def test_an_argument_whose_name_is_no_name_goes_by_its_position() -> None:
    assert explained(jobs.plain, **{"a": 1, "not a name": a_lock()}).path == "kwargs.values()[1]"


def test_what_can_travel_though_pickle_refuses_it_is_not_blamed() -> None:
    view = memoryview(b"data")
    assert explained(jobs.plain, view, [view, a_lock()]).path == "args[1][1]"


def test_what_is_pickled_of_the_function_is_searched_too() -> None:
    assert explained(jobs.Client().pool.__init__).path == "fn.__self__.lock"  # type: ignore[misc]
    assert explained(functools.partial(jobs.plain, a_lock())).path == "fn.args[0]"
    named = explained(functools.partial(jobs.plain, a_lock()))
    assert str(named).startswith(f"The arguments of {HERE}.plain cannot be sent to a worker: fn.")


def test_a_function_that_is_refused_is_the_culprit() -> None:
    error = pickling.explain(TypeError("no"), lambda: None, (a_lock(),), {})
    assert "is a lambda" in str(error)


@pytest.mark.parametrize(
    ("make", "path", "text"),
    [
        (
            lambda: (item for item in [5]),
            "",
            "generator. Send a list of what it yields: list(...).",
        ),
        ({}.keys, "", "dict_keys. Send a list: list(...)."),
        (lambda: types.MappingProxyType({}), "", "mappingproxy. Send a dict: dict(...)."),
        (lambda: sys, "", "module. Import the module inside the function."),
        (lambda: lambda: 1, "", "function. It is a lambda: define a function at the top level"),
        (jobs.nest, "", "function. It is defined inside a function: move it to the top level"),
        (lambda: defaultdict(lambda: 1), ".default_factory", "function. It is a lambda"),
        (sys._getframe, "", "frame. Send text: traceback.format_exc()."),
        (threading.local, "", "_thread._local. Send the values that the function needs."),
        (jobs.RaisesInReduce, "", f"{HERE}.RaisesInReduce, whose pickling raised ValueError."),
        (jobs.ExitsInReduce, "", f"{HERE}.ExitsInReduce, whose pickling raised SystemExit."),
        (type("Made", (), {}), "", "tests.test_culprit.Made."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_to_do_instead_is_said(make: Callable[[], Any], path: str, text: str) -> None:
    error = explained(jobs.plain, make())
    assert error.path == f"args[0]{path}"
    assert f"cannot be sent to a worker: args[0]{path}: {text}" in str(error)


def test_an_object_of_a_class_in_a_function_is_the_culprit_itself() -> None:
    class Local:
        """Cannot be found by name."""

    error = explained(jobs.plain, [Local()])
    assert str(error).endswith(
        "args[0][0]: tests.test_culprit.test_an_object_of_a_class_in_a_function_is_the_culprit_"
        "itself.<locals>.Local. Its class is defined inside a function: move it to the top level "
        "of a module."
    )


def test_an_open_file_and_a_socket_are_told_apart(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert "_io.BufferedWriter. An open file belongs to" in str(explained(jobs.plain, file))
    with socket.socket() as opened:
        error = explained(jobs.plain, jobs.Holder(connection=opened))
        assert "args[0].connection: socket.socket. A socket belongs to its p" in str(error)


def test_a_coroutine_is_to_be_awaited_first() -> None:
    coroutine = jobs.coroutine()
    assert "Await it first, and send what it gives" in str(explained(jobs.plain, coroutine))
    coroutine.close()


def wsgi_request() -> WSGIRequest:
    request = RequestFactory().get("/")
    request.environ["wsgi.errors"] = sys.__stderr__
    return request


def test_django_objects_are_told_by_name() -> None:
    error = explained(jobs.plain, wsgi_request())
    assert str(error.path).startswith("args[0].META.values()[")
    assert "A request belongs to the process that answers it: send the data" in str(error)
    error = explained(jobs.plain, db=connection)
    assert str(error.path).startswith("kwargs['db']._connections.")
    assert "use django.db inside the function, where each worker has its own" in str(error)
    upload = TemporaryUploadedFile("name", "text/plain", 0, None)
    error = explained(jobs.plain, jobs.Holder(upload=upload))
    upload.close()
    assert "Send what was uploaded (its read()) or the path of its temporary file" in str(error)
    for made in (caches, cache, caches["default"]):
        error = explained(jobs.plain, made)
        assert "A cache belongs to its process: use django.core.cache inside" in str(error)


def test_what_would_ask_the_database_is_to_be_evaluated_first() -> None:
    """As ``request.user`` in an async view; looking at it for its type asks as well."""
    asyncio.run(refuse_to_ask_the_database())


async def refuse_to_ask_the_database() -> None:
    for value in (SimpleLazyObject(User.objects.first), User.objects.all()):
        error = explained(jobs.plain, 1, [value])
        assert error.path == "args[1][0]"
        assert type(error.__cause__) is SynchronousOnlyOperation
        assert str(error).endswith(
            "It would ask the database, for which an event loop must not wait. Evaluate it first: "
            "await request.auser(), [x async for x in queryset]; or send the primary key."
        )


def test_a_class_without_a_module_can_be_the_culprit() -> None:
    assert explained(jobs.plain, jobs.Homeless()).path == "args[0]"


def test_an_object_that_resists_being_looked_at_is_the_culprit() -> None:
    error = explained(jobs.plain, good=1, bad=jobs.Resists())
    assert error.path == "kwargs['bad']"
    assert str(error).endswith(
        "kwargs['bad']: tests.pickling_jobs.Resists, whose pickling raised ValueError."
    )


def test_a_class_that_is_in_no_module_is_said_to_be_missing() -> None:
    """Made in an interactive session, it may have a module that cannot be imported, or none."""
    for module, shown in (("__console__", "__console__.Order"), ("builtins", "Order")):
        order = type("Order", (), {"__module__": module, "__qualname__": "Order"})
        assert str(explained(jobs.plain, order())).endswith(
            f"args[0]: {shown}. Its class is not in the module {module}, where a worker looks for "
            "it, as when it was made in an interactive session: move it to a module."
        )
        assert ". It is not in the module" in str(explained(jobs.plain, order))


def test_clients_are_told_by_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a class of the project's own that is derived from one."""
    monkeypatch.setattr(jobs.Client, "__module__", "redis.client")
    monkeypatch.setitem(sys.modules, "redis.client", jobs)
    error = explained(jobs.plain, client=jobs.Client())
    assert str(error).endswith(
        "kwargs['client'].pool.lock: _thread.lock. It holds open connections: create it in the "
        "worker, and send it only data."
    )
    for package in hints._DATABASE_PACKAGES:
        monkeypatch.setattr(jobs.Client, "__module__", package)
        assert "use django.db inside" in str(hints.hint_for([jobs.Client()], TypeError()))


def test_no_value_is_in_the_text() -> None:
    secret = "s3cr3t-token"
    value = {secret: [secret, {"a" + secret: a_lock()}], "n": jobs.Holder(secret=secret)}
    error = explained(jobs.plain, secret, value, token=secret)
    assert secret not in str(error)
    assert secret not in repr(error.__dict__)


def test_what_pickling_raised_is_the_cause_with_its_own_frames_only() -> None:
    error = explained(jobs.plain, [jobs.RaisesInReduce()])
    assert isinstance(error.__cause__, ValueError)
    assert str(error.__cause__) == "reduced"
    entry = error.__cause__.__traceback__
    assert entry is not None
    assert entry.tb_frame.f_code.co_name == "__reduce__"
    assert entry.tb_next is None


def test_what_is_nested_too_deeply_is_said_to_be() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    error = explained(jobs.plain, 1, nested)
    assert error.path == "args[1]"
    assert str(error).endswith(
        "args[1] is nested too deeply to be pickled. Send a flatter structure."
    )
    while nested:
        nested = nested.pop()


def test_a_recursion_of_its_own_code_is_the_objects_fault() -> None:
    error = explained(jobs.plain, [jobs.RecursesInGetstate()])
    assert error.path == "args[0][0]"
    assert str(error).endswith(f"{HERE}.RecursesInGetstate, whose pickling raised RecursionError.")


def test_little_stack_left_is_enough_for_an_answer() -> None:
    def at_the_edge() -> NotPicklableError:
        try:
            return at_the_edge()
        except RecursionError:
            return pickling.explain(TypeError("no"), jobs.plain, (a_lock(),), {})

    error = at_the_edge()
    assert str(error).startswith(f"The arguments of {HERE}.plain cannot be sent to a worker: ")


def test_lack_of_memory_is_not_searched_for() -> None:
    failure = MemoryError()
    error = pickling.explain(failure, jobs.plain, (a_lock(),), {})
    assert "there is not enough memory to pickle them. Send less" in str(error)
    assert error.__cause__ is failure


def test_what_fails_only_once_is_not_blamed() -> None:
    error = pickling.explain(ValueError("once"), jobs.plain, (1, [2]), {})
    assert str(error).endswith("cannot be sent to a worker: pickling raised ValueError.")
    assert error.path is None


def test_an_interrupt_is_not_taken_for_an_answer() -> None:
    class Interrupts:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    for argument in (Interrupts(), jobs.InterruptsTheSecondTime()):
        with pytest.raises(KeyboardInterrupt):
            pickling.explain(TypeError("no"), jobs.plain, (argument,), {})


def test_the_search_ends_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    large = [[(object(), number) for number in range(1_000)] for _ in range(200)]

    def search(seconds: float) -> tuple[float, NotPicklableError]:
        monkeypatch.setattr(culprit, "SEARCH_SECONDS", seconds)
        start = time.thread_time()
        error = explained(jobs.plain, 1, jobs.Holder(rest=large, lock=a_lock()))
        return time.thread_time() - start, error

    for_long, found = search(1000)
    assert found.path == "args[1].lock"
    shortly, error = search(for_long / 100)
    assert error.path is None or error.path.startswith("args[1]")
    assert shortly < for_long
    monkeypatch.setattr(culprit, "SEARCH_SECONDS", -1)
    error = explained(jobs.plain, 1, a_lock())
    assert str(error).endswith("cannot be sent to a worker: pickling raised TypeError.")


def test_an_inexact_answer_says_so() -> None:
    nested: Any = a_lock()
    for _ in range(culprit.MAX_DEPTH + 10):
        nested = jobs.Holder(inner=nested)
    error = explained(jobs.plain, nested)
    assert error.path == "args[0]" + ".inner" * (culprit.MAX_DEPTH - 1)
    assert f"{HERE}.Holder (or something inside it)." in str(error)


def test_a_result_is_explained_in_the_same_way() -> None:
    value = {"rows": [a_lock()]}
    error = pickling.explain_result(TypeError("no"), value, "shop.cpu.score")
    assert str(error) == (
        "The result of shop.cpu.score cannot be sent back from the worker: result['rows'][0]: "
        f"_thread.lock. {LOCK}"
    )


def test_the_search_ends_where_the_objects_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the callers on the same event loop would have to wait for."""

    class Waits:
        def __reduce__(self) -> Any:
            waited.append(threading.Event().wait(0.001))
            return list, ()

    def search(seconds: float) -> tuple[int, NotPicklableError]:
        monkeypatch.setattr(culprit, "SEARCH_SECONDS_IN_ALL", seconds)
        waited.clear()
        return len(waited), explained(jobs.plain, 1, many)

    waited: list[bool] = []
    many: Any = [Waits() for _ in range(20)]
    for _ in range(5):
        many = [*(Waits() for _ in range(20)), [many, a_lock()]]
    _, found = search(1000)
    assert found.path is not None
    assert found.path.endswith("[1]")
    for_long = len(waited)
    _, error = search(0.005)
    assert len(waited) < for_long
    assert error.path != found.path


def test_a_worker_that_does_not_compute_searches_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is stopped, or waits for a core, as where one of the objects waits."""
    monkeypatch.setattr(culprit, "SEARCH_SECONDS", 0.25)

    class Waits:
        def __reduce__(self) -> Any:
            waited.append(threading.Event().wait(2 * culprit.SEARCH_SECONDS))
            return list, ()

    waited: list[bool] = []
    error = pickling.explain_result(TypeError("no"), [Waits(), [a_lock()]], "shop.cpu.score")
    assert waited
    assert error.path == "result[1][0]"


# A value with one lock in it somewhere: leaves, and what may be around them.
leaves = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just(()), st.binary())
names = st.from_regex(re.compile(r"[a-z]{1,5}", re.ASCII), fullmatch=True)


def wrap(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def among(value: Any, others: list[Any], position: int) -> list[Any]:
        return [*others[:position], value, *others[position:]]

    listed = st.builds(among, inner, st.lists(leaves, max_size=4), st.integers(0, 4))
    return st.one_of(
        listed,
        listed.map(tuple),
        listed.map(lambda values: {f"k{i}": value for i, value in enumerate(values)}),
        listed.map(lambda values: jobs.Holder(**{f"a{i}": v for i, v in enumerate(values)})),
        inner.map(jobs.Slotted),
        st.builds(lambda name, value: OrderedDict({name: value}), names, inner),
        inner.map(lambda value: functools.partial(jobs.plain, value)),
        inner.map(lambda value: Pair(1, value)),
    )


@settings(max_examples=150, deadline=None)
@given(value=st.recursive(st.builds(a_lock), wrap, max_leaves=6), before=st.lists(leaves))
def test_the_way_that_is_named_leads_to_the_culprit(value: Any, before: list[Any]) -> None:
    args = (*before, value)
    error = explained(jobs.plain, *args)
    assert error.path is not None
    assert isinstance(eval(error.path, {"args": args}), type(a_lock()))
