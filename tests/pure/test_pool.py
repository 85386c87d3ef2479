"""The pool of threads: shared, failing, forked, and out of the interpreter's way."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from triloom import _C, native, philox
from triloom.errors import TriloomError


def test_pool_size():
    assert native.Pool(3).threads == 3
    for threads in (0, -1):
        with pytest.raises(native.NativeError, match=f"at least 1 thread, got {threads}"):
            native.Pool(threads)
    assert issubclass(native.NativeError, TriloomError)


def test_pool_shared_by_threads():
    pool = native.Pool(3)
    x = philox.normal_(torch.empty(300_000), 5, 0, (1,))
    expected = native.sum_squares(x)
    seen: list[float] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(native.sum_squares(x, pool=pool) for _ in range(20)))
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert seen == [expected] * 80


def test_errors_inside_the_pool_come_out_and_leave_it_usable():
    pool = native.Pool(2)
    n, f32, i64 = 100_000, 0, 4
    arrays = [torch.zeros(n) for _ in range(4)]
    arrays[1] = torch.zeros(n, dtype=torch.int64)
    with pytest.raises(native.NativeError, match="can be read as f32"):
        # An integer gradient cannot be loaded: the conversion throws within the worker threads.
        _C.adamw(*(t.data_ptr() for t in arrays), 0, f32, i64, f32, n, (0.0,) * 9, pool)
    assert native.sum_squares(torch.ones(100_000), pool=pool) == 100_000.0


def test_pool_in_a_forked_child_is_refused():
    pool = native.Pool(3)
    x = torch.ones(100_000)
    native.sum_squares(x, pool=pool)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            native.sum_squares(x, pool=pool)
        except native.NativeError as error:
            code = 0 if "fork" in str(error) and str(os.getpid()) in str(error) else 2
        try:
            del pool
            if native.sum_squares(x, pool=native.Pool(2)) != 100_000.0:
                code = 3
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(ended[1]) == 0


def test_long_functions_give_up_the_interpreter():
    done = threading.Event()
    out = torch.empty(1 << 23)

    def work() -> None:
        philox.normal_(out, 1, 0, (1,))
        done.set()

    thread = threading.Thread(target=work)
    turns = 0
    thread.start()
    while not done.is_set():
        turns += 1
        time.sleep(0.0005)
    thread.join()
    assert turns > 3, "the main thread stood still while the kernel ran"
