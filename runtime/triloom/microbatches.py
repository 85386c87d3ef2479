"""A batch on its way into a step: onto the device, cut into microbatches, its shapes noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import ConfigError
from .parallel.cut import Boundary
from .shards import split_even


@dataclass(frozen=True)
class Microbatches:
    """A batch that is cut already: ``engine.step(Microbatches(inputs), Microbatches(targets))``.

    The shapes of the pieces may differ in every dimension (sequences of different lengths). Each combination of
    shapes is found out once: its first step sends a header with every activation.
    """

    pieces: Sequence[Any]
    """A pytree of tensors for each microbatch of the engine, in order; dim 0 is the sample."""


def to_device(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Microbatches):
        return Microbatches([to_device(piece, device) for piece in tree.pieces])
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def nbytes(tree: Any) -> int:
    """Bytes of the tensors of a pytree."""
    return sum(t.nbytes for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))


def signature(b: Boundary) -> tuple[Any, ...]:
    """Shapes and dtypes of the tensors, and the other leaves themselves."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in b.leaves)


def _samples(tree: Any) -> int:
    sizes = {x.shape[0] for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.dim()}
    if len(sizes) != 1:
        raise ConfigError(f"the tensors of a batch must agree on dim 0, got sizes {sorted(sizes)}")
    return int(sizes.pop())


def cut_batch(tree: Any, count: int) -> tuple[list[Any], list[int]]:
    """A batch cut along dim 0 into ``count`` pieces whose sizes differ by at most one, and their sizes."""
    if isinstance(tree, Microbatches):
        if len(tree.pieces) != count:
            raise ConfigError(f"the engine has {count} microbatches a step, the batch is cut into {len(tree.pieces)}")
        return list(tree.pieces), [_samples(piece) for piece in tree.pieces]
    batch = _samples(tree)
    leaves, spec = pytree.tree_flatten(tree)
    if batch < count:
        raise ConfigError(
            f"a batch of {batch} samples a dp rank cannot be cut into {count} microbatches; "
            f"pass at least {count} samples or use fewer microbatches"
        )
    ranges = split_even(batch, count)
    pieces = [
        pytree.tree_unflatten([x[a:b] if isinstance(x, torch.Tensor) and x.dim() else x for x in leaves], spec)
        for a, b in ranges
    ]
    return pieces, [b - a for a, b in ranges]
