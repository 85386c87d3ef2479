"""Who owns a module's buffers: the running statistics of batch norms, and what else a module keeps.

At the start every rank has those of the first dp rank. From then on each dp rank's modules change their own, from its
own samples, and nothing is exchanged while training, as gradients do not depend on them. The model's buffers are those
of dp rank 0: an evaluation runs with them on every rank, and checkpoints store them (``fixed/...``). So a checkpoint
that is loaded gives every rank those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..groups.base import Group
from .build import broadcast


@contextmanager
def of_first(modules: Iterable[nn.Module], dp: Group) -> Iterator[None]:
    """Inside the ``with``, buffers of dp rank 0; this rank's own after it. Collective over dp."""
    buffers = {id(t): t for m in modules for t in m.buffers()} if dp.size > 1 else {}
    own = [t.detach().clone() for t in buffers.values()]
    with torch.no_grad():
        for t in buffers.values():
            data = t.detach().contiguous()
            broadcast(dp, data)
            if data.data_ptr() != t.data_ptr():
                t.copy_(data)
        try:
            yield
        finally:
            for t, before in zip(buffers.values(), own, strict=True):
                t.copy_(before)
