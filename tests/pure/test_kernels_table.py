"""The table of operations: who computes what where, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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
