"""Token files: flat ones and Megatron's pairs, written here by hand, read back; what is damaged is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triloom.config.schema import DataConfig
from triloom.data import Data, cut, find, open_found
from triloom.data.files import CODES, open_flat, open_megatron
from triloom.data.tokens import Flat
from triloom.errors import ConfigError

Ids = list[int]


def write_pair(prefix: Path, documents: list[list[Ids]], code: int = 8, modes: bool = False) -> None:
    """A Megatron pair, from the description of the format: documents of sequences of ids."""
    size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    sequences = [ids for document in documents for ids in document]
    with open(f"{prefix}.bin", "wb") as file:
        for ids in sequences:
            file.write(struct.pack(f"<{len(ids)}{letter}", *ids))
    bounds, offsets, at = [0], [], 0
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    for ids in sequences:
        offsets.append(at)
        at += size * len(ids)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds)))
        file.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        file.write(struct.pack(f"<{len(sequences)}q{len(bounds)}q", *offsets, *bounds))
        file.write(bytes(len(sequences) if modes else 0))


def everything(tokens: Flat) -> Ids:
    ids: Ids = tokens.windows(np.array([0]), len(tokens))[0].tolist()
    return ids


DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 127), max_size=6), min_size=1, max_size=3), min_size=1, max_size=5
).filter(lambda documents: any(ids for document in documents for ids in document))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, code=st.sampled_from(sorted(CODES)), modes=st.booleans())
def test_a_megatron_pair_is_read_back(tmp_path: Path, documents: list[list[Ids]], code: int, modes: bool) -> None:
    prefix = tmp_path / "a.text_document"
    write_pair(prefix, documents, code, modes)
    flat = open_megatron(prefix)
    assert everything(flat) == [i for document in documents for ids in document for i in ids]
    assert isinstance(flat, Flat) and isinstance(flat.array, np.memmap) and flat.array.dtype == CODES[code]
    ended = open_megatron(prefix, eos=99)
    expected: Ids = []
    for document in documents:
        expected += [*(i for ids in document for i in ids), 99]
    assert everything(ended) == expected


PAIR = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]]]


def patched(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no idx": (lambda b, i: i.unlink(), r"\.idx does not exist"),
    "no bin": (lambda b, i: b.unlink(), r"\.bin does not exist"),
    "empty bin": (lambda b, i: b.write_bytes(b""), "is an empty file"),
    "odd bin": (lambda b, i: b.write_bytes(b.read_bytes()[:-1]), "19 bytes, not a multiple of the 2"),
    "short bin": (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), "describes 10 tokens, but its .bin holds 9"),
    "long bin": (lambda b, i: b.write_bytes(b.read_bytes() + b"ab"), "describes 10 tokens, but its .bin holds 11"),
    "short header": (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "whole header"),
    "short idx": (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "cut short or damaged"),
    "empty idx": (lambda b, i: i.write_bytes(b""), "whole header"),
    "magic": (lambda b, i: patched(i, 0, b"X"), "not a Megatron index"),
    "version": (lambda b, i: patched(i, 9, b"\2"), "version 2"),
    "dtype": (lambda b, i: patched(i, 17, b"\7"), "dtype code 7"),
    "other dtype": (lambda b, i: patched(i, 17, b"\4"), "begins at byte 6, but those before it take 12"),
    "count": (lambda b, i: patched(i, 18, b"\3"), "3 sequences and 4 document bounds"),
    "length": (lambda b, i: patched(i, 34, b"\4"), "begins at byte 6, but those before it take 8"),
    "negative": (lambda b, i: patched(i, 34, b"\xff\xff\xff\xff"), "negative length"),
    "pointer": (lambda b, i: patched(i, 34 + 16 + 8, b"\7"), "sequence 1 begins at byte 7"),
    "bounds": (lambda b, i: patched(i, 34 + 48 + 24, b"\3"), "must ascend from 0 to its 4 sequences"),
    "first bound": (lambda b, i: patched(i, 34 + 48, b"\1"), "must ascend from 0"),
    "falling": (lambda b, i: patched(i, 34 + 48 + 8, b"\4"), "must ascend"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pair_is_refused(tmp_path: Path, damage: str) -> None:
    write_pair(tmp_path / "d", PAIR)
    make, says = DAMAGE[damage]
    make(tmp_path / "d.bin", tmp_path / "d.idx")
    with pytest.raises(ConfigError, match=says):
        open_megatron(tmp_path / "d", eos=0)


def test_an_eos_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "d", PAIR)
    with pytest.raises(ConfigError, match="data.eos = 70000 is not an id of a uint16 file"):
        open_megatron(tmp_path / "d", eos=70000)


# ---------------------------------------------------------------- flat files


def opened(seq: int = 4, vocab: int = 100, held_out: float = 0.0, **keys: object) -> Data:
    config = DataConfig(**keys)  # type: ignore[arg-type]
    sources = open_found(config, find(config), Path(), None)
    return cut(sources, seq=seq, seed=0, vocab=vocab, held_out=held_out, weights=config.weights)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_flat_file_is_read_back(tmp_path: Path, dtype: str) -> None:
    np.arange(60, dtype=dtype).tofile(tmp_path / "train.bin")
    data = opened(path=str(tmp_path / "train.bin"), token_dtype=dtype)
    inputs, targets = data.train.take(0, data.train.count)
    assert (targets == inputs + 1).all() and inputs.max() < 60
    assert data.tokenizer is None and data.about.endswith("train.bin, 60 tokens")


def test_uint16_is_the_default_and_nothing_is_read_into_memory(tmp_path: Path) -> None:
    np.arange(60, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens = open_flat(tmp_path / "train.bin", "uint16")
    assert isinstance(tokens.array, np.memmap) and len(tokens) == 60


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "empty": (lambda p: (p / "t.bin").write_bytes(b""), {"path": "t.bin"}, "t.bin is an empty file"),
    "odd": (lambda p: (p / "t.bin").write_bytes(b"abc"), {"path": "t.bin"}, "3 bytes, not a multiple of the 2"),
    "id": (
        lambda p: np.array([*range(50), 100], dtype=np.uint16).tofile(p / "t.bin"),
        {"path": "t.bin"},
        "has the token id 100, and the vocabulary has 100 tokens",
    ),
    "negative id": (lambda p: write_pair(p / "t", [[[1, -1] * 20]], 4), {"path": "t.bin"}, "has the token id -1"),
    "no idx": (lambda p: (p / "t.bin").write_bytes(b"ab"), {"path": "t.idx"}, "t.idx does not exist"),
    "prefix, no idx": (lambda p: (p / "t.bin").write_bytes(b"ab"), {"path": "t"}, "t.idx does not exist"),
    "nothing": (lambda p: None, {"path": "t.bin"}, "data.path = .*t.bin' does not exist"),
    "second": (
        lambda p: np.zeros(40, np.uint16).tofile(p / "t.bin"),
        {"paths": ("t.bin", "u.txt")},
        "data.paths = .*u.txt' does not exist",
    ),
    "short validation": (
        lambda p: (np.zeros(40, np.uint16).tofile(p / "t.bin"), np.zeros(4, np.uint16).tofile(p / "v.bin")),
        {"path": "t.bin", "validation": "v.bin"},
        "data.validation = .* has 4 tokens, fewer than the 5",
    ),
    "vocabulary of other text": (
        lambda p: np.zeros(40, np.uint16).tofile(p / "t.bin"),
        {"path": "t.bin", "tokenizer": "char"},
        "makes a vocabulary from text, but .* is tokens of another one",
    ),
    "unused dtype": (
        lambda p: (p / "t.txt").write_text("text"),
        {"path": "t.txt", "token_dtype": "uint32"},
        "no source is a flat token file",
    ),
    "unused eos": (lambda p: (p / "t.txt").write_text("text"), {"path": "t.txt", "eos": 3}, "data.eos = 3 stands"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, keys, says = REFUSED[case]
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        opened(**keys)


def test_any_name_of_a_pair_will_do(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.b", [[list(range(30))], [list(range(30, 60))]])
    digests = {opened(path=str(tmp_path / name)).digest for name in ("a.b", "a.b.bin", "a.b.idx")}
    assert len(digests) == 1
    assert opened(path=str(tmp_path / "a.b"), eos=5).digest.startswith("62 tokens")


def test_sources_of_different_kinds_blend(tmp_path: Path) -> None:
    np.full(400, 60, dtype=np.uint16).tofile(tmp_path / "a.bin")
    write_pair(tmp_path / "b", [[[61] * 400]])
    (tmp_path / "c.txt").write_text("\x3e" * 400)
    paths = tuple(str(tmp_path / name) for name in ("a.bin", "b.idx", "c.txt"))
    data = opened(paths=paths, weights=(0.5, 0.3, 0.2), held_out=0.1)
    first = data.train.take(0, 100)[0][:, 0].tolist()
    assert [first.count(i) for i in (60, 61, 62)] == [50, 30, 20]
    assert data.held_out is not None
    held = data.held_out.take(0, 10)[0][:, 0].tolist()
    assert [held.count(i) for i in (60, 61, 62)] == [5, 3, 2]
    together = opened(paths=paths)
    assert together.train.count == 3 * 99
    assert together.about == f"{paths[0]}, 400 tokens; {paths[1]}, 400 tokens; {paths[2]}, 400 bytes"


def test_a_file_longer_than_what_is_looked_at_is_checked_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triloom.data.tokens.PIECE", 4)
    monkeypatch.setattr("triloom.data.tokens.PIECES", 2)
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[50] = 200
    tokens.tofile(tmp_path / "t.bin")
    data = opened(path=str(tmp_path / "t.bin"))
    with pytest.raises(ConfigError, match="token 50 of .*t.bin is 200"):
        data.train.take(0, data.train.count)
