"""The placement table: named rows, and what a row may not say."""

from __future__ import annotations

from typing import Any

import pytest

from triloom.errors import ConfigError
from triloom.placement import NAMED, State, hsdp, zero0, zero3


def test_named_rows_differ_in_their_columns_only() -> None:
    columns = {
        name: (p.params.sharded, p.grads.sharded, p.optimizer.sharded)
        for name, p in ((n, f()) for n, f in NAMED.items())
    }
    assert columns == {
        "zero0": (False, False, False),
        "zero1": (False, False, True),
        "zero2": (False, True, True),
        "zero3": (True, True, True),
    }
    assert all(NAMED[name]().name == name for name in NAMED)
    assert hsdp(2) == zero3().with_(name="hsdp", shard_ranks=2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grads": State(sharded=True)}, "zero2"),
        ({"params": State(sharded=True)}, "zero3"),
        ({"optimizer": State(dtype="float16")}, "optimizer.dtype = 'float16'"),
        ({"rounding": "up"}, "rounding 'up' is not one of master, stochastic, kahan"),
        ({"cadence": "sometimes"}, "cadence 'sometimes' is not one of step, microbatch"),
        ({"prefetch": -1}, "prefetch"),
        ({"shard_ranks": 0}, "shard_ranks"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"activations": "forget"}, "activations"),
    ],
)
def test_rows_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zero0().with_(**change)


def test_unknown_dtypes_and_tiers_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        State(dtype="int8")
    with pytest.raises(ConfigError, match="nvme"):
        State(tier="nvme")
