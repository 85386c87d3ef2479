"""The native writer and checksums, the layout of a file, and the arithmetic of pieces."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from triloom import _C
from triloom.checkpoint.disk import Staging, copy_in, crc32c, write_file
from triloom.checkpoint.layout import ALIGN, Entry, lay_out, name_in_file
from triloom.parts import Part, meet, part_of, runs
from triloom.shards import ShardSpec


def table(data: bytes, before: int = 0) -> int:
    array = np.frombuffer(data, dtype=np.uint8)
    return _C.crc32c_by_table(array.ctypes.data, array.size, before)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_crc32c_of_the_standards_examples(data: bytes, value: int) -> None:
    """RFC 3720, appendix B.4, and the usual check value."""
    assert crc32c(data) == table(data) == value


def test_crc32c_by_instruction_is_that_by_table() -> None:
    """Over the lengths where lanes begin and end, at odd addresses."""
    data = random.Random(1).randbytes(3 * 4096 * 2 + 64)
    view = memoryview(data)
    for length in (1, 7, 8, 9, 4095, 4096, 12287, 12288, 12289, 12296, 24576, 24583):
        for start in (0, 1, 5):
            assert crc32c(view[start : start + length]) == table(data[start : start + length]), (length, start)
    whole = np.frombuffer(data, dtype=np.uint8)
    first = _C.crc32c(whole.ctypes.data, 1000, 0)
    assert _C.crc32c(whole.ctypes.data + 1000, whole.size - 1000, first) == crc32c(data), "in two parts"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [(0,), (1,), (4096,), (4097,), (3 << 20,), (4096, 5 << 20, 17, 4096, 1), (5, 0, 3), tuple([100] * 200)],
    ids=str,
)
def test_what_is_written_is_what_was_given(tmp_path: Path, sizes: tuple[int, ...], direct: bool) -> None:
    """Spans at any place in memory and in the file, with the checksum of each."""
    gen = torch.Generator().manual_seed(3)
    spans = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=gen) for n in sizes]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    extents = [(at, n) for at, n in zip(starts, sizes, strict=True) if n]
    path = tmp_path / "file"
    path.write_bytes(b"older and longer" * 1000)
    checksums, past_cache = write_file(path, spans, extents, direct=direct)
    want = b"".join(s.numpy().tobytes() for s in spans)
    assert path.read_bytes() == want
    assert checksums == [crc32c(want[at : at + n]) for at, n in extents]
    assert direct or not past_cache


def test_errors_of_files_are_those_of_python(tmp_path: Path) -> None:
    data = [torch.zeros(10, dtype=torch.uint8)]
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "none" / "file", data, [])
    assert caught.value.filename == str(tmp_path / "none" / "file")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, data, [])
    with pytest.raises(_C.NativeError, match="an extent crosses spans"):
        write_file(tmp_path / "file", [*data, *data], [(5, 10)])
    with pytest.raises(TypeError, match="contiguous"):
        write_file(tmp_path / "file", [torch.zeros(4, 4)[:, 0]], [])


def test_two_folders_change_names_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not _C.exchange_paths(str(tmp_path / "a"), str(tmp_path / "b")):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        _C.exchange_paths(str(tmp_path / "a"), str(tmp_path / "none"))


def test_the_staging_buffer_takes_every_dtype_and_grows() -> None:
    staging, cpu = Staging(), torch.device("cpu")
    first = staging.room(100, cpu)
    assert first.numel() == 4096 and first.data_ptr() % 4096 == 0
    assert staging.room(4096, cpu).data_ptr() == first.data_ptr()
    assert staging.room(5000, cpu).numel() == 8192
    values = [torch.randn(1000), torch.randn(33).to(torch.bfloat16), torch.arange(7), torch.tensor([True, False])]
    offsets = [8, 4008, 4080, 4136]
    copy_in(staging.tensor, list(zip(offsets, values, strict=True)))
    for at, t in zip(offsets, values, strict=True):
        assert torch.equal(staging.tensor[at : at + t.nbytes].view(t.dtype), t)
    staging.close()
    assert staging.tensor.numel() == 0


def test_the_safetensors_library_reads_a_file(tmp_path: Path) -> None:
    """Every dtype, whole tensors and parts, in any order; the data starts at a block of the disk."""
    values = {
        Entry("a/one", "uint8", (3,), Part(0, 3)): torch.tensor([1, 2, 3], dtype=torch.uint8),
        Entry("a/two", "float64", (2, 2), Part(0, 4)): torch.randn(4, dtype=torch.float64),
        Entry("b/two", "bfloat16", (2, 6), Part(0, 4, 1, ((0, 2),))): torch.randn(4).to(torch.bfloat16),
        Entry("c/two", "float32", (4, 2), Part(2, 5)): torch.randn(3),
        Entry("c/number", "int64", (), Part(0, 1)): torch.tensor([7]),
    }
    entries = list(values)
    layout = lay_out(entries)
    assert len(layout.header) % ALIGN == 0
    spans = [torch.frombuffer(bytearray(layout.header), dtype=torch.uint8), *(values[entries[i]] for i in layout.order)]
    write_file(tmp_path / "x.safetensors", spans, [])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a/one", "a/two", "b/two|1:0-2", "c/two|2-5", "c/number"}
        assert file.get_tensor("a/two").shape == (2, 2) and file.get_tensor("b/two|1:0-2").shape == (2, 2)
        for entry, t in values.items():
            assert torch.equal(file.get_tensor(name_in_file(entry)).reshape(-1), t)


# ---------------------------------------------------------------- pieces


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Part]]:
    """A shape, and parts that are together all of it: slices of one dimension, each cut into ranges."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    owners = draw(st.lists(st.integers(0, 2), min_size=shape[dim], max_size=shape[dim]))
    parts = []
    for owner in sorted(set(owners)):
        mine = [i for i, o in enumerate(owners) if o == owner]
        if draw(st.booleans()):
            mine = mine[::-1]
        spec = ShardSpec(shape, dim, tuple((i, i + 1) for i in mine))
        local = math.prod(shape) // shape[dim] * len(mine)
        cuts = sorted({0, local, *draw(st.lists(st.integers(0, local), max_size=3))})
        parts += [part_of(spec, a, b) for a, b in itertools.pairwise(cuts)]
    return shape, parts


