"""Forward of flash attention: one pass over the keys with a running maximum and sum.

Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 1, in the loop order of FlashAttention-2, arXiv 2307.08691,
section 3.1: a program owns queries and walks over keys; the division by the sum comes last. Scores are in
units of log 2, where an exponential is one instruction, and the scale is folded into its argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launching import launch, tl, triton
from .problem import Problem
from .tiles import Options, empty_in_order, load_rows, place, rows_at, seen_keys, seen_tile, store_rows, strides

LOG2_E = 1.4426950408889634


@triton.jit
def _add_keys(
    acc, top, total, q, k_rows, v_rows, k_s, v_s, first, key, shift, n, window, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running ``(acc, top, total)`` of each query with the keys from ``key`` on."""
    k = load_rows(k_rows, key, k_s, n, BLOCK_N, D, WIDTH, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(
            seen_tile(first, key, shift, n, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED), scores, float("-inf")
        )
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:  # a query that has seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(scores * scale - base[:, None])
    shrink = tl.math.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = load_rows(v_rows, key, v_s, n, BLOCK_N, D, WIDTH, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, starts_q, starts_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, l_b, l_h,
    blocks, heads, group, m, n, window, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head. Causal: the long rows come first, so that the short ones fill gaps."""
    block, head, batch, first_q, first_k, m, n = place(blocks, heads, starts_q, starts_k, m, n, PACKED)
    if CAUSAL:
        block = blocks - 1 - block
    first = block * BLOCK_M
    if first < m:
        shift = n - m
        k_rows = rows_at(k, batch, head // group, first_k, k_b, k_h, k_s)
        v_rows = rows_at(v, batch, head // group, first_k, v_b, v_h, v_s)
        rows = load_rows(rows_at(q, batch, head, first_q, q_b, q_h, q_s), first, q_s, m, BLOCK_M, D, WIDTH, True)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        begin, end, edges, start, left, jump = seen_keys(
            first, m, n, shift, window, BLOCK_M, BLOCK_N, EDGE, CAUSAL, WINDOWED
        )
        for key in range(begin, end, BLOCK_N):
            acc, top, total = _add_keys(
                acc, top, total, rows, k_rows, v_rows, k_s, v_s, first, key, shift, n, window, scale,
                D, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, False,
            )  # fmt: skip
        for edge in range(edges):
            key = start + edge * EDGE + tl.where(edge < left, 0, jump)
            acc, top, total = _add_keys(
                acc, top, total, rows, k_rows, v_rows, k_s, v_s, first, key, shift, n, window, scale,
                D, WIDTH, BLOCK_M, EDGE, CAUSAL, WINDOWED, True,
            )  # fmt: skip
        nothing = total == 0.0  # not by top: a row of nan has none either
        total = tl.where(nothing, 1.0, total)
        acc = acc / total[:, None]
        query = first + tl.arange(0, BLOCK_M)
        store_rows(rows_at(out, batch, head, first_q, o_b, o_h, o_s), first, o_s, m, acc, BLOCK_M, D, WIDTH)
        value = tl.where(nothing, float("-inf"), (top + tl.math.log2(total)) * 0.6931471805599453)
        tl.store(rows_at(lse, batch, head, first_q, l_b, l_h, 1) + query, value, mask=query < m)


def forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, options: Options) -> tuple[Tensor, Tensor]:
    """``(out, lse)``: out as q, in the order of q's memory; lse fp32 ``[b, heads, s]``, natural logarithm."""
    b, heads, s, head_dim = q.shape
    out = empty_in_order(q)
    lse = torch.empty(b, heads, s, dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(problem.longest_q, options["BLOCK_M"])
    launch(
        attention_forward_kernel,
        (blocks * heads * problem.sequences,),
        *(q, k, v, out, lse, problem.starts_q, problem.starts_k),
        *strides(q, k, v, out, lse),
        *(blocks, heads, heads // k.shape[1], s, k.shape[2], problem.window, problem.scale * LOG2_E),
        D=head_dim,
        WIDTH=problem.width,
        CAUSAL=problem.causal,
        WINDOWED=problem.windowed,
        PACKED=problem.packed,
        **options,
    )
    return out, lse
