"""Counter-based draws: published vectors, the torch reference bit for bit, and independence of layout."""

from __future__ import annotations

import math

import pytest
import torch

from triloom import _C, native, philox
from triloom.errors import ConfigError
from triloom.shards import ShardSpec, split_even
from triloom_kernels import draws, dropout

# Known answers of Philox4x32-10 as published with Random123: (counter, key, result).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = philox.key(7, "test", 3)

# Shape, index strides, base: odd sizes, a segment's edge, high counter words, repeated and permuted indices.
BOXES = [
    ((), (), 5),
    ((0,), (1,), 0),
    ((1,), (1,), 3),
    ((7,), (1,), 2),
    ((4097,), (1,), 1),
    ((5, 0, 3), (9, 3, 1), 0),
    ((3, 5, 7), (35, 7, 1), 6),
    ((3, 5, 7), (1000, 70, 1), 2**34 - 3),
    ((6, 9), (1, 6), 11),
    ((9, 5), (0, 1), 2**62 + 1),
    ((4, 3), (7, 3), 2),
    ((2, 1030), (1030, 1), 0),
]


def reference(values: philox._Values, shape, strides, base, key, numbers, dtype) -> torch.Tensor:
    like = torch.empty(shape, dtype=dtype)
    return philox._rounded(values(draws.indices(like, base, strides), key, *numbers), dtype)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_vectors(counter, key, words):
    assert tuple(_C.philox4x32(counter, key)) == words
    torch_words = draws.philox_rounds(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in torch_words) == words


def test_key_is_the_same_everywhere():
    assert philox.key(0) == 9549033805879814570
    assert philox.key(1, "embed.weight", 2) == 281879288326353259
    keys = {philox.key(*parts) for parts in [(1,), (1, 1), (1, "1"), (11,), (1, "a", "b"), (1, "ab"), (-1,), (2**70,)]}
    assert len(keys) == 8
    with pytest.raises(ConfigError, match=r"1\.5"):
        philox.key(0, 1.5)


@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize(("shape", "strides", "base"), BOXES)
def test_fills_equal_the_torch_reference(shape, strides, base, dtype):
    out = torch.full(shape, 9.0, dtype=dtype)
    assert philox.normal_(out, KEY, base, strides, 0.25, 3.0) is out
    assert torch.equal(out, reference(philox._normal_values, shape, strides, base, KEY, (0.25, 3.0), dtype))
    philox.uniform_(out, KEY, base, strides, -1.5, 2.0)
    assert torch.equal(out, reference(philox._uniform_values, shape, strides, base, KEY, (-1.5, 2.0), dtype))


@pytest.mark.parametrize("dtype", native.FLOATS)
def test_memory_layout_does_not_matter(dtype):
    whole = philox.normal_(torch.empty(6, 10, 14, dtype=dtype), KEY, 3, (140, 14, 1))
    transposed = torch.empty(14, 6, 10, dtype=dtype).permute(1, 2, 0)
    assert torch.equal(philox.normal_(transposed, KEY, 3, (140, 14, 1)), whole)
    frame = torch.zeros(8, 12, 33, dtype=dtype)
    inside = frame[1:7, 1:11, 3:31:2]
    assert torch.equal(philox.normal_(inside, KEY, 3, (140, 14, 1)), whole)
    assert torch.count_nonzero(frame) == torch.count_nonzero(whole), "written outside of the view"


def test_pieces_and_threads_do_not_matter():
    n = 100_003
    whole = philox.normal_(torch.empty(n), KEY, 0, (1,))
    for threads in (1, 2, 3):
        pool = native.Pool(threads)
        assert torch.equal(philox.normal_(torch.empty(n), KEY, 0, (1,), pool=pool), whole)
        x = torch.ones(n)
        assert torch.equal(philox.dropout(x, 0.3, KEY, 0, (1,), pool=pool), philox.dropout(x, 0.3, KEY, 0, (1,)))
    for start in (1, 2, 3, 1023, 99_990):
        assert torch.equal(philox.normal_(torch.empty(n - start), KEY, start, (1,)), whole[start:])


def test_reference_in_pieces(monkeypatch):
    monkeypatch.setattr(draws, "_CHUNK", 10)
    parts = list(draws.pieces((torch.arange(105).view(3, 5, 7),), 0, (35, 7, 1)))
    assert max(p.numel() for (p,), _ in parts) <= 10
    assert sum(p.numel() for (p,), _ in parts) == 105
    assert all(int(p[0, 0, 0]) == at for (p,), at in parts), "a piece starts at the index of its first element"


