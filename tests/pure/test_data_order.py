"""Several sources and the feed: no repeats, exact shares, the same samples whatever dp and wherever one starts."""

from __future__ import annotations

import threading
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triloom.data import Blend, Feed, Samples, Stretch, Windows, prefetch
from triloom.data.blend import LONGEST, pattern, places, shares
from triloom.data.tokens import Documents, Flat
from triloom.errors import ConfigError

SEEDS = st.integers(-(2**63), 2**63)
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
SIZES = st.lists(st.integers(30, 300), min_size=1, max_size=4)
SEQ = 5
FIXTURE = [HealthCheck.function_scoped_fixture]
"""Allowed: the fixture below is the same for every example."""


def stretch(k: int, total: int) -> Stretch:
    """Tokens that say whose they are and where they stand."""
    return Stretch(Flat(np.arange(total, dtype=np.int64) + 1_000_000 * k), f"source {k}")


def joined(sizes: list[int], seed: int = 0) -> Windows:
    return Windows(tuple(stretch(k, n) for k, n in enumerate(sizes)), SEQ, seed)


def blended(sizes: list[int], weights: list[float], seed: int = 0) -> Blend:
    return Blend(tuple(Windows((stretch(k, n),), SEQ, seed + k) for k, n in enumerate(sizes)), tuple(weights))


# ---------------------------------------------------------------- shares


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURE)
@given(counts=COUNTS)
def test_every_source_stays_within_a_sample_of_its_share(counts: list[int]) -> None:
    order = pattern(counts)
    assert Counter(order.tolist()) == dict(enumerate(counts))
    most = 1 - Fraction(1, max(1, 2 * len(counts) - 2))
    for k, count in enumerate(counts):
        used = np.cumsum(order == k).tolist()
        assert all(abs(Fraction(count * n, sum(counts)) - u) <= most for n, u in enumerate(used, 1))
    assert all(places(order)[order == k].tolist() == list(range(n)) for k, n in enumerate(counts))


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURE)
@given(weights=st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_shares_are_as_written_or_to_a_ten_thousandth(weights: list[float]) -> None:
    counts = shares(weights)
    assert sum(counts) <= LONGEST
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / sum(counts) - weight / sum(weights)) < 1 / LONGEST
    assert shares([0.7, 0.3]) == (7, 3) and shares([3, 1]) == (3, 1)
    assert shares([0.123456, 0.876544]) == (1235, 8765)


def test_a_weight_too_small_to_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1e-06 is less than 1 / 10000 of their sum"):
        shares([0.123457, 1e-6])


