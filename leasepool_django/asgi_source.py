"""What the source of an ASGI module says of ``LeasePoolLifespan``, for the system checks.

The source is read and never run: importing it would load the whole application.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = ["LIFESPAN", "spec_of", "uses_lifespan"]

LIFESPAN = "LeasePoolLifespan"


def spec_of(module: str) -> ModuleSpec | None:
    """The import specification of ``module``; ``None`` if there is none or it cannot be had."""
    try:
        return importlib.util.find_spec(module)
    except Exception:  # noqa: BLE001 - the packages it is in are the user's
        return None


def uses_lifespan(module: str, application: str) -> bool | None:
    """Whether the module's source uses ``LeasePoolLifespan``.

    ``None`` if that cannot be said: the source cannot be read, or the application comes from
    another module of the project. It is read and not imported: importing it would load the whole
    application.
    """
    spec = spec_of(module)
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # whatever is wrong with it is not this check's business
    source = _Source(tree, module)
    if source.uses(LIFESPAN):
        return True
    return None if source.comes_from_elsewhere(application) else False


class _Source:
    """What a module's source says of the names in it."""

    def __init__(self, tree: ast.Module, module: str) -> None:
        self._nodes = list(ast.walk(tree))
        self._home = _folder(module)
        self._imported: dict[str, str] = {}  # name → the module it is from; "" for a relative one
        self._bound: dict[str, list[ast.expr]] = {}  # name → what makes its value
        for node in self._nodes:
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        name = alias.asname or alias.name.partition(".")[0]
                        self._imported[name] = alias.name
                case ast.ImportFrom(module=origin, names=names, level=level):
                    for alias in names:
                        self._imported[alias.asname or alias.name] = "" if level else str(origin)
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._bind(target, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._bind(target, value)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    calls = [ast.Call(one, [], []) for one in node.decorator_list]
                    self._bound.setdefault(node.name, []).extend(calls)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._bound.setdefault(target.id, []).append(value)

    def uses(self, name: str) -> bool:
        """Whether ``name`` is called, passed on, assigned or derived from; importing is no use."""
        names = {name}
        for node in self._nodes:
            if isinstance(node, ast.ImportFrom):
                names.update(alias.asname or name for alias in node.names if alias.name == name)
        return any(
            (isinstance(inner, ast.Name) and inner.id in names)
            or (isinstance(inner, ast.Attribute) and inner.attr == name)
            for node in self._nodes
            for part in _working_parts(node)
            for inner in ast.walk(part)
        )

    def comes_from_elsewhere(self, name: str) -> bool:
        """Whether the value of ``name`` is, or may be, made by another module of the project."""
        return self._is_elsewhere(ast.Name(name), set())

    def _is_elsewhere(self, value: ast.expr, seen: set[str]) -> bool:
        match value:
            case ast.Name(id=name):
                if name in seen:
                    return False
                seen.add(name)
                return name not in self._bound or any(
                    self._is_elsewhere(one, seen) for one in self._bound[name]
                )
            case ast.Call(func=function, args=arguments):
                origin = self._imported.get(_root(function))
                return (origin is not None and self._is_of_the_project(origin)) or any(
                    self._is_elsewhere(argument, seen)
                    for argument in arguments
                    if isinstance(argument, (ast.Name, ast.Attribute, ast.Call))
                )
        return True

    def _is_of_the_project(self, origin: str) -> bool:
        """Whether a module lies where this one does. Django never does, wherever it lies."""
        top = origin.partition(".")[0]
        return top != "django" and (not top or _folder(top) == self._home)


def _working_parts(node: ast.AST) -> Sequence[ast.AST]:
    match node:
        case ast.Call():
            return [node]
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return [value]
        case ast.ClassDef(bases=parts):
            return parts
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return node.decorator_list
    return []


def _root(value: ast.expr) -> str:
    """``a`` for ``a.b.c``; empty for what does not begin with a name."""
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else ""


def _folder(module: str) -> Path | None:
    """Where the outermost package of a module lies."""
    spec = spec_of(module.partition(".")[0])
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else ())]
    return Path(places[0]).parent if places else None
