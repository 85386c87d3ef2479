"""NCCL without a GPU: finding the library, the layout of its configuration, and the life of a communicator.

The real library, where one is installed, says its version and makes an id; everything else runs
against a stand-in built here (fake_nccl.c), which fails when and how a test tells it to.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nccl_fake import Fake, build
from triloom._C import Nccl, NcclConfig, NcclError, NcclSlot
from triloom.errors import ConfigError, DeadlineError, GroupError
from triloom.groups import nccl
from triloom.groups.nccl import NcclMemory, Place, load_nccl, places, version_text
from triloom.groups.nccl_comm import IN_PROGRESS, NO_COLOR, CommConfig, Communicator
from triloom.groups.nccl_moves import Piece, choose, transfers

UNDEFINED = -(2**31)


# -- the real library --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Nccl:
    try:
        return load_nccl()
    except NcclError as error:
        pytest.skip(f"no NCCL on this machine (pip install nvidia-nccl-cu12): {error}")


def test_the_real_library_tells_its_version_and_makes_ids(real: Nccl) -> None:
    assert real.version >= nccl.MINIMUM and Path(real.path).is_file()
    assert re.fullmatch(r"2\.\d+\.\d+", version_text(real.version))
    one, two = real.unique_id(), real.unique_id()
    assert len(one) == 128 and one != two
    for name in ("ncclCommInitRankConfig", "ncclCommSplit", "ncclCommAbort", "ncclSend", "ncclGroupEnd"):
        assert real.has(name)
    assert "result 2" in real.error_text(2, 0) and "system" in real.error_text(2, 0)


def test_the_real_library_is_found_again_where_it_is_loaded(real: Nccl) -> None:
    again = Nccl(nccl.SONAME, loaded_only=True)
    assert again.path == real.path


def test_the_real_library_refuses_what_it_must(real: Nccl) -> None:
    """Without a device, or without a second rank, it answers with an error that arrives as one."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU this would connect")
    with pytest.raises(NcclError, match="failed: result [0-9]+, "):
        real.comm_init(NcclSlot(), 1, real.unique_id(), 0, NcclConfig(blocking=0))


# -- finding it --------------------------------------------------------------------------------------


def test_order_of_the_places(tmp_path: Path) -> None:
    for site in ("a", "b"):
        path = tmp_path / site / "nvidia" / "nccl" / "lib"
        path.mkdir(parents=True)
        (path / nccl.SONAME).touch()
    found = places(folders=[str(tmp_path / "b"), str(tmp_path / "none"), str(tmp_path / "a")])
    assert [p.what for p in found] == ["already loaded", "wheel", "wheel", "loader"]
    assert found[0] == Place("already loaded", nccl.SONAME, True)
    assert [Path(p.path).parents[3].name for p in found[1:3]] == ["b", "a"]
    assert not any(p.loaded_only for p in found[1:])
    assert places("/opt/mine.so") == [Place("given", "/opt/mine.so")]


