"""Types and rules of configuration values: from text or TOML to a typed value, or a clear reason why not.

A field's annotation says everything: ``Annotated[int, at_least(1)]``, ``float | None``,
``tuple[float, float]``. Pure.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from ..errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A condition on a value. ``says`` completes the sentence "must be ..."."""

    says: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def at_least(low: float) -> Rule:
    return Rule(f"at least {low:g}", lambda v: v >= low)


def above(low: float) -> Rule:
    return Rule(f"above {low:g}", lambda v: v > low)


def between(low: float, high: float) -> Rule:
    """From ``low`` up to, but not including, ``high``."""
    return Rule(f"at least {low:g} and below {high:g}", lambda v: low <= v < high)


def one_of(choices: Iterable[str]) -> Rule:
    names = tuple(choices)
    return Rule(f"one of {', '.join(names)}", lambda v: v in names, names)


def each(rule: Rule) -> Rule:
    """The rule for every element of a tuple."""
    return Rule(f"{rule.says} in every place", lambda v: all(rule.holds(x) for x in v))


@dataclass(frozen=True)
class Kind:
    """An annotation taken apart: scalar type (or element types of a tuple), optional or not, rules."""

    scalar: type | None
    elements: tuple[type, ...] = ()
    open_ended: bool = False
    optional: bool = False
    rules: tuple[Rule, ...] = ()

    @property
    def name(self) -> str:
        """As shown in ``--help`` and in errors."""
        if self.scalar:
            base = _NAMES[self.scalar]
        else:
            base = ",".join(_NAMES[e] for e in self.elements) + (",..." if self.open_ended else "")
        return base + ("|none" if self.optional else "")


_NAMES: dict[type, str] = {int: "int", float: "float", bool: "bool", str: "str"}
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def kind_of(annotation: Any) -> Kind:
    """Take an annotation apart; TypeError for one this module does not know (a mistake in the schema)."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = kind_of(args[0])
        rules = tuple(a for a in args[1:] if isinstance(a, Rule))
        return Kind(inner.scalar, inner.elements, inner.open_ended, inner.optional, inner.rules + rules)
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = kind_of(next(a for a in args if a is not type(None)))
        return Kind(inner.scalar, inner.elements, inner.open_ended, True, inner.rules)
    if origin is tuple and args:
        open_ended = args[-1] is Ellipsis
        return Kind(None, tuple(args[:1] if open_ended else args), open_ended)
    if annotation in _NAMES:
        return Kind(annotation)
    raise TypeError(f"a configuration field cannot have the type {annotation!r}")


def from_text(kind: Kind, text: str) -> Any:
    """Value of a command-line word; ConfigError says what was expected."""
    if kind.optional and text.lower() == "none":
        return None
    if kind.scalar:
        return check(kind, _scalar_from_text(kind.scalar, text, kind))
    inner = text[1:-1] if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")) else text
    parts = [p.strip() for p in inner.split(",") if p.strip()]
    elements = kind.elements * len(parts) if kind.open_ended else kind.elements
    if len(parts) != len(elements):
        raise ConfigError(_expected(kind, text))
    return check(kind, tuple(_scalar_from_text(e, p, kind) for e, p in zip(elements, parts, strict=True)))


def from_toml(kind: Kind, value: Any) -> Any:
    """Value of a TOML entry; TOML has no null, so ``"none"`` stands for None."""
    if kind.optional and value == "none":
        return None
    if kind.scalar is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        floats = kind.elements[:1] == (float,)
        value = tuple(float(v) if floats and type(v) is int else v for v in value)
    return check(kind, value)


def check(kind: Kind, value: Any) -> Any:
    """The value, if it has the type, is finite and keeps the rules; ConfigError otherwise."""
    if value is None and kind.optional:
        return None
    if not _has_type(kind, value):
        raise ConfigError(_expected(kind, value))
    flat = value if isinstance(value, tuple) else (value,)
    if any(isinstance(v, float) and not math.isfinite(v) for v in flat):
        raise ConfigError("must be a finite number")
    for rule in kind.rules:
        if not rule.holds(value):
            raise ConfigError(f"must be {rule.says}{suggest(value, rule.choices)}")
    return value


def _has_type(kind: Kind, value: Any) -> bool:
    if kind.scalar:
        return _is(kind.scalar, value)
    if not isinstance(value, tuple):
        return False
    elements = kind.elements * len(value) if kind.open_ended else kind.elements
    return len(value) == len(elements) and all(_is(e, v) for e, v in zip(elements, value, strict=True))


def _is(scalar: type, value: Any) -> bool:
    """Exactly the type (True is not an int), except that an int will do where Python code wants a float."""
    return type(value) is scalar or (scalar is float and type(value) is int)


def suggest(value: Any, choices: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing."""
    near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _expected(kind: Kind, value: Any) -> str:
    return f"must be of type {kind.name}, got {type(value).__name__} {value!r}"


def _scalar_from_text(scalar: type, text: str, kind: Kind) -> Any:
    if scalar is bool:
        if text.lower() not in _BOOLS:
            raise ConfigError(_expected(kind, text) + " (write true or false)")
        return _BOOLS[text.lower()]
    try:
        return scalar(text)
    except ValueError:
        raise ConfigError(_expected(kind, text)) from None
