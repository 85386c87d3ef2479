"""Corpora and the order of samples: no repeats, the same whatever the mesh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triloom.data.batches import Windows
from triloom.data.order import permute
from triloom.data.sources import Source, Sources
from triloom.data.split import Data, cut
from triloom.data.text import NOT_LIBRARY, SEPARATOR, find_text, library
from triloom.data.tokens import Flat
from triloom.errors import ConfigError

SEEDS = st.integers(-(2**63), 2**64)


# ---------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**9))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_is_computed_point_by_point_even_in_a_huge_domain() -> None:
    size = 10**15 + 7
    some = np.array([0, 1, 5, size - 1])
    image = permute(some, size, 3, 0)
    assert ((image >= 0) & (image < size)).all() and len(set(image.tolist())) == 4
    assert [int(permute(some[i : i + 1], size, 3, 0)[0]) for i in range(4)] == image.tolist()


def test_permute_looks_random() -> None:
    """Neighbours do not stay neighbours, and every seed and epoch has its own order."""
    size = 10_000
    image = permute(np.arange(size), size, 1, 0)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert (np.abs(np.diff(image)) == 1).sum() < 20
    for other in (permute(np.arange(size), size, 2, 0), permute(np.arange(size), size, 1, 1)):
        assert (other == image).sum() < 20


# ---------------------------------------------------------------- windows


def counting(total: int) -> np.ndarray:
    """Tokens that say where they stand, as far as int64 views of them go."""
    return np.arange(total, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(seq=st.integers(1, 40), windows=st.integers(2, 60), extra=st.integers(0, 39), seed=SEEDS)
def test_an_epoch_has_no_token_twice(seq: int, windows: int, extra: int, seed: int) -> None:
    w = Windows.of(counting(seq * windows + extra), seq, seed)
    for epoch in (0, 1):
        inputs, targets = w.take(epoch * w.count, w.count)
        assert inputs.shape == targets.shape == (w.count, seq)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert len(inputs.unique()) == inputs.numel()
        assert inputs.numel() > len(w.parts[0].tokens) - 2 * seq - 1 - seq


@settings(max_examples=40, deadline=None)
@given(dp=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 50), seed=SEEDS)
def test_the_ranks_of_any_dp_together_have_the_same_batch(dp: int, step: int, seed: int) -> None:
    w = Windows.of(counting(1000), 7, seed)
    whole = w.batch(step, 12)
    parts = [w.batch(step, 12, dp, rank) for rank in range(dp)]
    assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
    assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])
    again = Windows.of(counting(1000), 7, seed).batch(step, 12)
    assert torch.equal(again[0], whole[0])


def test_a_batch_may_span_epochs_and_epochs_cut_elsewhere() -> None:
    w = Windows.of(counting(100), 9, 0)
    inputs, _ = w.batch(0, w.count * 3)
    assert torch.equal(inputs, torch.cat([w.take(e * w.count, w.count)[0] for e in range(3)]))
    assert len({int(inputs[e * w.count : (e + 1) * w.count].min()) % 9 for e in range(3)}) > 1


def test_a_batch_that_dp_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 samples cannot be split evenly over dp=3"):
        Windows.of(counting(1000), 7, 0).batch(0, 10, 3)


def split(total: int, seq: int, held_out: float) -> Data:
    """Tokens that say where they stand, cut in two."""
    sources = Sources((Source(Flat(counting(total)), "x", True),), None, None, None)
    return cut(sources, seq=seq, seed=0, vocab=total, held_out=held_out)


def test_held_out_text_is_at_the_end_and_never_trained_on() -> None:
    parts = split(5000, 10, 0.1)
    assert parts.held_out is not None
    trained = parts.train.take(0, parts.train.count)[1].max()
    held, _ = parts.held_out.take(0, parts.held_out.count)
    assert trained < 4500 <= held.min()
    assert torch.equal(held.flatten(), torch.arange(4500, 4500 + held.numel()))
    assert split(5000, 10, 0.0).held_out is None


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"x has 99 tokens, fewer than the 128 that model.seq = 64 needs"):
        split(100, 64, 0.01)
    with pytest.raises(ConfigError, match=r"data.held_out = 0.01 of 1000 tokens leaves 10"):
        split(1000, 64, 0.01)
    exact = split(128, 64, 0.0).train
    assert exact.count == 1 and exact.take(0, 3)[0].shape == (3, 64)


# ---------------------------------------------------------------- corpora


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    corpus = library()
    tokens = corpus.as_bytes()
    assert tokens.array.dtype == np.uint8
    assert len(corpus.files) > 300 and len(tokens) > 5_000_000
    text = tokens.array.tobytes()
    assert Path(pytest.__file__).read_bytes() not in text
    import argparse

    assert Path(argparse.__file__).read_bytes() in text
    assert {"test", "site-packages", "dist-packages"} <= NOT_LIBRARY
    assert tokens.digest() == library().as_bytes().digest()


def test_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "blob").write_bytes(b"\0")
    folder = find_text(str(tmp_path), "data.path").as_bytes()
    assert folder.array.tobytes() == b"one" + SEPARATOR + b"two"
    single = find_text(str(tmp_path / "b.txt"), "data.path").as_bytes()
    assert single.array.tobytes() == b"two"
    assert isinstance(single.array, np.memmap), "a large file is mapped, not read"
    assert single.digest() != folder.digest()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_bytes(b""), "is an empty file"),
        (lambda p: p.mkdir(), "is a folder without files"),
        (lambda p: (p.mkdir(), (p / "f").write_bytes(b"a\0b")), "contains a zero byte and is not text"),
    ],
)
def test_what_is_not_text_says_so(tmp_path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=says):
        find_text(str(tmp_path / "data"), "data.path").as_bytes()


def test_the_digest_of_a_large_corpus_still_sees_length_and_both_ends() -> None:
    big = np.zeros(70 << 20, dtype=np.uint8)
    digests = {Flat(big).digest(), Flat(big[:-1]).digest()}
    for position in (0, -1):
        big[position] = 1
        digests.add(Flat(big).digest())
        big[position] = 0
    assert len(digests) == 4