def test_normals_against_the_math_library():
    n = 4000
    z = philox.normal_(torch.empty(n, dtype=torch.float64), KEY, 0, (1,)).tolist()
    for i in range(0, n, 2):
        words = _C.philox4x32((i // 4, 0, 0, 0), (KEY & 0xFFFFFFFF, KEY >> 32))
        first, second = words[i % 4], words[i % 4 + 1]
        radius = math.sqrt(-2.0 * math.log((first + 0.5) / 2**32))
        angle = 2.0 * math.pi * second / 2**32
        assert z[i] == pytest.approx(radius * math.cos(angle), rel=1e-14, abs=3e-15)
        assert z[i + 1] == pytest.approx(radius * math.sin(angle), rel=1e-14, abs=3e-15)


def test_transforms_at_the_edges():
    words = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31, 2**31 + 2**29, 3 * 2**30, 2**32 - 1])
    cosine, sine = philox._on_circle(words)
    angle = words.double() * (2 * math.pi / 2**32)
    torch.testing.assert_close(cosine, angle.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(sine, angle.sin(), rtol=0, atol=1e-15)
    log = philox._log_of_word(words)
    expected = torch.tensor([math.log((int(w) + 0.5) / 2**32) for w in words], dtype=torch.float64)
    torch.testing.assert_close(log, expected, rtol=1e-15, atol=0)
    assert bool((log < 0).all()), "the radius is real"


def test_distributions():
    n = 1 << 20
    z = philox.normal_(torch.empty(n, dtype=torch.float64), KEY, 0, (1,))
    bounds = 5 / math.sqrt(n)
    assert abs(z.mean()) < bounds
    assert abs(z.square().mean() - 1) < bounds * math.sqrt(2)
    assert abs((z**4).mean() - 3) < bounds * math.sqrt(96)
    assert abs((z[:-1] * z[1:]).mean()) < bounds
    for at in (-2.0, -1.0, 0.5, 1.5):
        share = 0.5 * math.erfc(-at / math.sqrt(2))
        assert abs((z < at).double().mean() - share) < bounds * 0.5
    u = philox.uniform_(torch.empty(n, dtype=torch.float64), KEY, 0, (1,))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < bounds * math.sqrt(1 / 12)
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 130, "chi-square of 63 degrees of freedom"


SPECS = [
    ShardSpec((6, 5)),
    ShardSpec((9, 5), 0, ((3, 6),)),
    ShardSpec((9, 7), 1, ((2, 5),)),
    ShardSpec((12, 5), 0, ((0, 2), (4, 5), (9, 12))),
    ShardSpec((3, 12, 2), 1, ((1, 2), (7, 7), (8, 11))),
    ShardSpec((10,), 0, ((9, 10),)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("init", sorted(philox.INITS))
@pytest.mark.parametrize("dtype", native.FLOATS)
def test_a_shard_is_a_slice_of_the_whole(spec, init, dtype):
    whole = philox.fill_shard(torch.empty(spec.global_shape, dtype=dtype), KEY, ShardSpec(spec.global_shape), init, 0.5)
    expected = whole
    if spec.dim is not None:
        expected = torch.cat([whole.narrow(spec.dim, a, b - a) for a, b in spec.slices], spec.dim)
    shard = torch.nn.Parameter(torch.full(expected.shape, 9.0, dtype=dtype))
    assert torch.equal(philox.fill_shard(shard, KEY, spec, init, 0.5), expected)


def test_shards_have_the_deviation_asked_for():
    for init in philox.INITS:
        x = philox.fill_shard(torch.empty(300, 400), KEY, ShardSpec((300, 400)), init, 0.02)
        assert x.std() == pytest.approx(0.02, rel=0.01)
        assert abs(x.mean()) < 3e-4


def test_shards_of_every_mesh_make_one_parameter():
    whole = philox.fill_shard(torch.empty(50, 6), KEY, ShardSpec((50, 6)), std=0.1)
    for tp in (2, 3, 4, 7):
        parts = [
            philox.fill_shard(torch.empty(b - a, 6), KEY, ShardSpec((50, 6), 0, ((a, b),)), std=0.1)
            for a, b in split_even(50, tp)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize(("shape", "strides", "base"), BOXES)
def test_dropout_equals_the_torch_reference(shape, strides, base, dtype):
    x = philox.normal_(torch.empty(shape, dtype=dtype), KEY + 1, base, strides)
    out = philox.dropout(x, 0.3, KEY, base, strides)
    index = draws.indices(x, base, strides)
    assert torch.equal(out, dropout.drop_values(x, index, KEY, int(0.3 * 2**32), 1 / 0.7))


@pytest.mark.parametrize("dtype", native.FLOATS)
def test_dropout_of_strided_and_expanded(dtype):
    x = torch.randn(6, 10, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = philox.dropout(x, 0.4, KEY, 0, (140, 14, 1))
    strided = torch.zeros(14, 12, 10, dtype=dtype)[:, ::2].permute(1, 2, 0)
    strided.copy_(x)
    assert torch.equal(philox.dropout(strided, 0.4, KEY, 0, (140, 14, 1)), expected)
    row = x[:1].expand(6, 10, 14)
    assert torch.equal(
        philox.dropout(row, 0.4, KEY, 0, (140, 14, 1)), philox.dropout(row.contiguous(), 0.4, KEY, 0, (140, 14, 1))
    )


def test_dropout_gradients():
    x = torch.randn(40, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = philox.dropout(x, 0.25, KEY, 100, (33, 1))
    factor = philox.dropout(torch.ones(40, 33, dtype=torch.float64), 0.25, KEY, 100, (33, 1))
    assert set(factor.unique().tolist()) == {0.0, 1 / 0.75}
    assert out.grad_fn.saved_tensors == ()
    (grad,) = torch.autograd.grad(out.sum(), x)  # sum hands back an expanded gradient
    assert torch.equal(grad, factor)
    small = x[:3, :4].detach().requires_grad_()
    function = lambda t: philox.dropout(t, 0.5, KEY, 0, (4, 1)) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(function, small)
    assert torch.autograd.gradgradcheck(function, small)


def test_dropout_rate_and_special_values():
    n = 1 << 18
    for p in (1e-3, 0.1, 0.5, 0.99):
        kept = torch.count_nonzero(philox.dropout(torch.ones(n), p, KEY, 0, (1,))).item() / n
        assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    mask = philox.dropout(torch.ones(64), 0.5, KEY, 0, (1,)) == 0
    for value in (math.nan, math.inf, -math.inf):
        for dtype in native.FLOATS:
            out = philox.dropout(torch.full((64,), value, dtype=dtype), 0.5, KEY, 0, (1,))
            assert torch.equal(out == 0, mask), "dropped elements are zero whatever they were"
            assert not bool(torch.isfinite(out[~mask]).any())


def test_dropout_probability():
    x = torch.ones(3, requires_grad=True)
    assert philox.dropout(x, 0.0, KEY, 0, (1,)) is x
    for p in (1.0, -0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match=r"\[0, 1\)"):
            philox.dropout(x, p, KEY, 0, (1,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: philox.normal_(torch.empty(3, dtype=torch.int64), KEY, 0, (1,)), "int64"),
        (lambda: philox.normal_(torch.empty(3, 4), KEY, 0, (1,)), "one entry per dimension"),
        (lambda: philox.normal_(torch.empty(3), KEY, -1, (1,)), "negative"),
        (lambda: philox.normal_(torch.empty(3), KEY, 0, (-1,)), "negative"),
        (lambda: philox.normal_(torch.empty(3), 1 << 64, 0, (1,)), "64-bit"),
        (lambda: philox.normal_(torch.empty(3), KEY, 2**63 - 2, (1,)), "beyond"),
        (lambda: philox.normal_(torch.empty(1, 3).expand(4, 3), KEY, 0, (3, 1)), "expanded"),
        (lambda: philox.normal_(torch.empty(3), KEY, 0, (1,), 0.0, -1.0), "std"),
        (lambda: philox.uniform_(torch.empty(3), KEY, 0, (1,), 1.0, 0.0), "low"),
        (lambda: philox.dropout(torch.ones(3), 0.5, KEY, 0, (1, 1)), "one entry per dimension"),
        (lambda: philox.fill_shard(torch.empty(3), KEY, ShardSpec((8,), 0, ((0, 4),))), r"\(3,\).*\(4,\)"),
        (lambda: philox.fill_shard(torch.empty(8), KEY, ShardSpec((8,)), "nrmal"), "nrmal"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_last_index_can_be_drawn():
    out = philox.uniform_(torch.empty(3, dtype=torch.float64), KEY, 2**63 - 3, (1,))
    # 2^63 - 3 is word 1 of counter 2^61 - 1.
    words = _C.philox4x32((0xFFFFFFFF, 0x1FFFFFFF, 0, 0), (KEY & 0xFFFFFFFF, KEY >> 32))
    assert out.tolist() == [w / 2**32 for w in words[1:]]


def test_autograd_notices_a_fill():
    x = torch.ones(4)
    weight = torch.ones(4, requires_grad=True)
    product = (weight * x).sum()
    philox.normal_(x, KEY, 0, (1,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
