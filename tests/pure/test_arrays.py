"""Arrays of other libraries in Group calls: the same memory in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from triloom.errors import ConfigError, MismatchError
from triloom.groups.arrays import as_tensor, from_tensor
from triloom.groups.base import Group, Transfer
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads


class Dlpack:
    """An array that speaks nothing but DLPack."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        return self.data.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()


def test_a_tensor_is_itself() -> None:
    x = torch.ones(3)
    assert as_tensor(x) is x and from_tensor(x, x) is x


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_numpy_shares_its_memory(dtype: str) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    tensor = as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data and tensor.shape == (2, 3) and str(tensor.dtype) == f"torch.{dtype}"
    tensor[0, 0] = 7
    assert array[0, 0] == 7
    back = from_tensor(tensor, array)
    assert type(back) is np.ndarray and back.ctypes.data == array.ctypes.data


def test_anything_with_dlpack() -> None:
    data = torch.arange(4.0)
    assert as_tensor(Dlpack(data)).data_ptr() == data.data_ptr()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        ([1.0, 2.0], "a builtins.list is no array: pass a torch.Tensor, or an array with __dlpack__"),
        (3.0, "a builtins.float is no array"),
        (np.array(["a"]), "numpy.ndarray cannot share its memory with torch"),
        (np.broadcast_to(np.ones(1), 3), "numpy.ndarray is read-only"),
    ],
)
def test_what_is_refused(array: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        as_tensor(array)
    with pytest.raises(ConfigError, match=text):
        Solo().all_reduce(array)


def test_a_cuda_array_needs_cuda() -> None:
    class Cuda:
        def __init__(self, read_only: bool) -> None:
            told = {"shape": (4,), "typestr": "<f4", "data": (4096, read_only), "version": 3}
            self.__cuda_array_interface__ = told

    with pytest.raises(ConfigError, match="Cuda is read-only"):
        as_tensor(Cuda(True))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Cuda cannot share its memory with torch"):
            as_tensor(Cuda(False))


def test_no_way_back_without_the_array_api() -> None:
    with pytest.raises(ConfigError, match="offers no from_dlpack"):
        from_tensor(torch.ones(1), Dlpack(torch.ones(1)))


def every_call(group: Group) -> None:
    """Results are in the arrays that were given, whatever is mixed."""
    n, me = group.size, group.rank
    after, before = (me + 1) % n, (me - 1) % n

    def given(values: Any) -> Any:
        return np.array(values, dtype=np.float32)

    x = given([me, 1])
    group.all_reduce(x).wait()
    assert x.tolist() == [n * (n - 1) / 2, n]
    part = given([0])
    group.reduce_scatter(part, torch.arange(float(n))).wait()
    assert part.tolist() == [n * me]
    whole = given([0] * n)
    group.all_gather(whole, Dlpack(torch.tensor([float(me)]))).wait()
    assert whole.tolist() == list(range(n))
    group.broadcast(x, 0).wait()
    into = given([0] * n)
    group.all_to_all(into, given([10 * me + r for r in range(n)])).wait()
    assert into.tolist() == [10 * r + me for r in range(n)]
    got = given([0])
    works = [group.send(given([me]), after), group.recv(got, before)]
    for work in works:
        work.wait()
    assert got.tolist() == [before]
    got = given([0])
    group.batch([Transfer("send", given([me]), after), Transfer("recv", got, before)]).wait()
    assert got.tolist() == [before]


def test_every_call_takes_arrays() -> None:
    run_threads(3, every_call)


def test_the_checks_hold_for_arrays() -> None:
    group = Solo()
    for array, text in (
        (np.ones((4, 4), dtype=np.float32)[:, ::2], "is not contiguous"),
        (np.ones(3, dtype=np.int32), "dtype torch.int32 is not supported"),
    ):
        with pytest.raises(MismatchError, match=text):
            group.all_reduce(array)