def elements(shape: tuple[int, ...], part: Part) -> np.ndarray:
    """Global indices of a part, the slow way."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    if part.dim is not None:
        whole = np.concatenate([whole.take(range(lo, hi), part.dim) for lo, hi in part.slices], part.dim)
    return whole.reshape(-1)[part.start : part.stop]


@settings(max_examples=150, deadline=None)
@given(splits())
def test_runs_are_the_elements_of_a_part(case: tuple[tuple[int, ...], list[Part]]) -> None:
    shape, parts = case
    for part in parts:
        r = runs(shape, part)
        got = np.full(part.numel, -1)
        for at, here, length in zip(*r, strict=True):
            got[here : here + length] = np.arange(at, at + length)
        assert (got == elements(shape, part)).all()


@settings(max_examples=150, deadline=None)
@given(splits(), st.randoms(use_true_random=False))
def test_pieces_of_one_split_are_found_in_those_of_another(
    case: tuple[tuple[int, ...], list[Part]], draw: random.Random
) -> None:
    shape, stored = case
    numel = math.prod(shape)
    start = draw.randrange(numel)
    want = Part(start, draw.randrange(start, numel) + 1)
    got = np.full(want.numel, -1)
    for part in stored:
        m = meet(runs(shape, want), runs(shape, part))
        source = elements(shape, part)
        for one, two, length in zip(*m, strict=True):
            assert (got[one : one + length] == -1).all(), "nothing twice"
            got[one : one + length] = source[two : two + length]
    assert (got == elements(shape, want)).all()