# ---------------------------------------------------------------- epochs


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURE)
@given(sizes=SIZES, seed=SEEDS)
def test_sources_without_weights_are_one_epoch_together(sizes: list[int], seed: int) -> None:
    samples = joined(sizes, seed)
    for epoch in (0, 1):
        inputs, targets = samples.take(epoch * samples.count, samples.count)
        assert torch.equal(targets, inputs + 1)
        assert len(inputs.unique()) == inputs.numel()
        whose = Counter((inputs[:, 0] // 1_000_000).tolist())
        assert whose == {k: (n - SEQ) // SEQ for k, n in enumerate(sizes)}


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURE)
@given(data=st.data(), sizes=SIZES, seed=SEEDS)
def test_a_blends_sources_go_through_their_own_epochs(data: st.DataObject, sizes: list[int], seed: int) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    samples = blended(sizes, [float(w) for w in weights], seed % 2**32)
    total = 3 * sum(weights) + data.draw(st.integers(0, sum(weights)))
    starts = samples.take(0, total)[0][:, 0]
    for k, source in enumerate(samples.sources):
        mine = starts[starts // 1_000_000 == k]
        assert abs(len(mine) - total * weights[k] / sum(weights)) < 1
        for epoch in range(0, len(mine), source.count):
            assert len(mine[epoch : epoch + source.count].unique()) == len(mine[epoch : epoch + source.count])
        assert torch.equal(mine, source.take(0, len(mine))[0][:, 0]), "in the source's own order"
    epochs = samples.epochs(total)
    assert [round(e * n) for _, n, e in epochs] == [int((starts // 1_000_000 == k).sum()) for k in range(len(sizes))]


def test_sources_of_equal_size_are_not_in_the_same_order() -> None:
    samples = blended([500, 500], [1.0, 1.0])
    starts = samples.take(0, 100)[0][:, 0] % 1_000_000
    assert not torch.equal(starts[0::2], starts[1::2])


# ---------------------------------------------------------------- the feed


KINDS = {
    "one": joined([1000], 3),
    "joined": joined([300, 100, 200], 3),
    "blended": blended([300, 100, 200], [0.5, 0.2, 0.3], 3),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places computed for few samples at a time, so that short runs go from one block to the next."""
    monkeypatch.setattr(prefetch, "LOCATED", 64)


def served(samples: Samples, steps: int, size: int = 12, **options: int) -> list[torch.Tensor]:
    with Feed(samples, size, **options) as feed:
        return [feed.next()[0] for _ in range(steps)]


@settings(max_examples=20, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(sorted(KINDS)), first=st.integers(0, 2000), steps=st.integers(1, 8), data=st.data())
def test_ranks_of_any_dp_starting_anywhere_together_serve_the_same(
    kind: str, first: int, steps: int, data: st.DataObject
) -> None:
    samples = KINDS[kind]
    whole = samples.take(first, 12 * steps)[0]
    dp = data.draw(st.sampled_from([1, 2, 3, 4, 12]))
    ahead = data.draw(st.sampled_from([0, 1, 3]))
    ranks = [served(samples, steps, dp=dp, dp_rank=rank, first=first, ahead=ahead) for rank in range(dp)]
    together = torch.cat([torch.cat([rank[step] for rank in ranks]) for step in range(steps)])
    assert torch.equal(together, whole)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_feed_restarts_from_its_position_with_another_dp(kind: str) -> None:
    """4 -> 2 -> 1 ranks, an epoch's edge inside of a batch: the union is what one uninterrupted rank sees."""
    samples, seen, position = KINDS[kind], [], 0
    for dp, steps in ((4, 7), (2, 5), (1, 6)):
        feeds = [Feed(samples, 12, dp=dp, dp_rank=rank, first=position, ahead=2) for rank in range(dp)]
        for _ in range(steps):
            seen += [feed.next()[0] for feed in feeds]
        position = feeds[0].position
        for feed in feeds:
            assert feed.position == position
            feed.close()
    assert position == 18 * 12 and position > samples.count and samples.count % 12
    assert torch.equal(torch.cat(seen), samples.take(0, position)[0])


def test_a_feed_goes_on_where_places_are_computed_anew() -> None:
    for share in (prefetch.LOCATED // 3, prefetch.LOCATED + 1):
        batches = served(KINDS["one"], 5, size=share)
        assert torch.equal(torch.cat(batches), KINDS["one"].take(0, 5 * share)[0])


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "triloom data"]


def test_a_feed_leaves_no_thread_behind() -> None:
    feeds = [Feed(KINDS["one"], 4, ahead=ahead) for ahead in (0, 1, 5)]
    assert len(threads()) == 2
    feeds[2].next()
    for feed in feeds:
        feed.close()
        feed.close()
        with pytest.raises(RuntimeError, match="closed"):
            feed.next()
    assert not threads()
    with pytest.raises(KeyError), Feed(KINDS["one"], 4, ahead=2):
        raise KeyError
    assert not threads()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_surfaces_at_the_batch_that_has_it(ahead: int) -> None:
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[57] = 300
    samples = Windows((Stretch(Flat(tokens), "data.bin", 256),), 5, 0, shuffle=False)
    with Feed(samples, 2, ahead=ahead) as feed:
        for _ in range(5):
            feed.next()
        with pytest.raises(ConfigError, match=r"token 57 of data.bin is 300, and the vocabulary has 256 tokens"):
            feed.next()
    assert not threads()


# ---------------------------------------------------------------- streams


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12), data=st.data())
def test_documents_are_followed_by_their_token(lengths: list[int], data: st.DataObject) -> None:
    parts, expected = [], []
    for k, n in enumerate(lengths):
        parts.append(np.arange(n, dtype=np.uint16) + 100 * (k + 1))
        expected += [*parts[-1].tolist(), 7]
    stream = Documents.of(np.concatenate(parts), np.cumsum(lengths), 7)
    assert len(stream) == len(expected)
    begin = data.draw(st.integers(0, len(expected) - 1))
    end = data.draw(st.integers(begin + 1, len(expected)))
    inside = stream.part(begin, end)
    length = data.draw(st.integers(1, len(inside)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(inside) - length), min_size=1, max_size=5)))
    rows = inside.windows(starts, length)
    assert rows.tolist() == [expected[begin + s : begin + s + length] for s in starts]
    assert stream.digest() != inside.digest() or (begin, end) == (0, len(expected))


def test_windows_outside_of_a_stream_are_an_error() -> None:
    for starts in ([-1], [8], [0, 7]):
        with pytest.raises(IndexError, match="of 10 tokens"):
            Flat(np.arange(10)).windows(np.array(starts), 4)
