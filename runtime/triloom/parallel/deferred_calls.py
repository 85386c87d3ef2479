"""Calls whose weight gradients wait for W: a linear layer, any other call, a whole unit; and their sum by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..scope import WeightGrads


class Defers(Protocol):
    """Knows what waits, and takes it; :class:`triloom.parallel.splitting.Splitter` is one."""

    def defers(self, param: nn.Parameter) -> bool: ...

    def defer(self, param: nn.Parameter, call: Any, place: int) -> None: ...


@dataclass(slots=True, eq=False)
class Call:
    """A redirected call: the graph of this call alone, from leaves that stand for its arguments to its output."""

    sink: WeightGrads
    splitter: Defers
    params: list[nn.Parameter]
    views: list[torch.Tensor]
    """What the call was given: each parameter itself, or a view of it."""
    roots: list[GradientEdge | None]
    """Where the gradient of a view goes; None for a parameter itself."""
    edge: GradientEdge | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)
    """Leaves of the parameters, in their order."""
    grad: torch.Tensor | None = None
    """Of the output, from B to W."""
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    """Weight gradients that have been computed and not been taken, by place."""

    def input_grads(self, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """B. Also those of the parameters that are not deferred; None for the others."""
        late = [self.splitter.defers(p) and not self.sink.immediate for p in self.params]
        now = [leaf for leaf, wait in zip(self.leaves, late, strict=True) if not wait]
        wanted = [x for x in self.inputs if x.requires_grad] + now
        made = iter(self._differentiate(wanted, grad, again=any(late)))
        out = [next(made) if x.requires_grad else None for x in self.inputs]
        for k, wait in enumerate(late):
            if wait:
                self.grad = grad
                self.splitter.defer(self.params[k], self, k)
            out.append(None if wait else self._of_param(k, next(made)))
        return out

    def weight_grad(self, place: int) -> torch.Tensor:
        """W: the gradient of the parameter at ``place``; those of the call's other deferred ones come with it."""
        if place not in self.found:
            assert self.grad is not None
            places = [k for k, p in enumerate(self.params) if self.splitter.defers(p)]
            with room_for(self.leaves):
                made = self._differentiate([self.leaves[k] for k in places], self.grad)
            self.found = {k: self._of_param(k, g) for k, g in zip(places, made, strict=True)}
            self.edge = self.grad = None
        return self.found.pop(place)

    def _differentiate(self, of: Sequence[torch.Tensor], grad: torch.Tensor, again: bool = False) -> list[torch.Tensor]:
        if not of:
            return []
        assert self.edge is not None  # until the last weight gradient is taken
        made = torch.autograd.grad([self.edge], of, [grad], retain_graph=again, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(of, made, strict=True)]

    def _of_param(self, place: int, grad: torch.Tensor) -> torch.Tensor:
        root = self.roots[place]
        if root is None:
            return grad
        return torch.autograd.grad([self.views[place]], [root], [grad], retain_graph=True)[0]


@contextmanager
def room_for(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Memory for parameters that are sharded now: kernels of a weight gradient look at the shape of the weight (a
    convolution), never at its values, but torch makes no view of a tensor without memory."""
    without = [(s, t) for t in leaves if t.numel() and not (s := t.untyped_storage()).nbytes()]
    for storage, t in without:
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        storage.resize_(max(storage.nbytes(), int(t.storage_offset() + last + 1) * t.itemsize))
    try:
        yield
    finally:
        for storage, _ in without:
            storage.resize_(0)


class Redirected(torch.autograd.Function):
    """Any redirected call. ``tensors``: the inputs with a gradient, then the parameters."""

    @staticmethod
    def forward(ctx: Any, call: Call, run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        inputs = len(tensors) - len(call.params)
        with torch.enable_grad():
            call.inputs = [x.detach().requires_grad_(x.requires_grad) for x in tensors[:inputs]]
            call.leaves = [v.detach().requires_grad_() for v in call.views]
            out = run(*call.inputs, *call.leaves)
        call.edge = get_gradient_edge(out)
        ctx.call = call
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.call.input_grads(grad)


@dataclass(slots=True, eq=False)
class Product:
    """The weight gradients of a linear layer, from B to W."""

    grad: torch.Tensor
    x: torch.Tensor

    def weight_grad(self, place: int) -> torch.Tensor:
        rows = self.grad.reshape(-1, self.grad.shape[-1])
        return rows.sum(0) if place else torch.mm(rows.t(), self.x.reshape(-1, self.x.shape[-1]))


class Linear(torch.autograd.Function):
    """``F.linear`` of contiguous tensors: the products that torch's own backward makes, in no graph of their own."""

    @staticmethod
    def forward(ctx: Any, splitter: Defers, sink: WeightGrads, x: Any, weight: Any, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.splitter, ctx.sink, ctx.params = splitter, sink, (weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        product, out = Product(grad, x.detach()), list[torch.Tensor | None]()
        dx = torch.mm(grad.reshape(-1, grad.shape[-1]), weight).view(x.shape) if ctx.needs_input_grad[2] else None
        for place, param in enumerate(ctx.params):
            wanted = param is not None and param.requires_grad
            if wanted and ctx.splitter.defers(param) and not ctx.sink.immediate:
                ctx.splitter.defer(param, product, place)
                wanted = False
            out.append(product.weight_grad(place) if wanted else None)
        return None, None, dx, *out


NODES: tuple[type, ...] = (Redirected._backward_cls, Linear._backward_cls)


@dataclass(slots=True, eq=False)
class SecondPass:
    """The graph of a whole unit, from B to W."""

    outputs: list[GradientEdge]
    grads: list[torch.Tensor]
    params: list[nn.Parameter]
    found: list[torch.Tensor | None] = field(default_factory=list)

    def weight_grad(self, place: int) -> torch.Tensor:
        if not self.found:
            made = torch.autograd.grad(self.outputs, self.params, self.grads, allow_unused=True, materialize_grads=True)
            self.found = list(made)
            self.outputs, self.grads = [], []
        grad, self.found[place] = self.found[place], None
        assert grad is not None  # each is taken once
        return grad


@dataclass(slots=True)
class Sum:
    """The writer of a parameter's gradient in one microbatch: its terms in the order in which autograd adds them."""

    terms: list[tuple[Any, int]] = field(default_factory=list)
    """(call, place of the parameter in it)"""

    def __call__(self, out: torch.Tensor, accumulate: bool) -> None:
        total: torch.Tensor | None = None
        for call, place in self.terms:
            grad = call.weight_grad(place)
            total = grad if total is None else total + grad
        assert total is not None
        if accumulate:
            out.add_(total)
        else:
            out.copy_(total)
