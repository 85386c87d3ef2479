"""Tensor parallelism under mpirun: this rank's part against the same computed by itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tp_cases import F64, assemble, close, grads_of, run_pair, values_of
from triloom.boot import World
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.models import decoder, gpt2, llama
from triloom.scope import Scope
from triloom.shards import ShardSpec
from triloom.tp import reduce_partial_grads

Parts = dict[str, tuple[ShardSpec, torch.Tensor]]

MODELS = {
    "llama": llama(vocab=13, hidden=24, layers=1, heads=4, kv_heads=2, ffn=36, max_seq=12),
    "gpt2": gpt2(vocab=13, hidden=24, layers=1, heads=4, max_seq=12, dropout=0.2, attention_dropout=0.2),
}


def check_parts(parts: Parts, whole: dict[str, torch.Tensor]) -> None:
    """This rank's parts against the slices of the whole."""
    for name, (spec, part) in parts.items():
        if spec.dim is None:
            close(part, whole[name])
        else:
            pieces = [whole[name].narrow(spec.dim, start, stop - start) for start, stop in spec.slices]
            close(part, torch.cat(pieces, spec.dim))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("sink", ["none", "immediate", "deferred"])
def test_pair(world: World, sequence: bool, sink: str) -> None:
    mine, alone = run_pair(world.group, sequence, sink=sink), run_pair(Solo(), False)
    for key in ("y", "dx"):
        expect = alone[key].chunk(world.size)[world.rank] if sequence else alone[key]
        close(mine[key], expect)
    check_parts(mine["values"], assemble([alone["values"]]))
    check_parts(mine["grads"], assemble([alone["grads"]]))


def train_once(group: Group, which: str, sequence: bool) -> tuple[torch.Tensor, Parts, Parts]:
    scope = Scope(tp=group, sequence_parallel=sequence, dtype=F64, seed=5)
    model = decoder(MODELS[which])
    units = torch.nn.ModuleList([make(scope) for make in (*model.units.values(), model.loss)])
    draw = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(13, (3, 12), generator=draw) for _ in range(2))
    targets[0, :7] = -100
    x: Any = ids
    for scope.unit, unit in enumerate(units):
        x = unit(x, targets) if unit is units[-1] else unit(x)
    loss, _weight = x
    loss.backward()
    reduce_partial_grads(units, scope)
    return loss.detach(), values_of(units), grads_of(units)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("sequence", [False, True])
def test_model(world: World, which: str, sequence: bool) -> None:
    loss, values, grads = train_once(world.group, which, sequence)
    alone_loss, alone_values, alone_grads = train_once(Solo(), which, False)
    close(loss, alone_loss)
    check_parts(values, assemble([alone_values]))
    check_parts(grads, assemble([alone_grads]))
