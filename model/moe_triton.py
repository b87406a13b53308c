"""Kernels for the experts of a layer, in Triton's own language; `model.moe_kernels` says what they compute and launches
them.

Untyped, because Triton is: a kernel's arguments are pointers, numbers and compile-time constants.
"""

import triton
import triton.language as tl

from model.triton_kernels import finish


@triton.jit
def expert_gemv_kernel(
    x_ptr, w_ptr, experts_ptr, out_ptr, N, K, ROWS, SHARE: tl.constexpr, GATE: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """N outputs of each pair of a token and an expert. SHARE pairs have one row of x; an expert has ROWS rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.program_id(1)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    w_ptrs = w_ptr + (expert * ROWS + rows[:, None]) * K + cols[None, :]
    x_ptrs = x_ptr + (pair // SHARE).to(tl.int64) * K + cols
    gate_stride = N.to(tl.int64) * K
    mask = mask_n[:, None] if EVEN_K else mask_n[:, None] & (cols < K)[None, :]
    w = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATE != 0:
        u = tl.load(w_ptrs + gate_stride, mask=mask, other=0.0, eviction_policy="evict_first")
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=None if EVEN_K else k + cols < K, other=None if EVEN_K else 0.0).to(tl.float32)
        mask_next = mask_n[:, None] & (k + BLOCK_K + cols < K)[None, :]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        w_next = tl.load(w_ptrs, mask=mask_next, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
        if GATE != 0:
            u_next = tl.load(w_ptrs + gate_stride, mask=mask_next, other=0.0, eviction_policy="evict_first")
            up += u.to(tl.float32) * x[None, :]
            u = u_next
        w = w_next
    z = tl.sum(up, 1) if GATE != 0 else 0.0
    finish(
        tl.sum(acc, 1), z, 0.0, rows, None, None, out_ptr + pair.to(tl.int64) * N, N, K, 0.0, 1.0, False, False, False,
        GATE,
    )


@triton.jit
def expert_sum_kernel(
    x_ptr, w_ptr, experts_ptr, weights_ptr, out_ptr, N, K, C: tl.constexpr, STEPS: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """N outputs of each token: the sum over its C experts of weight * (rows of the expert) @ (its row of x). STEPS: K
    in units of BLOCK_K, rounded up.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    there = tl.minimum(rows, N - 1)  # a row beyond the last reads the last, and is not stored
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in range(C * STEPS):
        pair = token * C + step // STEPS
        at = step % STEPS * BLOCK_K + cols
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        weight = tl.load(weights_ptr + pair)
        w_ptrs = w_ptr + (expert * N + there[:, None]) * K + at[None, :]
        x_ptrs = x_ptr + pair.to(tl.int64) * K + at
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first").to(tl.float32)
            x = tl.load(x_ptrs).to(tl.float32)
        else:
            w = tl.load(w_ptrs, mask=(at < K)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
            x = tl.load(x_ptrs, mask=at < K, other=0.0).to(tl.float32)
        acc += w * (x * weight)[None, :]
    y = tl.sum(acc, 1)
    tl.store(out_ptr + token.to(tl.int64) * N + rows, y.to(out_ptr.dtype.element_ty), mask=mask_n)
