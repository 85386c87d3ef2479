"""W split from B inside modules that know nothing of it: calls with a parameter hand their weight gradient over.

While a unit's forward runs under :meth:`Splitter.redirecting`, every linear layer, convolution and matrix product
that takes one of its parameters becomes an autograd node of its own. In B that node computes the gradient of its
inputs with torch's own kernels, and leaves the gradient of its parameters for W: the same kernels on the same
operands, each run once, so the same bits as an unsplit backward and no extra compute. Costs on a CPU: 5 us for each
torch function of the unit while it runs, about 20 us for a linear layer, 50 us for any other redirected call.

A parameter that something else uses too keeps its whole gradient in B: its terms would be summed in another order.
So does one that is used inside ``torch.utils.checkpoint``. A unit where nothing can wait (an LSTM) runs B+W as one,
or, if asked to, a second autograd pass in W, which keeps the graph until then and repeats much of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..scope import WeightGrads
from .deferred_calls import NODES, Call, Linear, Redirected, SecondPass, Sum
from .guard import guarded

_T = torch.Tensor
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.einsum, _T.matmul, _T.mm, _T.bmm, _T.mv)
REDIRECTED: Mapping[Any, tuple[int | None, str]] = {
    **dict.fromkeys((F.linear, *_CONVOLUTIONS), (2, "bias")),
    F.bilinear: (3, "bias"),
    **dict.fromkeys((torch.addmm, torch.baddbmm, _T.addmm, _T.baddbmm), (0, "input")),
    **dict.fromkeys((*_PRODUCTS, _T.__matmul__, _T.__rmatmul__), (None, "")),
}
"""The calls whose weight gradient can wait; the argument of each, by place or name, that is no factor but a term."""


_Unit = TypeVar("_Unit", bound=nn.Module)
_MARK = "_triloom_second_pass"


def second_pass(unit: _Unit) -> _Unit:
    """Let W of this unit be a second autograd pass, if nothing else of it can wait for W; returns the unit.

    B and W together then take 1.6 to 1.9 times as long as an unsplit backward (measured on small models on a CPU), and
    what autograd saved is held until W: it pays off only where the schedule has idle time to fill. The simulator
    takes the difference as ``Costs.second_pass``. Does nothing where parameters are sharded (zero3): they are not
    there for W.
    """
    setattr(unit, _MARK, True)
    return unit


class Splitter:
    """What one unit defers. Finds out at its first forward, and does nothing for a unit where nothing can wait."""

    def __init__(self) -> None:
        self._second_pass = False
        self._late: frozenset[int] | None = None
        self._own = False
        """Layers of triloom are in the unit, which defer by themselves."""
        self.rest: tuple[nn.Parameter, ...] = ()
        """Parameters whose gradient cannot wait, in the order in which the graph shows them; known after a forward."""
        self._params: dict[int, nn.Parameter] = {}
        self._mode: _Redirect | None = None
        self._sums: dict[int, Sum] = {}

    def redirecting(
        self, unit: nn.Module, params: Iterable[nn.Parameter], sink: WeightGrads
    ) -> AbstractContextManager[Any]:
        """Around a forward of the unit with a graph; the gradients of ``params`` will go to ``sink``."""
        if self._mode is None:
            self._second_pass = bool(getattr(unit, _MARK, False))
            self._params = {id(p): p for p in params}
            self._mode = _Redirect(self, sink)
        return nullcontext() if self._late is not None and not self._late else self._mode

    def settle(self, outputs: Iterable[GradientEdge | None]) -> None:
        """After such a forward: which parameters only redirected calls use. Looks at the first graph only."""
        if self._late is not None or self._mode is None:
            return
        users: dict[int, set[str]] = {}
        for node, leaf in _uses(outputs):
            if leaf in self._params:
                users.setdefault(leaf, set()).add(_kind(node))
        self._late = frozenset(p for p, kinds in users.items() if kinds == {"redirected"})
        self.rest = tuple(self._params[p] for p, kinds in users.items() if "other" in kinds)
        self._own = any("own" in kinds for kinds in users.values())
        alone = bool(self.rest) and not self._late and not self._own
        sharded = any(map(guarded, self.rest))  # and gone when their W comes
        self._second_pass = self._second_pass and alone and not sharded

    def owns(self, param: Any) -> bool:
        return id(param) in self._params

    def defers(self, param: nn.Parameter) -> bool:
        return self._late is not None and id(param) in self._late

    @property
    def nothing(self) -> bool:
        """Whether it is known that B computes all of the unit's gradients, and its W nothing."""
        return bool(self.rest) and not self._late and not self._own and not self._second_pass

    @property
    def twice(self) -> bool:
        """Whether W is a second autograd pass."""
        return self._second_pass and self._late is not None

    def defer(self, param: nn.Parameter, call: Any, place: int) -> None:
        self._sums.setdefault(id(param), Sum()).terms.append((call, place))

    def keep_graph(self, outputs: Iterable[GradientEdge | None], grads: Iterable[torch.Tensor]) -> None:
        """After a backward that kept the graph and went to the inputs only."""
        pairs = [(edge, g) for edge, g in zip(outputs, grads, strict=True) if edge is not None]
        call = SecondPass([edge for edge, _ in pairs], [g for _, g in pairs], list(self.rest))
        for place, param in enumerate(self.rest):
            self.defer(param, call, place)

    def hand_over(self, sink: WeightGrads) -> None:
        """After a backward: what it deferred goes to the sink, one writer for each parameter."""
        for key, total in self._sums.items():
            sink.add(self._params[key], total)
        self._sums = {}


