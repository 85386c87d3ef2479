"""Parameters that exist only around their use, and say so instead of crashing when read in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TriloomError

_T = torch.Tensor
METADATA = frozenset(
    {_T.size, _T.dim, _T.numel, _T.nelement, _T.stride, _T.element_size, _T.is_floating_point, _T.untyped_storage}
    | {_T.requires_grad_, getattr(_T, "requires_grad").__set__}  # noqa: B009  (mypy takes it for a bool)
    | {
        getattr(_T, name).__get__
        for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "grad", "grad_fn", "layout")
    }
)
"""What may be asked of, and set on, a parameter whose values are elsewhere."""


class ShardedParameter(nn.Parameter):
    """A parameter whose storage is empty between uses; ``whole()`` tells, ``label`` names it.

    Made by changing the class of an ordinary parameter, so that modules keep the very object. Every torch
    function it is passed to in Python is checked, about 2 us each; while its values are there it has its own class
    again (``unguard``), so that only code that asks too early or too late pays that.
    """

    whole: Callable[[], bool]
    label: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in METADATA:
            listed = (x for a in args if isinstance(a, (list, tuple)) for x in a)
            for value in (*args, *listed, *(kwargs or {}).values()):
                if isinstance(value, ShardedParameter) and not value.whole():
                    raise TriloomError(
                        f"parameter {value.label} is sharded over dp and not gathered now: read it "
                        "inside `with engine.gathered():`, or take engine.full_state()"
                    )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def guard(param: nn.Parameter, label: str, whole: Callable[[], bool]) -> None:
    """Make ``param`` a ShardedParameter."""
    if not isinstance(param, ShardedParameter):
        param.own_class = type(param)  # type: ignore[attr-defined]
        param.__class__ = ShardedParameter
    param.whole, param.label = whole, label  # type: ignore[attr-defined]


def guarded(param: nn.Parameter) -> bool:
    """Whether the parameter's values come and go, whether they are there now or not."""
    return hasattr(param, "own_class")


def unguard(params: Iterable[nn.Parameter]) -> None:
    """Their values are there."""
    for p in params:
        p.__class__ = p.own_class  # type: ignore[attr-defined]


def guard_again(params: Iterable[nn.Parameter]) -> None:
    """Their values have gone."""
    for p in params:
        p.__class__ = ShardedParameter
