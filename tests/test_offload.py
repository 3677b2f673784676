"""``offload``: a function, or a method, that knows its pool and stays what it is."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from leasepool_django import LeaseTimeoutError, NotPicklableError, offload, pools, run_in_pool_sync
from leasepool_django.shortcuts import OffloadOptions
from tests.django_jobs import Gate, double, gates, quadruple, shown, through_gate, triple
from tests.waiting import async_wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

    from tests.conftest import LoopRunner

THREADS = {"BACKEND": "thread", "WORKERS_PER_POOL": 2}
PROCESSES = {"WORKERS_PER_POOL": 2}


@pytest.fixture(autouse=True, params=["thread", "process"])
def backend(request: pytest.FixtureRequest, settings: Settings) -> Iterator[str]:
    alias = THREADS if request.param == "thread" else PROCESSES
    settings.LEASEPOOL = {"default": alias, "reports": alias}
    yield request.param
    pools.reset()


@pytest.fixture
def gate(settings: Settings) -> Iterator[Gate]:
    settings.LEASEPOOL = {"default": THREADS, "reports": THREADS}
    gate = gates["test"] = Gate()
    yield gate
    gate.open.set()
    del gates["test"]


def test_an_offloaded_function_is_the_plain_function_when_called() -> None:
    assert triple(3) == 9
    assert quadruple(2, plus=1) == 9
    assert not any(manager.started for manager in pools.values())
    assert triple.__name__ == "triple"
    assert triple.__doc__ == "Three times as much."
    assert str(inspect.signature(quadruple)) == "(number: 'int', *, plus: 'int' = 0) -> 'int'"
    assert repr(quadruple) == "<offloaded tests.django_jobs.quadruple on 'reports'>"


def test_an_offloaded_function_runs_on_its_pool(loop_runner: LoopRunner) -> None:
    assert loop_runner(triple.run(3)) == 9
    assert triple.run_sync(4) == 12
    assert (pools["default"].started, pools["reports"].started) == (True, False)
    assert loop_runner(quadruple.run(2, plus=1)) == 9
    assert quadruple.run_sync(2) == 8
    assert pools["reports"].started


def test_a_parameter_may_have_any_name(loop_runner: LoopRunner) -> None:
    assert shown(self="me") == shown.run_sync(self="me") == "me"
    assert loop_runner(shown.run(self="me")) == "me"


def test_an_offloaded_function_runs_in_another_process(backend: str) -> None:
    if backend == "process":
        assert where.run_sync() != os.getpid()
    else:
        assert where.run_sync() == os.getpid()


@offload
def where() -> int:
    return os.getpid()


def test_an_offloaded_function_is_sent_like_any_other(loop_runner: LoopRunner) -> None:
    async def view() -> tuple[int, int]:
        async with pools["reports"].lease() as lease:
            return await asyncio.gather(lease.run(triple, 1), lease.run(quadruple, 2, plus=3))

    assert list(loop_runner(view())) == [3, 11]
    assert run_in_pool_sync(triple, 5) == 15


def test_a_function_of_somebody_else_can_be_offloaded_under_any_name(
    loop_runner: LoopRunner,
) -> None:
    mine = offload(double)
    assert mine(2) == 4
    assert mine.run_sync(3) == 6

    async def view() -> int:
        async with pools["default"].lease(workers=1) as lease:
            return await lease.run(mine, 4)

    assert loop_runner(view()) == 8


def test_an_offloaded_function_travels_by_name() -> None:
    assert pickle.loads(pickle.dumps(triple)) is triple
    assert pickle.loads(pickle.dumps(offload(double))) is double
    assert pickle.loads(pickle.dumps([quadruple, {"f": triple}])) == [quadruple, {"f": triple}]


def test_one_that_has_no_name_to_travel_by_cannot() -> None:
    @offload
    def nested() -> None: ...

    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(nested)


def test_options_change_what_they_name(gate: Gate) -> None:
    options = quadruple.options(timeout=0.05)
    assert options == OffloadOptions(quadruple, "reports", 0.05, None, "quadruple")
    assert options.run_sync(2, plus=1) == 9
    assert triple.options(pool="reports").pool == "reports"

    async def crowd() -> None:
        gated = offload(through_gate)
        busy = [asyncio.create_task(gated.run("test")) for _ in range(2)]
        for _ in busy:
            await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        with pytest.raises(LeaseTimeoutError):
            await triple.options(timeout=0.05).run(1)
        owners = {w.owner for p in pools["default"].stats().pools for w in p.workers}
        assert owners == {None}
        gate.open.set()
        assert await asyncio.gather(*busy) == ["passed", "passed"]

    asyncio.run(crowd())


def test_an_owner_shows_who_is_busy(gate: Gate) -> None:
    async def look() -> None:
        call = asyncio.create_task(offload(through_gate).options(owner="look").run("test"))
        await async_wait_until(lambda: gate.entered.acquire(blocking=False))
        owners = {w.owner for p in pools["default"].stats().pools for w in p.workers}
        assert "look" in owners
        gate.open.set()
        await call

    asyncio.run(look())


async def coroutine_function() -> None: ...


def generator_function() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [(coroutine_function, "coroutine function"), (generator_function, "generator function")],
)
def test_what_a_worker_cannot_run_is_refused_where_it_is_decorated(
    function: Callable[..., Any], reason: str
) -> None:
    with pytest.raises(TypeError, match=reason):
        offload(function)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"timeout": 0},
    {"timeout": "2"},
    {"call_timeout": -1},
    {"owner": 5},
    {"pool": 5},
    {"pool": ""},
]


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_refused_where_they_are_written(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        offload(**options)(double)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        triple.options(**options)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("reports", r"write @offload\(pool='reports'\)"),
        (5, "Decorate a function"),
    ],
)
def test_what_is_no_function_is_not_offloaded(wrong: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        offload(wrong)


# -- methods --------------------------------------------------------------------------------------


class Scale:
    """Has offloaded methods of every kind."""

    def __init__(self, factor: int, extra: object = None) -> None:
        self.factor = factor
        self.extra = extra

    @offload(pool="reports", owner="scale")
    def apply(self, number: int, *, plus: int = 0) -> int:
        """Scale a number."""
        return self.factor * number + plus

    @offload
    def pid(self) -> int:
        return os.getpid()

    @staticmethod
    @offload
    def twice(number: int) -> int:
        return 2 * number

    @offload
    @staticmethod
    def thrice(number: int) -> int:
        return 3 * number

    @offload(pool="reports")
    @classmethod
    def name(cls, suffix: str) -> str:
        """Give the name of the class."""
        return cls.__name__ + suffix

    @offload
    @classmethod
    def class_pid(cls) -> int:
        return os.getpid()

    @offload
    @classmethod
    def chain(cls, suffix: str) -> str:
        return f"{cls.__name__}: {suffix}"

    @offload
    @classmethod
    def __private(cls, suffix: str) -> str:
        return f"{cls.__name__}: {suffix}"

    @classmethod
    def by_private_name(cls, suffix: str) -> str:
        private: Any = cls.__private
        result: str = private.run_sync(suffix)
        return result

    @classmethod
    @offload
    def hidden(cls, suffix: str) -> str:
        return cls.__name__ + suffix

    measure = offload(len)


def test_an_offloaded_method_is_the_plain_method_when_called() -> None:
    assert Scale(3).apply(5) == 15
    assert Scale(3).apply(5, plus=1) == 16
    assert Scale.apply(Scale(3), 5) == 15
    assert not any(manager.started for manager in pools.values())


def test_an_offloaded_method_runs_on_its_pool_with_its_instance(
    loop_runner: LoopRunner, backend: str
) -> None:
    scale = Scale(3)
    assert loop_runner(scale.apply.run(5)) == 15
    assert scale.apply.run_sync(5, plus=1) == 16
    assert (pools["default"].started, pools["reports"].started) == (False, True)
    assert Scale.apply.run_sync(scale, 4) == 12
    assert (scale.pid.run_sync() == os.getpid()) == (backend == "thread")


def test_a_methods_options_keep_its_instance() -> None:
    options = Scale(3).apply.options(timeout=5)
    assert (options.pool, options.timeout, options.owner) == ("reports", 5, "scale")
    assert options.run_sync(5, plus=2) == 17
    assert Scale(2).apply.options(pool="default").pool == "default"
    assert "Scale object" not in repr(options)


def test_an_offloaded_method_is_sent_like_any_other() -> None:
    assert run_in_pool_sync(Scale(3).apply, 5) == 15
    assert pickle.loads(pickle.dumps(Scale(4).apply))(2) == 8
    assert pickle.loads(pickle.dumps(Scale.apply)) is Scale.apply


def test_an_offloaded_method_looks_like_a_method() -> None:
    method = Scale(3).apply
    assert method.__name__ == "apply"
    assert method.__doc__ == "Scale a number."
    assert str(inspect.signature(method)) == "(number: 'int', *, plus: 'int' = 0) -> 'int'"
    assert repr(method) == "<offloaded tests.test_offload.Scale.apply on 'reports'>"


def test_what_does_not_bind_is_the_function_itself() -> None:
    owners: list[Any] = [Scale, Scale(3)]
    for owner in owners:
        assert owner.twice(4) == owner.twice.run_sync(4) == 8
        assert owner.thrice(4) == owner.thrice.run_sync(4) == 12
        assert owner.measure("four") == owner.measure.run_sync("four") == 4


class Ruler(Scale):
    """Inherits class methods, and overrides some."""

    @offload
    @classmethod
    def chain(cls, suffix: str) -> str:
        parent: Any = super().chain
        return f"{parent.run_sync(suffix)} Ruler"

    first = vars(Scale)["name"]


def test_an_offloaded_class_method_runs_with_the_class_it_was_looked_up_on(
    loop_runner: LoopRunner, backend: str
) -> None:
    owners: list[Any] = [Scale, Scale(3), Ruler, Ruler(3)]
    ruler: Any = Ruler  # type checkers take a class method for what it is before it is offloaded
    for owner, name in zip(owners, ["Scale!", "Scale!", "Ruler!", "Ruler!"], strict=True):
        assert owner.name("!") == name
        assert owner.name.run_sync("!") == name
        assert loop_runner(owner.name.run("!")) == name
    assert (pools["default"].started, pools["reports"].started) == (False, True)
    assert ruler.name.options(pool="default", owner="me").run_sync("?") == "Ruler?"
    assert (owners[0].class_pid.run_sync() == os.getpid()) == (backend == "thread")
    assert run_in_pool_sync(ruler.name, "!") == "Ruler!"


def test_an_offloaded_class_method_is_the_one_that_was_looked_up() -> None:
    """By ``super()``, under another name, or under a private one."""
    ruler: Any = Ruler
    assert ruler.chain("x") == "Ruler: x Ruler"
    assert ruler.first.run_sync("!") == "Ruler!"
    assert ruler.by_private_name("x") == "Ruler: x"


def test_an_offloaded_class_method_looks_like_a_method() -> None:
    method: Any = Ruler.name
    assert method.__name__ == "name"
    assert method.__doc__ == "Give the name of the class."
    assert str(inspect.signature(method)) == "(suffix: 'str') -> 'str'"
    assert repr(method) == "<offloaded tests.test_offload.Scale.name on 'reports'>"
    assert pickle.loads(pickle.dumps(method))("!") == "Ruler!"


def test_an_offloaded_class_method_may_be_abstract() -> None:
    class Shape(ABC):
        @offload
        @classmethod
        @abstractmethod
        def area(cls) -> float: ...

    with pytest.raises(TypeError, match="abstract"):
        Shape()  # type: ignore[abstract]


def test_a_class_method_that_is_not_told_its_class_is_refused() -> None:
    ruler: Any = Ruler
    assert ruler.hidden("!") == "Ruler!"
    for refused in (ruler.hidden.run, ruler.hidden.run_sync, ruler.hidden.options):
        with pytest.raises(TypeError, match=r"Scale\.hidden .* Write @offload above @classmethod"):
            refused()


def test_a_class_method_that_a_worker_does_not_find_is_refused(backend: str) -> None:
    class Local:
        @offload
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    local: Any = Local
    if backend == "thread":
        assert local.name.run_sync() == "Local"
    else:
        with pytest.raises(NotPicklableError, match="its class must be at the top level"):
            local.name.run_sync()


@pytest.mark.parametrize("function", [coroutine_function, generator_function, len])
def test_a_class_method_that_cannot_run_on_a_worker_is_not_offloaded(function: Any) -> None:
    with pytest.raises(TypeError, match=r"^offload\(\) takes"):
        offload(classmethod(function))


def test_an_instance_that_cannot_be_sent_is_named(backend: str) -> None:
    if backend == "process":
        with pytest.raises(NotPicklableError, match=r"args\[0\]\.extra"):
            Scale(3, extra=lambda: None).apply.run_sync(5)