def describe_unsplit(ranks: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """One line on the units of all ranks in which nothing can wait for W (``Engine.unsplit``); empty if none."""
    units = {name: list(params) for rank in ranks for name, params in rank.items()}
    if not units:
        return ""
    said = "; ".join(
        f"{name} ({', '.join(params[:3])}{', ...' if len(params) > 3 else ''})" for name, params in units.items()
    )
    return f"weight gradients that B computes because nothing of the unit can wait for W: {said}"


def _kind(node: Any) -> str:
    """Who computes the gradient that a node of a graph sends to a parameter."""
    if isinstance(node, NODES):
        return "redirected"
    function = getattr(type(node), "_forward_cls", None)
    return "own" if getattr(function, "__module__", "").startswith("triloom.") else "other"


def _uses(outputs: Iterable[GradientEdge | None]) -> Iterator[tuple[Any, int]]:
    """Every edge of a graph into the leaf of a tensor: the node it comes from, and the ``id`` of the tensor."""
    todo = [edge.node for edge in outputs if edge is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for after, _ in node.next_functions:
            if after is None:
                continue
            leaf = getattr(after, "variable", None)
            if leaf is not None:
                yield node, id(leaf)
            elif after not in seen:
                seen.add(after)
                todo.append(after)


class _Redirect(TorchFunctionMode):
    """Sees every torch function of a unit's forward."""

    def __init__(self, splitter: Splitter, sink: WeightGrads) -> None:
        super().__init__()
        self._splitter, self._sink = splitter, sink

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in REDIRECTED and torch.is_grad_enabled() and not _checkpointing():
            params = {k: p for k, p in enumerate((*args, *kwargs.values())) if self._param(p) is not None}
            if params and self._can_wait(func, args, kwargs, params):
                return self._redirect(func, args, kwargs, params)
        return func(*args, **kwargs)

    def _param(self, value: Any) -> nn.Parameter | None:
        """The parameter of the unit that ``value`` is, or is a view of."""
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return None
        root = value if value._base is None else value._base
        return root if self._splitter.owns(root) else None  # type: ignore[return-value]

    def _can_wait(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], params: Mapping[int, Any]
    ) -> bool:
        """Whether the gradient of no parameter needs the values of one that is sharded by then."""
        owners = (self._param(p) for p in params.values())
        if not any(p is not None and guarded(p) for p in owners):
            return True
        place, name = REDIRECTED[func]
        names = [*range(len(args)), *kwargs]
        return sum(names[k] not in (place, name) for k in params) < 2

    def _redirect(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], params: Mapping[int, Any]
    ) -> Any:
        if func is F.linear and _plain(*args, **kwargs):
            x, weight, bias = _linear_arguments(*args, **kwargs)
            return Linear.apply(self._splitter, self._sink, x, weight, bias)  # type: ignore[no-untyped-call]
        values, names = (*args, *kwargs.values()), tuple(kwargs)
        inputs = [k for k, v in enumerate(values) if k not in params and isinstance(v, torch.Tensor)]

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            given = list(values)
            for k, t in zip((*inputs, *params), tensors, strict=True):
                given[k] = t
            out: torch.Tensor = func(*given[: len(args)], **dict(zip(names, given[len(args) :], strict=True)))
            return out

        views = list(params.values())
        owners: list[Any] = [self._param(v) for v in views]
        roots = [None if v is p else get_gradient_edge(p) for v, p in zip(views, owners, strict=True)]
        call = Call(self._sink, self._splitter, owners, views, roots)
        return Redirected.apply(call, run, *(values[k] for k in inputs), *owners)  # type: ignore[no-untyped-call]


def _checkpointing() -> bool:
    """Whether ``torch.utils.checkpoint`` will run this again, in a backward that redirects nothing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _plain(*args: Any, **kwargs: Any) -> bool:
    """Whether a linear layer is of parameters themselves, and of contiguous matrices."""
    x, weight, bias = _linear_arguments(*args, **kwargs)
    whole = all(t is None or isinstance(t, nn.Parameter) for t in (weight, bias))
    dense = x.dim() > 1 and x.numel() > 0 and x.is_contiguous() and weight.is_contiguous()
    return whole and dense and not torch.is_autocast_enabled(x.device.type)
