"""GPU tensors of host groups: pinned copies, and their order with the current stream."""

from __future__ import annotations

import pytest
import torch

from triloom.groups.staging import GpuCopies

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def slow_fill(tensor: torch.Tensor, value: float) -> None:
    """Fill a tensor late on the current stream."""
    torch.cuda._sleep(50_000_000)
    tensor.fill_(value)


def test_there_and_back_in_stream_order() -> None:
    copies = GpuCopies(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):  # the second time with reused buffers
        x = torch.zeros(100_003, device=copies.device)
        slow_fill(x, 3.0)
        stage = copies.stage(x, x, in_place=True)
        assert stage.host_out is stage.host_in and stage.host_in is not None and stage.host_in.is_pinned()
        stage.ready.synchronize()
        assert stage.Test() and stage.host_in.eq(3.0).all()
        stage.host_in.add_(1.0)
        stage.copy_back()
        stage.release()
        stage.order()
        assert x.mul(2).eq(8.0).all()
        torch.cuda.synchronize()
        assert stage.arrived()
    assert len(copies.pool._free) == 1


def test_output_is_not_overwritten_before_its_readers() -> None:
    copies = GpuCopies(torch.device("cuda", torch.cuda.current_device()))
    out = torch.full((1 << 20,), 5.0, device=copies.device)
    torch.cuda._sleep(50_000_000)
    seen = out.clone()
    stage = copies.stage(out, None, in_place=False)
    assert stage.host_out is not None and stage.host_in is None
    stage.host_out.fill_(6.0)
    stage.copy_back()
    stage.order()
    assert out.eq(6.0).all() and seen.eq(5.0).all()
    stage.release()


def test_a_buffer_in_use_is_not_handed_out() -> None:
    copies = GpuCopies(torch.device("cuda", torch.cuda.current_device()))
    out = torch.empty(1 << 20, device=copies.device)
    torch.cuda._sleep(50_000_000)
    stage = copies.stage(out, None, in_place=False)
    assert stage.host_out is not None
    address = stage.host_out.data_ptr()
    stage.copy_back()  # waits on the GPU for the sleep
    stage.release()
    assert copies.pool.take(out.numel() * 4).data.data_ptr() != address
    torch.cuda.synchronize()
    assert copies.pool.take(out.numel() * 4).data.data_ptr() == address
