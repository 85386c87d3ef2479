"""The NCCL group on one GPU and one rank: streams, graphs, memory, and the shared cases. Two ranks: test_nccl_ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import group_cases as cases
from shuttle import shuttle
from triloom.errors import GroupError, MismatchError
from triloom.groups.nccl import MINIMUM, NcclMemory, load_nccl
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_streams import CudaStreams
from triloom.groups.nccl_work import NCCLWork
from triloom.groups.nccl_world import device_world, nccl_group
from triloom.groups.solo import Solo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SLEEP = 200_000_000
"""Clock cycles that torch.cuda._sleep spends: some 0.1 s."""


@pytest.fixture(scope="module")
def group() -> Iterator[NCCLGroup]:
    made = nccl_group(Solo(), CudaStreams(torch.device("cuda", torch.cuda.current_device())))
    yield made
    made.close()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(1 << 20, device="cuda")


def work_of(work: Any) -> NCCLWork:
    assert isinstance(work, NCCLWork)
    return work


def test_the_library() -> None:
    library = load_nccl()
    assert library.version >= MINIMUM and len(library.unique_id()) == 128


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations(group: NCCLGroup, operation: str) -> None:
    cases.every_dtype_and_size(shuttle(group), operation)


@pytest.mark.parametrize("case", [name for name in cases.SEVERAL if name != "objects"])
def test_several(group: NCCLGroup, case: str) -> None:
    cases.SEVERAL[case](shuttle(group))


def test_an_operation_is_queued_and_the_host_goes_on(group: NCCLGroup, x: torch.Tensor) -> None:
    group.all_reduce(x).wait()
    torch.cuda.synchronize()
    begin = time.monotonic()
    torch.cuda._sleep(SLEEP)
    x.fill_(3.0)  # late on the current stream: the operation must come after it
    out = torch.zeros_like(x)
    work = work_of(group.all_gather(out, x))
    assert not work.done()
    work.wait()
    seen = out.clone()  # on the current stream: must come after the operation
    issued = time.monotonic() - begin
    work.synchronize()
    assert time.monotonic() - begin > 2 * issued and work.done()
    assert seen.eq(3.0).all()


def test_a_side_stream(group: NCCLGroup, x: torch.Tensor) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        x.fill_(5.0)
        work = group.all_reduce(x)
        work.wait()
        y = x * 2
    side.synchronize()
    assert y.eq(10.0).all()


def test_memory_of_a_dropped_tensor_is_not_reused_under_the_operation(group: NCCLGroup) -> None:
    torch.cuda._sleep(SLEEP)
    source = torch.full((1 << 22,), 7.0, device="cuda")
    out = torch.zeros_like(source)
    work = group.all_gather(out, source)
    address = source.data_ptr()
    del source
    other = torch.zeros(1 << 22, device="cuda")
    assert other.data_ptr() != address
    work.wait()
    assert out.eq(7.0).all()


def test_a_barrier_holds_back_the_host(group: NCCLGroup) -> None:
    begin = time.monotonic()
    torch.cuda._sleep(SLEEP)
    group.barrier().wait()
    assert time.monotonic() - begin > 0.03


def test_host_tensors_are_refused(group: NCCLGroup) -> None:
    with pytest.raises(MismatchError, match="the tensor is on cpu, this group works on cuda:"):
        group.all_reduce(torch.ones(2))


def test_capture_and_replay(group: NCCLGroup, x: torch.Tensor) -> None:
    """In torch's default mode, with the watchdog looking at other operations meanwhile."""
    group.warm()
    early = group.all_reduce(torch.ones(4, device="cuda"))
    out = torch.zeros_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(GroupError, match="before this capture began"):
            early.wait()
        y = x + 1
        work = group.all_gather(out, y)
        time.sleep(0.3)  # several looks of the watchdog
        work.wait()
        z = out * 2
    for value in (1.0, 4.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert z.eq(2 * (value + 1)).all()
    with pytest.raises(GroupError, match="captured into a CUDA graph"):
        work.done()
    group.all_reduce(x).wait()
    torch.cuda.synchronize()


@pytest.mark.parametrize("use", ["register", "window"])
def test_memory_of_nccl(group: NCCLGroup, use: str) -> None:
    own = nccl_group(Solo(), CudaStreams(group.streams.device), library=group.comm.library)
    library = group.comm.library
    needed = {"register": "ncclCommRegister", "window": "ncclCommWindowRegister"}[use]
    if not library.has(needed):
        pytest.skip(f"{library.path} has no {needed}")
    memory = NcclMemory(library, 4 << 20)
    x = memory.tensor((1 << 20,))
    calls: dict[str, Callable[[], None]] = {
        "register": lambda: own.comm.register(memory.address, memory.nbytes),
        "window": lambda: own.comm.window(memory.address, memory.nbytes, 20.0, symmetric=True),
    }
    calls[use]()
    x.fill_(2.0)
    own.all_reduce(x).wait()
    assert x.eq(2.0).all()
    torch.cuda.synchronize()
    own.close()
    del x
    memory.free()


def test_cupy_arrays_without_a_copy(group: NCCLGroup) -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        array, out = cupy.arange(1000, dtype="float32"), cupy.zeros(1000, dtype="float32")
        group.all_gather(out, array).wait()
        assert bool((out == array).all())
    solo = cupy.ones(3, dtype="float64")
    Solo().all_reduce(solo).wait()


def test_cuda_array_interface_without_a_copy(group: NCCLGroup) -> None:
    data = torch.arange(10.0, device="cuda")

    class Foreign:
        __cuda_array_interface__ = data.__cuda_array_interface__

    out = torch.zeros_like(data)
    group.all_gather(out, Foreign()).wait()
    assert torch.equal(out, data)


def test_one_rank_needs_no_nccl() -> None:
    solo = Solo()
    assert device_world(solo, torch.device("cuda", 0)) is solo
