"""Configuration as JSON that two processes can compare: equal values are described alike, addresses never occur. Pure.

Functions are described by what they compute from: their code, defaults and captured values; so a learning-rate
schedule made by the same line with another peak differs, and the same lambda in another process does not. What a
function reads from globals, or from attributes of a captured object that are not plain values, is not seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Path = tuple[int, ...]
"""Identities of the values that hold the one being described: what comes back to one of them is not followed."""


def describe(value: Any, path: Path = ()) -> Any:
    """A JSON value for numbers, strings, containers, dataclasses, types, functions and plain objects.

    Of any other object, its ``repr`` without an address: two that differ only in what that hides are taken as equal.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value.hex()
    if id(value) in path:
        return "..."
    return next(tell(value, (*path, id(value))) for kinds, tell in _TELL if isinstance(value, kinds))


def _type(value: type, path: Path) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _function(value: FunctionType, path: Path) -> list[Any]:
    cells = [_cell(cell, path) for cell in value.__closure__ or ()]
    told = [_code(value.__code__), describe(value.__defaults__, path), describe(value.__kwdefaults__, path), cells]
    digest = hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()
    return [f"{value.__module__}.{value.__qualname__}", digest]


def _cell(cell: CellType, path: Path) -> Any:
    try:
        return describe(cell.cell_contents, path)
    except ValueError:  # not assigned yet
        return None


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _builtin(value: BuiltinFunctionType, path: Path) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _method(value: MethodType, path: Path) -> list[Any]:
    return [value.__func__.__qualname__, describe(value.__self__, path)]


def _partial(value: partial[Any], path: Path) -> list[Any]:
    return ["partial", *(describe(part, path) for part in (value.func, value.args, value.keywords))]


def _mapping(value: Mapping[Any, Any], path: Path) -> list[Any]:
    return [[describe(key, path), describe(item, path)] for key, item in value.items()]


def _set(value: Set[Any], path: Path) -> list[str]:
    return sorted(repr(describe(item, path)) for item in value)


def _sequence(value: Sequence[Any], path: Path) -> list[Any]:
    return [describe(item, path) for item in value]


def _other(value: Any, path: Path) -> Any:
    name = _type(type(value), path)
    if is_dataclass(value):
        return [name, {field.name: describe(getattr(value, field.name), path) for field in fields(value)}]
    if type(value).__repr__ is object.__dict__["__repr__"]:  # says nothing but the address
        held = getattr(value, "__dict__", {})
        return [name, {k: describe(v) for k, v in held.items() if v is None or isinstance(v, _PLAIN)}]
    return _ADDRESS.sub("", repr(value))


_PLAIN = (bool, int, float, str)
_TELL: tuple[tuple[Any, Callable[[Any, Path], Any]], ...] = (
    (type, _type),
    (FunctionType, _function),
    (BuiltinFunctionType, _builtin),
    (MethodType, _method),
    (partial, _partial),
    (Mapping, _mapping),
    (Set, _set),
    (Sequence, _sequence),
    (object, _other),
)
