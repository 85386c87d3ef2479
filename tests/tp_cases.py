"""What the tensor-parallel tests share: a sink, whole tensors from shards, and a column/row pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triloom.groups.base import Group
from triloom.scope import Scope
from triloom.shards import ShardSpec
from triloom.tp import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_partial_grads,
)

F64 = torch.float64


class Sink:
    """A weight-gradient sink that runs closures at once, or keeps them."""

    def __init__(self, params: list[nn.Parameter], immediate: bool, dtype: torch.dtype | None = None) -> None:
        self.immediate = immediate
        self.out = {id(p): torch.full_like(p, torch.nan, dtype=dtype or p.dtype) for p in params}
        self.fresh = set(self.out)
        self.kept: list[Callable[[], None]] = []

    def add(self, param: nn.Parameter, write: Callable[[Tensor, bool], None]) -> None:
        def run() -> None:
            write(self.out[id(param)], id(param) not in self.fresh)
            self.fresh.discard(id(param))

        run() if self.immediate else self.kept.append(run)

    def flush(self) -> None:
        while self.kept:
            self.kept.pop(0)()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def place(out: Tensor, spec: ShardSpec, part: Tensor) -> None:
    """Put a rank's part where it belongs in the global tensor."""
    if spec.dim is None:
        out.copy_(part)
        return
    at = 0
    for start, stop in spec.slices:
        out.narrow(spec.dim, start, stop - start).copy_(part.narrow(spec.dim, at, stop - start))
        at += stop - start


def assemble(results: list[dict[str, tuple[ShardSpec, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors by name from every rank's ``(spec, part)``; every element must be covered."""
    out = {}
    for name, (spec, part) in results[0].items():
        out[name] = torch.full(spec.global_shape, torch.nan, dtype=part.dtype)
        for rank in results:
            place(out[name], *rank[name])
        if spec.dim is None:
            assert all(torch.equal(rank[name][1], part) for rank in results), name
    return out


def specs(module: nn.Module) -> dict[str, ShardSpec]:
    return {
        f"{prefix}.{name}".lstrip("."): spec
        for prefix, layer in module.named_modules()
        for name, spec in getattr(layer, "shards", {}).items()
    }


def grads_of(module: nn.Module) -> dict[str, tuple[ShardSpec, Tensor]]:
    params = dict(module.named_parameters())
    return {name: (spec, params[name].grad) for name, spec in specs(module).items()}  # type: ignore[misc]


def values_of(module: nn.Module) -> dict[str, tuple[ShardSpec, Tensor]]:
    params = dict(module.named_parameters())
    return {name: (spec, params[name].detach()) for name, spec in specs(module).items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def chunk(x: Tensor, group: Group, sequence: bool) -> Tensor:
    return x.chunk(group.size)[group.rank] if sequence and group.size > 1 else x


class Pair(nn.Module):
    def __init__(self, scope: Scope, bias: bool = True) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(8, 48, scope=scope, name="up", parts=(24, 24), bias=bias, std=0.5)
        self.down = RowParallelLinear(24, 8, scope=scope, name="down", bias=bias, std=0.5)
        for layer in (self.up, self.down) if bias else ():
            values = torch.linspace(1, 2, layer.out_features)  # not zero, and the same on every mesh
            spec = layer.shards["bias"]
            slices = spec.slices or ((0, layer.out_features),)
            assert layer.bias is not None
            layer.bias.data.copy_(torch.cat([values[start:stop] for start, stop in slices]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated(self.up(x)))
        return out


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * torch.tanh(b)


def run_pair(
    group: Group, sequence: bool, bias: bool = True, sink: str = "none", passes: int = 1, dtype: torch.dtype = F64
) -> dict[str, Any]:
    scope = Scope(tp=group, sequence_parallel=sequence, dtype=dtype)
    pair = Pair(scope, bias)
    params = list(pair.parameters())
    keeper = None if sink == "none" else Sink(params, sink == "immediate", torch.float32 if dtype != F64 else None)
    scope.grads = keeper
    x = chunk(randn(12, 3, 8, dtype=dtype), group, sequence).requires_grad_()
    g = chunk(randn(12, 3, 8, seed=1, dtype=dtype), group, sequence)
    for _ in range(passes):
        y = pair(x)
        scope.grads = None  # the sink counts at the forward
        y.backward(g)
        scope.grads = keeper
    if keeper is not None:
        keeper.flush()
        assert all(p.grad is None for p in params)
        for p in params:
            p.grad = keeper.out[id(p)].to(p.dtype)
    raw = {name: p.grad.clone() for name, p in pair.named_parameters()}  # type: ignore[union-attr]
    reduce_partial_grads(pair, scope)
    return {"y": y.detach(), "dx": x.grad, "raw": raw, "grads": grads_of(pair), "values": values_of(pair)}
