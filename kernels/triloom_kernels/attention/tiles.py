"""What the attention kernels share: which program has which tile, loads of rows, and which keys a query sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launching import tl, triton


@triton.jit
def place(blocks, heads, starts_q, starts_k, m, n, PACKED: tl.constexpr):
    """This program's ``(block, head, batch, first query, first key, queries, keys)``.

    Blocks of one head are neighbours in launch order, then heads that share keys: what is read together lies in the
    L2 cache together. With packed sequences the batch is one, and sequences take its place in the grid.
    """
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % heads
    batch = program // (blocks * heads)
    first_q = 0
    first_k = 0
    if PACKED:
        first_q = tl.load(starts_q + batch)
        first_k = tl.load(starts_k + batch)
        m = tl.load(starts_q + batch + 1) - first_q
        n = tl.load(starts_k + batch + 1) - first_k
        batch = 0
    return block, head, batch, first_q, first_k, m, n


@triton.jit
def rows_at(base, batch, head, first, by_batch, by_head, by_row):
    """Pointer to row ``first`` of a head; 64-bit, as whole tensors may pass 2^31 elements."""
    zero = tl.zeros((), tl.int64)
    return base + (zero + batch) * by_batch + (zero + head) * by_head + (zero + first) * by_row


@triton.jit
def load_rows(
    base, first, by_row, limit, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr
):
    """Rows ``first .. first + ROWS`` as ``[ROWS, WIDTH]``; zeros beyond column D and, if CHECKED, from row limit on.

    Only the scalar part of the address is 64 bits wide: offsets inside a tile are not worth two registers each.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = base + (tl.zeros((), tl.int64) + first) * by_row + (row[:, None] * by_row + column[None, :])
    if CHECKED and WIDTH != D:
        return tl.load(at, mask=(first + row < limit)[:, None] & (column < D)[None, :], other=0.0)
    if CHECKED:
        return tl.load(at, mask=(first + row < limit)[:, None], other=0.0)
    if WIDTH != D:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(base, first, by_row, limit, tile, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of a checked :func:`load_rows`; rounds to the element type of ``base``."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = base + (tl.zeros((), tl.int64) + first) * by_row + (row[:, None] * by_row + column[None, :])
    mask = (first + row < limit)[:, None] & (column < D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible(at, key, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether queries that stand at the keys ``at`` see ``key``, broadcast. One of the two options must be on."""
    if CAUSAL and WINDOWED:
        return (key <= at) & (key > at - window)
    if WINDOWED:
        return (key < at + window) & (key > at - window)
    return key <= at


@triton.jit
def seen_tile(query, key, shift, n, window, ROWS: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr,
              WINDOWED: tl.constexpr):  # fmt: skip
    """``[ROWS, STEP]``: whether the queries from ``query`` on see the keys from ``key`` on, which end at n."""
    at = (tl.arange(0, ROWS) + (query + shift - key))[:, None]  # columns keep their small numbers: fewer registers
    keys = tl.arange(0, STEP)[None, :]
    if CAUSAL:  # the last query stands at the last key: no query sees beyond
        return visible(at, keys, window, CAUSAL, WINDOWED)
    if WINDOWED:
        return visible(at, keys, window, CAUSAL, WINDOWED) & (keys < n - key)
    return tl.broadcast_to(keys < n - key, (ROWS, STEP))


@triton.jit
def between(low_first, low_last, high_first, high_last, limit, STEP: tl.constexpr, EDGE: tl.constexpr):
    """The walk over what a tile of rows sees: ``(first, last, edges, start, left, jump)``.

    low, high: from where to where the first and the last row see, both growing with the row; limit: the length.
    Steps of STEP in ``first .. last`` are seen whole. Step i of the ``edges``, of EDGE each, begins at
    ``start + i * EDGE``, plus jump from the left-th on: one loop for both ends, as its body is costly to have twice.
    Edges are narrower: masks want registers, and less is computed in vain.
    """
    start = tl.maximum(low_first, 0) // EDGE * EDGE
    first = (tl.maximum(low_last, 0) + EDGE - 1) // EDGE * EDGE
    last = first + tl.maximum(tl.minimum(high_first, limit) - first, 0) // STEP * STEP
    stop = tl.minimum(high_last, limit)
    left = tl.maximum(tl.minimum(first, stop) - start + EDGE - 1, 0) // EDGE
    right = tl.maximum(stop - last + EDGE - 1, 0) // EDGE
    return first, last, left + right, start, left, last - first


@triton.jit
def seen_keys(first, m, n, shift, window, ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr,
              CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):  # fmt: skip
    """:func:`between` of the keys that the queries ``first .. first + ROWS`` look at."""
    last = tl.minimum(first + ROWS, m) - 1
    low_first, low_last, high_first, high_last = 0, 0, n, n
    if WINDOWED:
        low_first = first + shift - window + 1
        low_last = last + shift - window + 1
    if CAUSAL:
        high_first = first + shift + 1
        high_last = last + shift + 1
    elif WINDOWED:
        high_first = first + shift + window
        high_last = last + shift + window
    return between(low_first, low_last, high_first, high_last, n, STEP, EDGE)


@triton.jit
def seeing_queries(first, m, n, shift, window, ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):  # fmt: skip
    """:func:`between` of the queries that look at the keys ``first .. first + ROWS``."""
    last = tl.minimum(first + ROWS, n) - 1
    low_first, low_last, high_first, high_last = 0, 0, m, m
    if CAUSAL:
        low_first = first - shift
        low_last = last - shift
    elif WINDOWED:
        low_first = first - shift - window + 1
        low_last = last - shift - window + 1
    if WINDOWED:
        high_first = first - shift + window
        high_last = last - shift + window
    return between(low_first, low_last, high_first, high_last, m, STEP, EDGE)


def strides(*tensors: Tensor) -> list[int]:
    """Of the dimensions before the last, one tensor after the other."""
    return [step for t in tensors for step in t.stride()[:-1]]


def empty_in_order(like: Tensor) -> Tensor:
    """Of the same shape, without gaps, its dimensions in the same order in memory, the last one innermost."""
    order = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    return torch.empty_permuted(like.shape, [*order, like.dim() - 1], dtype=like.dtype, device=like.device)


Options = dict[str, Any]
"""Tile sizes and launch options of one kernel: BLOCK_M (queries), BLOCK_N (keys), EDGE, num_warps, num_stages."""
