"""Backward of flash attention, deterministic: each gradient has one program that sums it in a fixed order.

With P = exp(S - lse), D = rowsum(dO * O) - dlse and dS = P * (dO V^T - D), per head

    dV = P^T dO        dK = scale dS^T Q        dQ = scale dS K

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2, cut in two: one kernel owns keys and walks over the queries of
all heads that share them, the other owns queries and walks over keys. Scores and dO V^T are computed twice, seven
products in place of five: the price of neither atomic additions nor a buffer of partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launching import launch, tl, triton
from .forward import LOG2_E
from .problem import Problem
from .tiles import (
    Options,
    empty_in_order,
    load_rows,
    place,
    rows_at,
    seeing_queries,
    seen_keys,
    seen_tile,
    store_rows,
    strides,
    visible,
)

LONGEST_TILE = 128
"""Most queries of a tile, and a multiple of all."""
NOWHERE = tl.constexpr(-(2**30))
"""Where queries stand that do not exist: no key is seen from there."""


@triton.jit
def attention_dots_kernel(
    out, grad, lse, grad_lse, tops, dots, o_b, o_h, o_s, g_b, g_h, g_s, l_b, l_h, d_b, d_h, blocks, heads, m,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """What the other kernels need of each query: D, and the log of its sum in units of log 2.

    A query that sees nothing, or does not exist, gets inf for the latter: every probability is 0.
    """
    block, head, batch, _q, _k, m, _n = place(blocks, heads, None, None, m, m, False)
    first = block * BLOCK_M
    x = load_rows(rows_at(out, batch, head, 0, o_b, o_h, o_s), first, o_s, m, BLOCK_M, D, WIDTH, True)
    g = load_rows(rows_at(grad, batch, head, 0, g_b, g_h, g_s), first, g_s, m, BLOCK_M, D, WIDTH, True)
    query = first + tl.arange(0, BLOCK_M)
    dot = tl.sum(x.to(tl.float32) * g.to(tl.float32), 1)
    if WITH_LSE:
        dot -= tl.load(rows_at(grad_lse, batch, head, 0, l_b, l_h, 1) + query, mask=query < m, other=0.0)
    top = tl.load(rows_at(lse, batch, head, 0, l_b, l_h, 1) + query, mask=query < m, other=float("-inf"))
    top = tl.where(top == float("-inf"), float("inf"), top * 1.4426950408889634)
    tl.store(rows_at(dots, batch, head, 0, d_b, d_h, 1) + query, dot)
    tl.store(rows_at(tops, batch, head, 0, d_b, d_h, 1) + query, top)


@triton.jit
def _add_queries(
    dk, dv, k, v, q_rows, g_rows, tops, dots, q_s, g_s, first, start, m, shift, window, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``(dk, dv)`` with the queries from ``start`` on of one head. Everything is transposed: keys are rows."""
    q = load_rows(q_rows, start, q_s, m, BLOCK_M, D, WIDTH, MASKED)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    g = load_rows(g_rows, start, g_s, m, BLOCK_M, D, WIDTH, MASKED)
    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
    query = start + tl.arange(0, BLOCK_M)
    p = tl.math.exp2(scores * scale - tl.load(tops + query)[None, :])
    if MASKED:
        at = tl.arange(0, BLOCK_M)  # the first query stands at 0: columns keep their small numbers, fewer registers
        if PACKED:  # behind the last query comes another sequence; else what follows has probability 0
            at = tl.where(at < m - start, at, NOWHERE)
        key = tl.arange(0, BLOCK_N) + (first - shift - start)
        if CAUSAL or WINDOWED:
            p = tl.where(visible(at[None, :], key[:, None], window, CAUSAL, WINDOWED), p, 0.0)
        elif PACKED:
            p = tl.where((at >= 0)[None, :], p, 0.0)
    ds = p * (dp - tl.load(dots + query)[None, :])
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    q, k, v, grad, tops, dots, dk, dv, starts_q, starts_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, d_b, d_h,
    blocks, heads, group, m, n, window, scale, scale_log2,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_N keys of one key head, and the query heads that share it in turn."""
    block, kv_head, batch, first_q, first_k, m, n = place(blocks, heads, starts_q, starts_k, m, n, PACKED)
    first = block * BLOCK_N
    if first < n:
        shift = n - m
        keys = load_rows(rows_at(k, batch, kv_head, first_k, k_b, k_h, k_s), first, k_s, n, BLOCK_N, D, WIDTH, True)
        values = load_rows(rows_at(v, batch, kv_head, first_k, v_b, v_h, v_s), first, v_s, n, BLOCK_N, D, WIDTH, True)
        dkey = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        dvalue = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        begin, end, edges, start, left, jump = seeing_queries(
            first, m, n, shift, window, BLOCK_N, BLOCK_M, EDGE, CAUSAL, WINDOWED
        )
        # One loop over the query heads and their tiles each: nested ones would drain the pipeline with every head, and
        # want registers for what they hand from one to the next.
        head, edge = kv_head * group, 0
        for _ in range(edges * group):
            query = start + edge * EDGE + tl.where(edge < left, 0, jump)
            dkey, dvalue = _add_queries(
                dkey, dvalue, keys, values,
                rows_at(q, batch, head, first_q, q_b, q_h, q_s), rows_at(grad, batch, head, first_q, g_b, g_h, g_s),
                rows_at(tops, batch, head, first_q, d_b, d_h, 1), rows_at(dots, batch, head, first_q, d_b, d_h, 1),
                q_s, g_s, first, query, m, shift, window, scale_log2,
                D, WIDTH, EDGE, BLOCK_N, CAUSAL, WINDOWED, PACKED, True,
            )  # fmt: skip
            last = edge + 1 == edges
            head += tl.where(last, 1, 0)
            edge = tl.where(last, 0, edge + 1)
        head, query = kv_head * group, begin
        for _ in range((end - begin) // BLOCK_M * group):
            dkey, dvalue = _add_queries(
                dkey, dvalue, keys, values,
                rows_at(q, batch, head, first_q, q_b, q_h, q_s), rows_at(grad, batch, head, first_q, g_b, g_h, g_s),
                rows_at(tops, batch, head, first_q, d_b, d_h, 1), rows_at(dots, batch, head, first_q, d_b, d_h, 1),
                q_s, g_s, first, query, m, shift, window, scale_log2,
                D, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, PACKED, False,
            )  # fmt: skip
            last = query + BLOCK_M == end
            head += tl.where(last, 1, 0)
            query = tl.where(last, begin, query + BLOCK_M)
        dkey *= scale
        store_rows(rows_at(dk, batch, kv_head, first_k, dk_b, dk_h, dk_s), first, dk_s, n, dkey, BLOCK_N, D, WIDTH)
        store_rows(rows_at(dv, batch, kv_head, first_k, dv_b, dv_h, dv_s), first, dv_s, n, dvalue, BLOCK_N, D, WIDTH)


@triton.jit
def _add_keys(
    dq, q, g, top, dot, k_rows, v_rows, k_s, v_s, first, start, shift, n, window, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``dq`` with the keys from ``start`` on."""
    k = load_rows(k_rows, start, k_s, n, BLOCK_N, D, WIDTH, MASKED)
    v = load_rows(v_rows, start, v_s, n, BLOCK_N, D, WIDTH, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.math.exp2(scores * scale - top[:, None])
    if MASKED:
        p = tl.where(seen_tile(first, start, shift, n, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED), p, 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - dot[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def attention_dq_kernel(
    q, k, v, grad, tops, dots, dq, starts_q, starts_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, d_b, d_h,
    blocks, heads, group, m, n, window, scale, scale_log2,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head, as in the forward."""
    block, head, batch, first_q, first_k, m, n = place(blocks, heads, starts_q, starts_k, m, n, PACKED)
    if CAUSAL:
        block = blocks - 1 - block
    first = block * BLOCK_M
    if first < m:
        shift = n - m
        k_rows = rows_at(k, batch, head // group, first_k, k_b, k_h, k_s)
        v_rows = rows_at(v, batch, head // group, first_k, v_b, v_h, v_s)
        rows = load_rows(rows_at(q, batch, head, first_q, q_b, q_h, q_s), first, q_s, m, BLOCK_M, D, WIDTH, True)
        g = load_rows(rows_at(grad, batch, head, first_q, g_b, g_h, g_s), first, g_s, m, BLOCK_M, D, WIDTH, True)
        query = first + tl.arange(0, BLOCK_M)
        top = tl.load(rows_at(tops, batch, head, first_q, d_b, d_h, 1) + query)
        dot = tl.load(rows_at(dots, batch, head, first_q, d_b, d_h, 1) + query)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        begin, end, edges, start, left, jump = seen_keys(
            first, m, n, shift, window, BLOCK_M, BLOCK_N, EDGE, CAUSAL, WINDOWED
        )
        for key in range(begin, end, BLOCK_N):
            acc = _add_keys(
                acc, rows, g, top, dot, k_rows, v_rows, k_s, v_s, first, key, shift, n, window,
                scale_log2, D, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, False,
            )  # fmt: skip
        for edge in range(edges):
            key = start + edge * EDGE + tl.where(edge < left, 0, jump)
            acc = _add_keys(
                acc, rows, g, top, dot, k_rows, v_rows, k_s, v_s, first, key, shift, n, window,
                scale_log2, D, WIDTH, BLOCK_M, EDGE, CAUSAL, WINDOWED, True,
            )  # fmt: skip
        acc *= scale
        store_rows(rows_at(dq, batch, head, first_q, dq_b, dq_h, dq_s), first, dq_s, m, acc, BLOCK_M, D, WIDTH)


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    saved: tuple[Tensor, ...],
    problem: Problem,
    options: dict[str, Options],
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``, each in the order of its tensor's memory. saved: q, k, v, out, lse of the forward.

    grad: as out, the last dimension contiguous; grad_lse: as lse and contiguous, or None for zeros.
    options: of ``dots``, ``dkdv`` and ``dq``.
    """
    q, k, v, out, lse = saved
    _, heads, s, head_dim = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    sizes = {"D": head_dim, "WIDTH": problem.width}
    kind = sizes | {"CAUSAL": problem.causal, "WINDOWED": problem.windowed, "PACKED": problem.packed}
    common = (s, length, problem.window, problem.scale, problem.scale * LOG2_E)
    starts = (problem.starts_q, problem.starts_k)
    # Whole tiles may be read behind the last query: of a sequence that is not the last, only to be masked.
    rows = triton.cdiv(s, LONGEST_TILE) * LONGEST_TILE + LONGEST_TILE
    tops, dots = torch.empty(2, q.shape[0], heads, rows, dtype=torch.float32, device=q.device)
    blocks = rows // options["dots"]["BLOCK_M"]
    launch(
        attention_dots_kernel,
        (blocks * heads * q.shape[0],),
        *(out, grad, lse, grad_lse, tops, dots, *strides(out, grad, lse, dots), blocks, heads, s),
        WITH_LSE=grad_lse is not None,
        **(sizes | options["dots"]),
    )
    dk, dv, dq = empty_in_order(k), empty_in_order(v), empty_in_order(q)
    blocks = triton.cdiv(problem.longest_k, options["dkdv"]["BLOCK_N"])
    launch(
        attention_dkdv_kernel,
        (blocks * k.shape[1] * problem.sequences,),
        *(q, k, v, grad, tops, dots, dk, dv, *starts, *strides(q, k, v, grad, dk, dv, dots)),
        *(blocks, k.shape[1], group, *common),
        **(kind | options["dkdv"]),
    )
    blocks = triton.cdiv(problem.longest_q, options["dq"]["BLOCK_M"])
    launch(
        attention_dq_kernel,
        (blocks * heads * problem.sequences,),
        *(q, k, v, grad, tops, dots, dq, *starts, *strides(q, k, v, grad, dq, dots)),
        *(blocks, heads, group, *common),
        **(kind | options["dq"]),
    )
    return dq, dk, dv
