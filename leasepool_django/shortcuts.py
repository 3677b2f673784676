"""What views call: ``run_in_pool``, ``with_lease`` and ``offload``, and their blocking twins.

Long because both decorators exist once for running and once for type checkers.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import pkgutil
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from .conf import DEFAULT_ALIAS
from .engine.calls import checked_owner
from .engine.config import optional_duration, positive_int
from .engine.coroutines import coroutine_function, refuse_running_loop
from .exceptions import LeasePoolNotStartedError, LeaseUnavailableError, NotPicklableError
from .handler import pools
from .middleware import is_no_capacity, no_capacity_response

__all__ = [
    "OffloadOptions",
    "OffloadedClassMethod",
    "OffloadedFunction",
    "OffloadedMethod",
    "offload",
    "run_in_pool",
    "run_in_pool_sync",
    "with_lease",
]

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R", bound=HttpResponseBase)


# As in the engine, those named run are plain functions that return the coroutine, so that the
# arguments, which may be secret, are in no frame of a traceback.


@coroutine_function
def run_in_pool(
    fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[None, None, T]:
    """Run ``fn(*args, **kwargs)`` on one worker of the alias ``"default"`` and return its result.

    Raises what ``fn`` raises, and what ``LeasedExecutorManager.run`` does. Cancelling the awaiting
    task stops the call.
    """
    return pools[DEFAULT_ALIAS].run(fn, *args, **kwargs)


def run_in_pool_sync(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """``run_in_pool`` for sync views and other blocking code.

    Raises ``RuntimeError`` on the thread of a running event loop, which it would block.
    """
    refuse_running_loop("run_in_pool_sync(...)", "await run_in_pool(...)")
    try:
        run = pools[DEFAULT_ALIAS].prepare_sync(fn, *args, **kwargs)
    finally:
        del args, kwargs
    return run()


@dataclass(frozen=True)
class OffloadOptions(Generic[P, T]):
    """An offloaded function with its settings: the pool's alias, seconds to wait, owner.

    ``timeout``: seconds to wait for a worker; ``call_timeout``: seconds the call may run;
    ``None`` in either is as the alias has it. ``bound``: arguments sent before those of the call,
    which is the instance of a method.
    """

    function: Callable[..., T]
    pool: str = DEFAULT_ALIAS
    timeout: float | None = None
    call_timeout: float | None = None
    owner: str | None = None
    bound: tuple[Any, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _checked_pool(self.pool)
        optional_duration("timeout", self.timeout)
        optional_duration("call_timeout", self.call_timeout)
        checked_owner(self.owner)

    @coroutine_function
    def run(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, T]:
        """Run the function on a worker of its pool and return its result."""
        options = pools[self.pool].options(
            timeout=self.timeout, call_timeout=self.call_timeout, owner=self.owner
        )
        return options.run(self.function, *self.bound, *args, **kwargs)

    def run_sync(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for blocking code; ``RuntimeError`` on the thread of a running event loop."""
        try:
            run = self.prepare_sync(*args, **kwargs)
        finally:
            del args, kwargs
        return run()

    def prepare_sync(self, /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """``run_sync`` in two steps: what is returned runs the call."""
        options = pools[self.pool].options(
            timeout=self.timeout, call_timeout=self.call_timeout, owner=self.owner
        )
        try:
            return options.prepare_sync(self.function, *self.bound, *args, **kwargs)
        finally:
            del args, kwargs


class _Offloaded(Generic[P, T]):
    """What functions and methods have in common: a plain callable and its options."""

    __wrapped__: Callable[P, T]
    __name__: str
    __qualname__: str
    _options: OffloadOptions[P, T]

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function here and now."""
        return self.__wrapped__(*args, **kwargs)

    @coroutine_function
    def run(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, T]:
        """Run the function on a worker of its pool and return its result."""
        return self._sent().run(*args, **kwargs)

    def run_sync(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``run`` for blocking code; ``RuntimeError`` on the thread of a running event loop."""
        try:
            run = self._sent().prepare_sync(*args, **kwargs)
        finally:
            del args, kwargs
        return run()

    def options(
        self,
        *,
        pool: str | None = None,
        timeout: float | None = None,
        call_timeout: float | None = None,
        owner: str | None = None,
    ) -> OffloadOptions[P, T]:
        """Return the function with other settings; what is left out stays as it is."""
        mine = self._sent()
        return replace(
            mine,
            pool=mine.pool if pool is None else pool,
            timeout=mine.timeout if timeout is None else timeout,
            call_timeout=mine.call_timeout if call_timeout is None else call_timeout,
            owner=mine.owner if owner is None else owner,
        )

    def _sent(self) -> OffloadOptions[P, T]:
        return self._options

    def __repr__(self) -> str:
        return f"<offloaded {self.__module__}.{self.__qualname__} on {self._options.pool!r}>"


class OffloadedFunction(_Offloaded[P, T]):
    """A function that knows its pool; called plainly, it is the plain function.

    ``await f.run(...)`` and ``f.run_sync(...)`` run it on a worker, ``f.options(...)`` with other
    settings. It travels by name as functions do, so ``lease.run(f, ...)`` works too. In a class it
    is a method: ``instance.f.run(...)`` sends the instance along, which must be picklable.
    """

    def __init__(
        self,
        function: Callable[P, T],
        *,
        pool: str = DEFAULT_ALIAS,
        timeout: float | None = None,
        call_timeout: float | None = None,
        owner: str | None = None,
    ) -> None:
        _refuse_kinds(function)
        functools.update_wrapper(self, function)
        self._options = OffloadOptions(self, pool, timeout, call_timeout, owner)
        self._looked_up = False

    @overload
    def __get__(self, instance: None, owner: type | None = None, /) -> OffloadedFunction[P, T]: ...

    @overload
    def __get__(
        self: OffloadedFunction[Concatenate[S, Q], T], instance: S, owner: type | None = None, /
    ) -> OffloadedMethod[Q, T]: ...

    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        if instance is None:
            return self
        if instance is owner:  # below @classmethod, up to Python 3.12; later it is not asked
            return MethodType(self, owner)
        bind: Callable[..., Any] = getattr(self.__wrapped__, "__get__", lambda *_: None)
        method = bind(instance, owner)
        # A static method, or a callable that is no function, does not bind.
        bound = getattr(method, "__self__", None) is instance
        return OffloadedMethod(method, self._options, instance) if bound else self

    def _sent(self) -> OffloadOptions[P, T]:
        if not self._looked_up:
            if getattr(self._named(), "__func__", None) is self:
                raise TypeError(
                    f"{self.__module__}.{self.__qualname__} cannot be sent to a worker: below "
                    "@classmethod it is not told its class. Write @offload above @classmethod."
                )
            self._looked_up = True
        return self._options

    def _named(self) -> object:
        """What is found under its name; ``None`` if nothing is."""
        try:
            return pkgutil.resolve_name(f"{self.__module__}:{self.__qualname__}")
        except (AttributeError, ImportError, ValueError):
            return None

    def __reduce__(self) -> str | tuple[Any, ...]:
        named = self._named()
        if named is None or named is self:
            return self.__qualname__  # pickle says what is wrong with the name
        # `fast = offload(plain)`: the name leads to the plain function, and that is what is sent.
        return pkgutil.resolve_name, (f"{self.__module__}:{self.__qualname__}",)


class OffloadedMethod(_Offloaded[P, T]):
    """An offloaded function bound to an instance or a class, sent as its first argument."""

    def __init__(
        self, method: Callable[P, T], options: OffloadOptions[P, T], instance: object
    ) -> None:
        functools.update_wrapper(self, method, updated=())
        self.__self__ = instance
        self._options = replace(options, bound=(instance,))

    def __reduce__(self) -> tuple[Any, ...]:
        return _bind, (self._options.function, self.__self__)


def _bind(function: OffloadedFunction[..., T], instance: object) -> OffloadedMethod[..., T]:
    return function.__get__(instance, type(instance))


class OffloadedClassMethod(Generic[P, T]):
    """What ``@offload`` above ``@classmethod`` gives: each class has it as an offloaded method."""

    def __init__(self, method: classmethod[Any, P, T], **settings: Any) -> None:
        if not hasattr(method.__func__, "__get__"):
            raise TypeError(
                f"offload() takes class methods that are functions, not of {method.__func__!r}. "
                "Define one with `def`."
            )
        functools.update_wrapper(cast("Any", self), method.__func__)
        self.function: OffloadedFunction[Any, T] = _OfClassMethod(method.__func__, **settings)
        self.__isabstractmethod__ = method.__isabstractmethod__

    def __get__(self, instance: object, owner: type | None = None, /) -> OffloadedMethod[P, T]:
        method: Any = _bind(self.function, type(instance) if owner is None else owner)
        return cast("OffloadedMethod[P, T]", method)


class _OfClassMethod(OffloadedFunction[P, T]):
    """The function of an offloaded class method, which no attribute leads to."""

    def __reduce__(self) -> tuple[Any, ...]:
        name = self.__module__, self.__qualname__
        try:
            found: object = _of_class_method(*name)
        except (AttributeError, ImportError, KeyError, ValueError):
            found = None
        if found is not self:
            raise NotPicklableError(
                f"A worker does not find {'.'.join(name)}: its class must be at the top level of a "
                "module, and no decorator may stand above @offload.",
                path="fn",
                type_name=type(self).__qualname__,
            )
        return _of_class_method, name


def _of_class_method(module: str, qualname: str) -> object:
    """The function of the class method that was defined under this name, overridden or not."""
    owner, _, name = qualname.rpartition(".")
    found: type = pkgutil.resolve_name(f"{module}:{owner}")
    if name.startswith("__") and not name.endswith("__"):
        name = f"_{found.__name__.lstrip('_')}{name}"
    return getattr(vars(found)[name], "function", None)


def _refuse_kinds(function: object) -> None:
    """Refuse what cannot be run on a worker, where it is written."""
    if not callable(function):
        hint = "Decorate a function with it."
        if isinstance(function, str):
            hint = f"To name a pool, write @offload(pool={function!r})."
        raise TypeError(f"offload() takes a function, not {function!r}. {hint}")
    if iscoroutinefunction(function):
        raise TypeError(
            f"offload() takes plain functions, and {function!r} is a coroutine function. "
            "Offload the part of it that keeps a processor busy, and await the rest as it is."
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"offload() takes functions that return their result, and {function!r} is a "
            "generator function. Return a list."
        )


@overload
def offload(function: classmethod[Any, P, T], /) -> OffloadedClassMethod[P, T]: ...


@overload
def offload(function: Callable[P, T], /) -> OffloadedFunction[P, T]: ...


@overload
def offload(
    *,
    pool: str = ...,
    timeout: float | None = ...,
    call_timeout: float | None = ...,
    owner: str | None = ...,
) -> _OffloadDecorator: ...


def offload(
    function: Any = None,
    /,
    *,
    pool: str = DEFAULT_ALIAS,
    timeout: float | None = None,
    call_timeout: float | None = None,
    owner: str | None = None,
) -> Any:
    """Decorate a function so that ``await f.run(...)`` runs it on a worker of ``pool``.

    Works as ``@offload`` and as ``@offload(pool="reports", timeout=2.0)``. ``timeout``: seconds to
    wait for a worker; ``call_timeout``: seconds a call may run; ``owner``: free text for logs.
    For a class method it stands above ``@classmethod``.
    """
    decorate = _OffloadDecorator(pool=pool, timeout=timeout, call_timeout=call_timeout, owner=owner)
    return decorate if function is None else decorate(function)


class _OffloadDecorator:
    """What ``offload(...)`` returns: it takes a function or a class method."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    @overload
    def __call__(self, function: classmethod[Any, P, T], /) -> OffloadedClassMethod[P, T]: ...

    @overload
    def __call__(self, function: Callable[P, T], /) -> OffloadedFunction[P, T]: ...

    def __call__(self, function: Any, /) -> Any:
        if isinstance(function, classmethod):
            return OffloadedClassMethod(function, **self._settings)
        return OffloadedFunction(function, **self._settings)


class _LeaseDecorator:
    """What ``with_lease(...)`` returns: it takes an async or a plain view."""

    def __init__(self, pool: str, acquire: dict[str, Any]) -> None:
        self._pool = pool
        self._acquire = acquire

    @overload
    def __call__(
        self, view: Callable[..., Coroutine[Any, Any, R]]
    ) -> Callable[..., Coroutine[Any, Any, R | HttpResponse]]: ...

    @overload
    def __call__(self, view: Callable[..., R]) -> Callable[..., R | HttpResponse]: ...

    def __call__(self, view: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``view``, which gets its lease as the keyword argument ``lease``."""
        if isinstance(view, type) or not callable(view):
            raise TypeError(
                f"with_lease() takes a view that is called with a request, not {view!r}. For a "
                "class-based view decorate a method of it, such as get, or with "
                "`@method_decorator(with_lease(...), name='dispatch')` the class."
            )
        acquire = dict(self._acquire)
        if acquire["owner"] is None:
            name = getattr(view, "__qualname__", type(view).__qualname__)
            acquire["owner"] = f"{view.__module__}.{name}"

        async def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> HttpResponseBase:
            try:
                lease = await pools[self._pool].acquire(**acquire)
            except (LeaseUnavailableError, LeasePoolNotStartedError) as error:
                if not is_no_capacity(error):
                    raise
                return no_capacity_response(_request_of(args), error)
            async with lease:
                response = view(*args, lease=lease, **kwargs)
                if inspect.isawaitable(response):
                    response = await response
                return cast("HttpResponseBase", response)

        if _is_async(view):

            @functools.wraps(view)
            async def leased(*args: Any, **kwargs: Any) -> HttpResponseBase:
                return await answer(args, kwargs)

            return leased

        @functools.wraps(view)
        def leased_sync(
            *args: Any, **kwargs: Any
        ) -> HttpResponseBase | Coroutine[Any, Any, HttpResponseBase]:
            # Who calls it where a loop runs awaits the answer in the end, even if `view` is only
            # known to be async when it returns a coroutine.
            if _loop_runs_here() or any(map(_has_async_handlers, args[:1])):
                return answer(args, kwargs)
            try:
                lease = pools[self._pool].acquire_sync(**acquire)
            except (LeaseUnavailableError, LeasePoolNotStartedError) as error:
                if not is_no_capacity(error):
                    raise
                return no_capacity_response(_request_of(args), error)
            with lease:
                response: HttpResponseBase = view(*args, lease=lease, **kwargs)
                return response

        return leased_sync


@overload
def with_lease(
    view: Callable[..., Coroutine[Any, Any, R]], /
) -> Callable[..., Coroutine[Any, Any, R | HttpResponse]]: ...


@overload
def with_lease(view: Callable[..., R], /) -> Callable[..., R | HttpResponse]: ...


@overload
def with_lease(
    pool: str = ...,
    *,
    timeout: float | None = ...,
    workers: int | None = ...,
    owner: str | None = ...,
    lease_seconds: float | None = ...,
) -> _LeaseDecorator: ...


def with_lease(
    pool: str | Callable[..., Any] = DEFAULT_ALIAS,
    *,
    timeout: float | None = None,
    workers: int | None = None,
    owner: str | None = None,
    lease_seconds: float | None = None,
) -> Any:
    """Decorate a view that gets a lease of ``pool`` as its keyword argument ``lease``.

    Works as ``@with_lease`` and as ``@with_lease(pool="reports", timeout=2.0)``. When none comes in
    time, the client gets a 503 with ``Retry-After`` and the view is not called. ``timeout``:
    seconds to wait; ``workers``: how many (default: a whole pool); ``owner``: free text for logs
    (default: the name of what is decorated); ``lease_seconds``: seconds until it expires
    (``math.inf``: never). The lease ends with the view: a streaming response must take its own.
    """
    if lease_seconds != math.inf:
        optional_duration("lease_seconds", lease_seconds)
    acquire = {
        "timeout": optional_duration("timeout", timeout),
        "workers": None if workers is None else positive_int("workers", workers),
        "owner": checked_owner(owner),
        "lease_seconds": lease_seconds,
    }
    if callable(pool):
        return _LeaseDecorator(DEFAULT_ALIAS, acquire)(pool)
    return _LeaseDecorator(_checked_pool(pool), acquire)


def _checked_pool(pool: str) -> str:
    if not isinstance(pool, str):
        raise TypeError(f"pool must be an alias, such as 'default', not {pool!r}.")
    if not pool:
        raise ValueError("pool must be an alias, such as 'default', not ''.")
    return pool


def _is_async(view: Callable[..., Any]) -> bool:
    """Whether calling ``view`` gives a coroutine, also by its class's ``__call__``."""
    while isinstance(view, functools.partial):
        view = view.func
    called = getattr(type(view), "__call__", None)  # noqa: B004 - the function itself
    return (
        iscoroutinefunction(view)
        or iscoroutinefunction(called)
        or _has_async_handlers(getattr(view, "__self__", None))
    )


def _has_async_handlers(view: object) -> bool:
    """Whether this is an async class-based view, whose ``dispatch`` is a plain method.

    That returns a coroutine, and is called without a running loop where Django serves by WSGI.
    """
    return getattr(view, "view_is_async", False) is True


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _request_of(args: Iterable[Any]) -> HttpRequest | None:
    """The request among a view's arguments: the first, or the second of a method.

    Asks for what is needed of it, since frameworks pass wrappers that are no ``HttpRequest``.
    """
    return next((value for value in args if hasattr(value, "get_preferred_type")), None)
