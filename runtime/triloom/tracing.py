"""Units run once on fake tensors: what autograd would save, and how much they compute, without memory or values.

Fake tensors have shapes, dtypes and a device, so that what is traced is what the very kernels of the device would do.
Operations are counted by torch's FlopCounterMode: products, convolutions and attention, not element-wise work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .actions import Program
from .errors import ConfigError, TriloomError
from .groups.phantom import Phantom
from .memory import Sizes, UnitBytes
from .mesh import Mesh
from .optim import Optimizer
from .parallel import build, cut
from .parallel.activations import closure_bytes, saved_tensors, unit_bytes
from .parallel.build import UnitLike
from .parallel.reduction import Reduction
from .parallel.splitting import Splitter
from .placement import Placement
from .scope import GradWriter, Scope
from .shards import split_even

_aten = torch.ops.aten
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),  # type: ignore[no-untyped-call]
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, **more: (
        sdpa_backward_flop_count(g, q, k, v)  # type: ignore[no-untyped-call]
    ),
}
"""Formulas that torch's counter lacks; as its own of attention, they count the masked half of a causal one too."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be estimated; the arguments of an Engine, with shapes for a batch."""

    units: Mapping[str, UnitLike]
    loss: UnitLike
    mesh: Mesh
    order: Program
    """Of computes, with transfers, or complete."""
    optimizer: Optimizer
    placement: Placement
    inputs: Any
    """Pytree of (shape, dtype) of what a dp rank passes to ``step``, whole."""
    targets: Any
    reduction: Reduction | None = None
    ties: Sequence[Sequence[str]] = ()
    stages: Sequence[int] | None = None
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def check_factories(run: Run) -> None:
    for name, unit in [*run.units.items(), (build.LOSS, run.loss)]:
        if isinstance(unit, nn.Module) and any(True for _ in unit.parameters()):
            raise ConfigError(
                f"unit {name!r} has its parameters already; give a function of a Scope that builds it, so that its "
                "memory can be estimated without taking it"
            )


@contextmanager
def fake() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake tensors warn of being asked where they are
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def scope_of(run: Run) -> Scope:
    tp = run.mesh.axis("tp")
    return Scope(
        tp=Phantom(0, tp, "tp"),
        sequence_parallel=run.sequence_parallel and tp > 1,
        device=torch.device(run.device),
        dtype=run.dtype,
        selective=run.placement.activations == "selective",
    )


class _Closures:
    """A sink that keeps every closure, as between B and W."""

    immediate = False

    def __init__(self) -> None:
        self.all: list[tuple[nn.Parameter, GradWriter]] = []

    def add(self, param: nn.Parameter, write: GradWriter) -> None:
        self.all.append((param, write))


def trace(run: Run, names: Sequence[str], modules: Mapping[int, nn.Module], scope: Scope) -> Sizes:
    """Bytes of each unit for every size of microbatch."""
    batch = pytree.tree_leaves(run.inputs, is_leaf=is_meta)[0][0][0]
    counts = [stop - start for start, stop in split_even(batch, run.order.microbatches)]
    by_count = {n: _trace_one(run, names, modules, scope, n) for n in dict.fromkeys(counts)}
    return lambda unit, mb: by_count[counts[mb]][unit]


def is_meta(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], torch.dtype)


def _tensors(run: Run, metas: Any, samples: int) -> Any:
    def make(meta: Any) -> torch.Tensor:
        (_, *rest), dtype = meta
        return torch.empty(samples, *rest, dtype=dtype, device=run.device)

    return pytree.tree_map(make, metas, is_leaf=is_meta)


def _trace_one(
    run: Run, names: Sequence[str], modules: Mapping[int, nn.Module], scope: Scope, samples: int
) -> dict[int, UnitBytes]:
    x = cut.boundary(_tensors(run, run.inputs, samples))
    targets = _tensors(run, run.targets, samples)
    out: dict[int, UnitBytes] = {}
    for u, module in sorted(modules.items()):
        extra = (targets,) if u == len(modules) - 1 else ()
        try:
            x, out[u] = _trace_unit(u, module, x, extra, scope)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, TriloomError):
                raise
            raise ConfigError(
                f"unit {names[u]!r} cannot be run without values, so its memory cannot be estimated: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    return out


def _trace_unit(
    u: int, module: nn.Module, x: cut.Boundary, extra: tuple[Any, ...], scope: Scope
) -> tuple[cut.Boundary, UnitBytes]:
    sink, splitter = _Closures(), Splitter()
    params = [p for p in module.parameters() if p.requires_grad]
    scope.unit, scope.grads = u, sink
    counters = [FlopCounterMode(display=False, custom_mapping=ATTENTION) for _ in range(3)]
    with counters[0], saved_tensors() as saved:
        made, record = cut.forward(module, x, *extra, inside=splitter.redirecting(module, params, sink))
    splitter.settle(record.outputs)
    sizes = unit_bytes(module, saved, [*x.leaves, *pytree.tree_leaves(extra)], made)
    saved.clear()
    with counters[1]:
        cut.backward(record, [torch.empty_like(y) for y in made.carriers()], params, sink)
        splitter.hand_over(sink)
    deferred = closure_bytes(module, [write for _, write in sink.all])
    with counters[2]:
        for param, write in sink.all:
            write(torch.empty_like(param), False)
    f, b, w = (c.get_total_flops() for c in counters)
    return made, replace(sizes, flops=f, input_flops=b, weight_flops=w, deferred=deferred)


def count_units(run: Run) -> tuple[UnitBytes, ...]:
    """Bytes and operations of every unit, loss included, for the first (a largest) microbatch on one rank of tp."""
    check_factories(run)
    named = build.name_units(run.units, run.loss)
    with fake(), torch.device(run.device):
        scope = scope_of(run)
        sizes = trace(run, list(named), build.build_units(named, range(len(named)), scope), scope)
    return tuple(sizes(u, 0) for u in range(len(named)))
