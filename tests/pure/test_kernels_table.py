"""The table of operations: who computes what where, and what importing it costs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from triloom.engine import Engine
from triloom.models import decoder, gpt2, llama
from triloom.operations import operations
from triloom.scope import Scope
from triloom_kernels import table
from triloom_kernels.rms_norm import rms_norm


def test_eager_on_the_cpu_and_kernels_on_cuda() -> None:
    kernels = table.default()
    for op, function in table.EAGER.items():
        assert kernels.pick(op, "cpu") is kernels.pick(op, torch.device("meta")) is function
        assert (kernels.pick(op, "cuda:1") is function) == (op not in table.TRITON)
        assert table.eager().pick(op, "cuda") is function
        assert table.triton_on("cpu").pick(op, "cpu") is kernels.pick(op, "cuda")


def test_every_kernel_has_an_eager_reference() -> None:
    assert set(table.TRITON) <= set(table.EAGER)


def test_one_operation_is_swapped_on_one_device() -> None:
    def mine(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x

    kernels = table.default().using("rms_norm", mine, "cpu")
    assert kernels.pick("rms_norm", "cpu") is mine
    assert kernels.pick("rms_norm", "meta") is rms_norm
    assert kernels.pick("rms_norm", "cuda") is table.default().pick("rms_norm", "cuda")


@pytest.mark.parametrize(("op", "device"), [("rms_nrom", "cpu"), ("rms_norm", "xpu")])
def test_no_row(op: str, device: str) -> None:
    for act in (lambda: table.default().pick(op, device), lambda: table.default().using(op, rms_norm, device)):
        with pytest.raises(KeyError, match=f"no operation '{op}' for {device} in the table; it has .*rms_norm"):
            act()


def test_triton_is_imported_when_a_kernel_is_picked_and_not_before() -> None:
    code = (
        "import sys, triloom\n"
        "from triloom_kernels import table\n"
        "table.default().pick('rms_norm', 'cpu'); assert 'triton' not in sys.modules\n"
        "table.default().pick('rms_norm', 'cuda'); assert 'triton' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def noting(op: str, called: set[str], kind: str) -> Callable[..., Any]:
    """The row of an operation, which notes that it was called."""
    function = operations().pick(op, kind)

    def noted(*args: Any, **options: Any) -> Any:
        called.add(op)
        return function(*args, **options)

    return noted


SIZES: dict[str, Any] = {"vocab": 17, "hidden": 16, "layers": 1, "heads": 2, "max_seq": 4}
USED = {
    "llama": (llama(**SIZES), {"attention", "rms_norm", "rms_norm_residual", "split_rotate", "swiglu"}),
    "geglu": (
        replace(llama(**SIZES), act="geglu"),
        {"attention", "geglu", "rms_norm", "rms_norm_residual", "split_rotate"},
    ),
    "gpt2": (gpt2(**SIZES), {"attention", "layer_norm", "layer_norm_residual", "gelu"}),
    "dropout": (gpt2(**SIZES, dropout=0.5), {"attention", "layer_norm", "gelu", "dropout", "bias_dropout_residual"}),
    "probabilities": (
        gpt2(**SIZES, attention_dropout=0.5),
        {"layer_norm", "layer_norm_residual", "gelu", "dropout"},
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", USED)
def test_layers_take_what_the_table_has_for_their_device(case: str, device: str) -> None:
    config, expected = USED[case]
    called: dict[str, set[str]] = {"cpu": set(), "meta": set()}
    kernels = operations()
    for kind, op in itertools.product(called, table.EAGER):
        kernels = kernels.using(op, noting(op, called[kind], kind), kind)
    model, scope = decoder(config), Scope(kernels=kernels, device=torch.device(device))
    ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
    x = ids
    for build in model.units.values():
        x = build(scope)(x)
    model.loss(scope).logits(x)
    assert {kind for kind, ops in called.items() if ops} == {device}
    assert called[device] == expected


def test_an_engine_hands_its_table_to_the_layers() -> None:
    called: set[str] = set()
    config = USED["llama"][0]
    model = decoder(config)
    kernels = operations().using("swiglu", noting("swiglu", called, "cpu"), "cpu")
    engine = Engine(model.units, model.loss, kernels=kernels)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    loss = engine.step(ids, ids).loss
    assert called == {"swiglu"}
    assert loss == Engine(model.units, model.loss).step(ids, ids).loss
