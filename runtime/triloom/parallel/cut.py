"""The autograd graph, cut at unit boundaries.

A unit's forward runs on fresh leaves; its backward is one ``autograd.grad`` call from its outputs
to those leaves and to its parameters. Nothing else connects units, so each can be run, recomputed,
or freed wherever the program says, and the numbers equal those of the uncut graph bit for bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ..scope import WeightGrads

Tree = Any
"""A pytree of tensors and plain values."""


class _Cut(torch.autograd.Function):
    """Identity. Without it a unit whose first operation is in place would modify a leaf.

    The forward returns a detached alias and not a view: autograd forbids in-place changes of a view
    made in a custom Function. Costs about 12 us a boundary on a CPU, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


@dataclass(slots=True)
class Boundary:
    """A pytree between units: leaves, structure, and which leaves carry gradients."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    needs_grad: tuple[bool, ...]

    def tree(self) -> Tree:
        return _unflatten(self.leaves, self.spec)

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def carriers(self) -> list[torch.Tensor]:
        """The leaves whose gradient goes back, in order."""
        return [x for x, need in zip(self.leaves, self.needs_grad, strict=True) if need]


_LEAF = pytree.tree_flatten(0)[1]
"""Of a pytree that is one tensor: most boundaries are, and are then spared 5 us."""


def _flatten(tree: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    return ([tree], _LEAF) if type(tree) is torch.Tensor else pytree.tree_flatten(tree)


def _unflatten(leaves: list[Any], spec: pytree.TreeSpec) -> Tree:
    return leaves[0] if spec is _LEAF else pytree.tree_unflatten(leaves, spec)


def boundary(tree: Tree) -> Boundary:
    """Boundary of data that carries no gradient (a batch)."""
    leaves, spec = _flatten(tree)
    return Boundary(leaves, spec, (False,) * len(leaves))


@dataclass(slots=True)
class Pass:
    """What a unit's forward leaves for its backward."""

    inputs: list[torch.Tensor]
    """Leaves that want a gradient, in the order of the input boundary's carriers."""
    outputs: list[GradientEdge | None]
    """Where the gradients of the outputs enter the graph, in the order of the output boundary's carriers: an edge
    does not keep the output's memory. None for one announced by a forward without a graph that turned out to have
    no gradient."""


def forward(
    unit: torch.nn.Module,
    x: Boundary,
    *extra: Tree,
    inside: AbstractContextManager[Any] | None = None,
    in_place: bool = True,
) -> tuple[Boundary, Pass]:
    """Run ``unit(x, *extra)`` on fresh leaves; ``extra`` (targets) carries no gradient. Needs gradients enabled.

    inside: around the unit. in_place: the unit may change its input; if not, it is given views of the leaves, which
    torch refuses to change and which cost 1 us.
    """
    inputs: list[torch.Tensor] = []
    leaves: list[Any] = []
    for leaf, need in zip(x.leaves, x.needs_grad, strict=True):
        if need:
            fresh = leaf.detach().requires_grad_()
            inputs.append(fresh)
            leaf = _Cut.apply(fresh) if in_place else fresh.view_as(fresh)  # type: ignore[no-untyped-call]
        leaves.append(leaf)
    given = _unflatten(leaves, x.spec)
    if inside is None:
        out = unit(given, *extra)
    else:
        with inside:
            out = unit(given, *extra)
    out_leaves, spec = _flatten(out)
    outputs: list[GradientEdge | None] = []
    needs: list[bool] = []
    for i, y in enumerate(out_leaves):
        need = isinstance(y, torch.Tensor) and y.requires_grad
        needs.append(need)
        if need:
            outputs.append(get_gradient_edge(y))
        if isinstance(y, torch.Tensor):
            out_leaves[i] = y.detach()
    return Boundary(out_leaves, spec, tuple(needs)), Pass(inputs, outputs)


def forward_only(unit: torch.nn.Module, x: Boundary, *extra: Tree) -> Boundary:
    """Run a unit without a graph (evaluation)."""
    with torch.no_grad():
        out = unit(x.tree(), *extra)
    return boundary(out)


def backward(
    record: Pass,
    grads: list[torch.Tensor],
    params: list[torch.nn.Parameter],
    sink: WeightGrads,
    again: bool = False,
) -> list[torch.Tensor]:
    """Gradients of the inputs; weight gradients go to ``sink``. again: the graph is kept for a second pass.

    Own layers have already handed their closures to the sink they captured in the forward and
    return None; the gradients autograd made itself (norms, a foreign module) become closures here.
    """
    pairs = [(y, g) for y, g in zip(record.outputs, grads, strict=True) if y is not None]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in record.inputs]
    outputs, output_grads = zip(*pairs, strict=True)
    wanted = [*record.inputs, *params]
    found = torch.autograd.grad(outputs, wanted, output_grads, retain_graph=again, allow_unused=True) if wanted else ()
    n = len(record.inputs)
    for param, grad in zip(params, found[n:], strict=True):
        if grad is not None:
            sink.add(param, _Write(grad))
    return [
        torch.zeros_like(leaf) if grad is None else grad.contiguous()
        for leaf, grad in zip(record.inputs, found[:n], strict=True)
    ]


@dataclass(slots=True)
class _Write:
    """A weight gradient that already exists, as a closure."""

    grad: torch.Tensor

    def __call__(self, out: torch.Tensor, accumulate: bool) -> None:
        if accumulate:
            out.add_(self.grad)
        else:
            out.copy_(self.grad)