def test_the_first_that_loads_is_taken(nccl_library: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    search = [
        Place("already loaded", "libnever.so.9", True),
        Place("wheel", str(broken)),
        Place("loader", str(nccl_library)),
    ]
    assert load_nccl(search=search).path == str(nccl_library.resolve())
    assert load_nccl(str(nccl_library)).version == 22000


def test_nothing_found_names_every_place(tmp_path: Path) -> None:
    search = [Place("already loaded", "libnever.so.9", True), Place("loader", str(tmp_path / "none.so"))]
    with pytest.raises(NcclError) as caught:
        load_nccl(search=search)
    for word in (
        "already loaded: libnever.so.9 is not loaded",
        "cannot open shared object",
        f"loader: {tmp_path}",
        "pip install nvidia-nccl-cu12",
    ):
        assert word in str(caught.value)
    assert isinstance(caught.value, GroupError)


def test_a_given_library_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(NcclError, match=r"given: .*mine\.so"):
        load_nccl(str(tmp_path / "mine.so"))


def test_another_library_is_none() -> None:
    with pytest.raises(NcclError, match="no NCCL library: it has no ncclGetVersion"):
        Nccl("libc.so.6")


def test_too_old(fake: Fake) -> None:
    fake.c.fake_version(21602)
    with pytest.raises(NcclError, match=r"is NCCL 2\.16\.2, triloom needs 2\.18\.0 or later"):
        load_nccl(str(fake.path))


def test_a_missing_function_names_the_version_that_has_it(tmp_path: Path) -> None:
    old = Fake(build(tmp_path, "-DOLD"))
    old.c.fake_version(21805)
    library = old.nccl = load_nccl(str(old.path))
    assert not library.has("ncclCommSplit") and library.has("ncclAllReduce")
    (comm,) = connect(old, 1)
    for since, use in (
        ("2.18.0", lambda: comm.split(0, 0, what="half", deadline=1)),
        ("2.19.0", lambda: NcclMemory(library, 64)),
        ("2.19.0", lambda: comm.register(4096, 64)),
        ("2.27.0", lambda: comm.window(4096, 64, 1)),
    ):
        with pytest.raises(
            NcclError, match=rf"missing in .*NCCL 2\.18\.5\); it needs NCCL {re.escape(since)} or later"
        ):
            use()
    with pytest.raises(NcclError, match="does not use a function ncclReduce"):
        library.has("ncclReduce")


# -- the configuration -------------------------------------------------------------------------------


def test_configuration_layout() -> None:
    """NCCL 2.18: size, magic, version, four integers, a pointer, split share; the padding is trafficClass later."""
    raw = bytes(NcclConfig(blocking=0, min_ctas=3, max_ctas=5, cga_cluster_size=2, split_share=1))
    size, magic, version, blocking, cga, low, high, net, share, padding = struct.unpack("=QIIiiiiQii", raw)
    assert (len(raw), size, magic, version) == (48, 48, 0xCAFEBEEF, 21800)
    assert (blocking, cga, low, high, net, share, padding) == (0, 2, 3, 5, 0, 1, UNDEFINED)
    assert struct.unpack("=QIIiiiiQii", bytes(NcclConfig()))[3:] == (*[UNDEFINED] * 4, 0, UNDEFINED, UNDEFINED)


def test_configuration_arrives(fake: Fake) -> None:
    connect(fake, 1, CommConfig(max_ctas=4))
    assert fake.config() == bytes(NcclConfig(blocking=0, max_ctas=4, split_share=0))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (CommConfig(min_ctas=0), "min_ctas must be 1 or more.*got 0"),
        (CommConfig(max_ctas=-2), "max_ctas must be 1 or more.*got -2"),
        (CommConfig(cga_cluster_size=-1), "cga_cluster_size must be 0 or more"),
        (CommConfig(min_ctas=8, max_ctas=4), "min_ctas=8 is larger than max_ctas=4"),
    ],
)
def test_configuration_refuses(config: CommConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config.native()


# -- communicators -----------------------------------------------------------------------------------


def connect(fake: Fake, size: int, config: CommConfig | None = None) -> list[Communicator]:
    unique_id = fake.nccl.unique_id()
    return on_threads(size, lambda r: create(fake, unique_id, size, r, 5.0, config or CommConfig()))


def create(fake: Fake, unique_id: bytes, size: int, rank: int, deadline: float, config: CommConfig) -> Communicator:
    return Communicator.create(fake.nccl, unique_id, size, rank, what="group 'g'", config=config, deadline=deadline)


def on_threads(size: int, body: Callable[[int], Any]) -> list[Any]:
    """``body(rank)`` on threads; results, or the error of the lowest rank."""
    out: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            out[rank] = body(rank)
        except BaseException as error:
            out[rank] = error

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    for result in out:
        if isinstance(result, BaseException):
            raise result
    return out


def test_connecting_is_polled_until_all_have_come(fake: Fake) -> None:
    unique_id = fake.nccl.unique_id()

    def late(rank: int) -> Communicator:
        time.sleep(0.1 * rank)
        return create(fake, unique_id, 2, rank, 5.0, CommConfig())

    begin = time.monotonic()
    assert all(comm.state() == 0 for comm in on_threads(2, late))
    assert time.monotonic() - begin > 0.09
    assert fake.called() == ["GetUniqueId", "CommInitRankConfig", "CommInitRankConfig"]


def test_connecting_has_a_deadline_and_aborts(fake: Fake) -> None:
    begin = time.monotonic()
    with pytest.raises(
        DeadlineError, match=r"group 'g', initialising \(rank 0 of 2\): .* after 0.2 s; a rank did not come"
    ):
        create(fake, fake.nccl.unique_id(), 2, 0, 0.2, CommConfig())
    assert 0.15 < time.monotonic() - begin < 2.0
    assert fake.called()[-1] == "CommAbort"


def test_connecting_fails_at_once_or_later(fake: Fake) -> None:
    fake.script("ncclCommInitRankConfig", 2)
    with pytest.raises(NcclError, match=r"ncclCommInitRankConfig failed: result 2, unhandled system error"):
        connect(fake, 1)
    fake.states(3, then=6)
    with pytest.raises(
        NcclError, match=r"group 'g', initialising .*result 6, scripted error \(the last words of the fake\)"
    ):
        connect(fake, 1)
    assert fake.called()[-1] == "CommAbort"
    with pytest.raises(NcclError, match="128 bytes, got 3"):
        create(fake, b"abc", 1, 0, 1.0, CommConfig())


def test_split_polls_the_parent_before_it_looks_at_the_child(fake: Fake) -> None:
    """The new handle is written when the parent has settled, not when the call returns."""
    (parent,) = connect(fake, 1)
    fake.script("ncclCommSplit", IN_PROGRESS)
    fake.states(4)
    child = parent.split(0, 0, what="group 'half'", deadline=5)
    assert child is not None and child.state() == 0 and child.what == "group 'half'"
    assert parent.split(NO_COLOR, 0, what="none", deadline=5) is None


def test_split_in_the_order_of_keys(fake: Fake) -> None:
    comms = connect(fake, 3)

    def halves(rank: int) -> Communicator | None:
        return comms[rank].split([0, NO_COLOR, 0][rank], -rank, what="ends", deadline=5)  # type: ignore[no-any-return]

    ends = on_threads(3, halves)
    assert ends[1] is None
    data = [torch.full((2,), float(r)) for r in range(3)]
    streams = [fake.streams() for _ in range(3)]

    def send_or_receive(rank: int) -> None:
        if ends[rank] is None:
            return
        kind: Any = "send" if rank == 2 else "recv"  # key order: rank 2 is 0, rank 0 is 1
        piece = Piece(kind, data[rank], 1 if rank == 2 else 0)
        ends[rank].issue(lambda c: transfers(ends[rank], c, streams[rank].address, [piece]), 5, "moving")
        streams[rank].order(streams[rank].mark())

    on_threads(3, send_or_receive)
    assert data[0].tolist() == [2.0, 2.0]


def test_split_fails(fake: Fake) -> None:
    (parent,) = connect(fake, 1)
    fake.script("ncclCommSplit", 5)
    with pytest.raises(NcclError, match=r"ncclCommSplit failed: result 5.*the last words"):
        parent.split(0, 0, what="half", deadline=1)
    fake.script("ncclCommSplit", IN_PROGRESS)
    fake.states(10**9)
    with pytest.raises(DeadlineError, match="group 'g', splitting half: NCCL was still in progress after 0.05 s"):
        parent.split(0, 0, what="half", deadline=0.05)
    fake.c.fake_reset()
    assert parent.state() == 0


def test_a_call_in_progress_is_polled(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    fake.script("ncclAllReduce", IN_PROGRESS)
    fake.states(200)
    streams, x = fake.streams(), torch.ones(3)
    at = x.data_ptr()
    comm.issue(lambda c: fake.nccl.all_reduce(at, at, 3, 7, 0, c, streams.address), 5, "summing")
    assert comm.state() == 0
    fake.script("ncclAllReduce", IN_PROGRESS)
    fake.states(2, then=3)
    with pytest.raises(NcclError, match="group 'g', summing: result 3"):
        comm.issue(lambda c: fake.nccl.all_reduce(at, at, 3, 7, 0, c, streams.address), 5, "summing")


def test_abort_is_for_good_and_may_come_from_anywhere(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    threads = [threading.Thread(target=comm.abort, args=(f"reason {i}",)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert fake.called().count("CommAbort") == 1
    with pytest.raises(GroupError, match="group 'g', summing: the communicator is gone: reason"):
        comm.issue(lambda _: False, 1, "summing")
    assert comm.state() == 0
    comm.finish(1)
    assert "CommFinalize" not in fake.called()


def test_abort_while_another_thread_polls(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    fake.states(10**9)
    threading.Timer(0.1, comm.abort, args=("enough",)).start()
    with pytest.raises(GroupError, match="gone: enough"):
        comm.settle(20, "waiting")


def test_finish_releases_in_order(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    comm.register(4096, 64)
    comm.window(8192, 64, 1.0, symmetric=True)
    fake.script("ncclCommFinalize", IN_PROGRESS)
    fake.states(3)
    comm.finish(1)
    end = ["CommWindowDeregister", "CommDeregister", "CommFinalize", "CommDestroy"]
    assert fake.called()[-4:] == end
    comm.finish(1)
    assert fake.called()[-4:] == end
    with pytest.raises(GroupError, match="gone: closed"):
        comm.register(4096, 64)


def test_finish_that_hangs_aborts(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    fake.script("ncclCommFinalize", IN_PROGRESS)
    fake.states(10**9)
    with pytest.raises(DeadlineError, match="finishing"):
        comm.finish(0.05)
    assert fake.called()[-1] == "CommAbort"


def test_a_batch_that_fails_half_way_leaves_the_group(fake: Fake) -> None:
    (comm,) = connect(fake, 1)
    streams, x = fake.streams(), torch.ones(3)
    fake.script("ncclSend", 4)
    with pytest.raises(NcclError, match="ncclSend failed: result 4"):
        comm.issue(lambda c: transfers(comm, c, streams.address, [Piece("send", x, 0)]), 1, "sending")
    assert fake.called()[-3:] == ["GroupStart", "Send", "GroupEnd"]
    comm.issue(lambda c: fake.nccl.broadcast(x.data_ptr(), x.data_ptr(), 3, 7, 0, c, streams.address), 1, "after")
    streams.order(streams.mark())


def test_memory(fake: Fake) -> None:
    memory = NcclMemory(fake.nccl, 64)
    told = memory.__cuda_array_interface__
    assert told["data"] == (memory.address, False) and told["shape"] == (64,) and memory.address
    memory.free()
    memory.free()
    assert fake.called() == ["MemAlloc", "MemFree"]
    with pytest.raises(GroupError, match="positive number of bytes, got 0"):
        NcclMemory(fake.nccl, 0)


# -- how sums are made -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", nccl.DTYPE_CODES)
def test_which_way_a_reduction_goes(dtype: torch.dtype) -> None:
    half = dtype in (torch.bfloat16, torch.float16)
    for size in (1, 2, 3, 8):
        for sums in ("upcast", "ordered", "native"):
            assert choose(dtype, "sum", size, sums, False) == (sums if half and size > 2 else "native")
            assert choose(dtype, "max", size, sums, False) == "native"
            floating = dtype.is_floating_point
            assert choose(dtype, "sum", size, sums, True) == ("ordered" if floating and size > 2 else "native")
            assert choose(dtype, "min", size, sums, True) == ("ordered" if floating and size > 1 else "native")
    with pytest.raises(ConfigError, match="sums must be one of upcast, ordered, native, got 'fast'"):
        choose(dtype, "sum", 2, "fast", False)  # type: ignore[arg-type]
