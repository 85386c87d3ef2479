"""Configuration as JSON that two processes can compare: equal values are described alike, addresses never occur. Pure.

Functions are described by what they compute from: their code, defaults and captured values; so a learning-rate
schedule made by the same line with another peak differs, and the same lambda in another process does not. What a
function reads from globals is not seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(value: Any) -> Any:
    """A JSON value for numbers, strings, containers, dataclasses, types, functions and plain objects.

    Of any other object, its ``repr`` without an address: two that differ only in what that hides are taken as equal.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value.hex()
    return next(tell(value) for kinds, tell in _TELL if isinstance(value, kinds))


def _type(value: type) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _function(value: FunctionType) -> list[Any]:
    cells = [describe(cell.cell_contents) for cell in value.__closure__ or ()]
    told = [_code(value.__code__), describe(value.__defaults__), describe(value.__kwdefaults__), cells]
    digest = hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()
    return [f"{value.__module__}.{value.__qualname__}", digest]


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _partial(value: partial[Any]) -> list[Any]:
    return ["partial", describe(value.func), describe(value.args), describe(value.keywords)]


def _other(value: Any) -> Any:
    if is_dataclass(value):
        return [_type(type(value)), {field.name: describe(getattr(value, field.name)) for field in fields(value)}]
    if repr(value) == object.__repr__(value):  # says nothing but the address
        return [_type(type(value)), describe(getattr(value, "__dict__", {}))]
    return _ADDRESS.sub("", repr(value))


_TELL: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (type, _type),
    (FunctionType, _function),
    (BuiltinFunctionType, lambda value: f"{value.__module__}.{value.__qualname__}"),
    (MethodType, lambda value: [value.__func__.__qualname__, describe(value.__self__)]),
    (partial, _partial),
    (Mapping, lambda value: [[describe(key), describe(item)] for key, item in value.items()]),
    (Set, lambda value: sorted(repr(describe(item)) for item in value)),
    (Sequence, lambda value: [describe(item) for item in value]),
    (object, _other),
)
