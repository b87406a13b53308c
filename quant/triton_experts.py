"""The kernel for quantized experts in Triton's own language; `quant.kernels` says what it computes and launches it,
`quant.packed` how the numbers lie. Untyped, because Triton is.
"""

import triton
import triton.language as tl

from model.triton_kernels import finish


@triton.jit
def _numbers(words, j: tl.constexpr, BITS: tl.constexpr):
    """Number j of each word, as float32; of 8 bits a word is a number."""
    if BITS == 8:
        number = words.to(tl.float32)
    else:
        number = (((words >> (BITS * j)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32)
    return number


@triton.jit
def _scaled(sums, total, scale_ptr, zero_ptr, group, ZERO: tl.constexpr):
    """Sums of products with numbers of one group, as products with the weights that they stand for. total: of x."""
    if ZERO:
        sums -= tl.load(zero_ptr + group).to(tl.float32) * total[None, :]
    return sums * tl.load(scale_ptr + group).to(tl.float32)


@triton.jit
def expert_gemv_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, experts_ptr, out_ptr, N, K, ROWS, WORDS, G, GROUP,
    SHARE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, GATE: tl.constexpr,
    STEPS: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """N outputs of each pair of a token and an expert. SHARE pairs have one row of x; an expert has ROWS rows, a row
    WORDS words: numbers of 8 bits, or 32 bits of smaller ones, BITS words to 32 numbers of one group. STEPS: WORDS in
    units of BLOCK_W, rounded up. SCALED: a row of x has a scale.
    """
    PER: tl.constexpr = 1 if BITS == 8 else 32 // BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.program_id(1)
    at = tl.arange(0, BLOCK_W)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    first = expert * ROWS + tl.minimum(rows, N - 1)  # a row beyond the last reads the last, and is not stored
    x_ptr += (pair // SHARE).to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for step in range(STEPS):
        word = step * BLOCK_W + at
        there = (word < WORDS)[None, :]
        w_ptrs = w_ptr + first[:, None] * WORDS + word[None, :]
        w = tl.load(w_ptrs, mask=there, other=0.0, eviction_policy="evict_first")
        sums = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
        total = tl.zeros((BLOCK_W,), tl.float32)
        if GATE != 0:
            w_ptrs += tl.cast(N, tl.int64) * WORDS
            u = tl.load(w_ptrs, mask=there, other=0.0, eviction_policy="evict_first")
            sums_up = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
        column = word if BITS == 8 else word // BITS * 32 + word % BITS
        for j in tl.static_range(PER):
            k = column + BITS * j
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            total += x
            sums += _numbers(w, j, BITS) * x[None, :]
            if GATE != 0:
                sums_up += _numbers(u, j, BITS) * x[None, :]
        group = first[:, None] * G + tl.minimum(column // GROUP, G - 1)[None, :]
        acc += _scaled(sums, total, scale_ptr, zero_ptr, group, ZERO)
        if GATE != 0:
            up += _scaled(sums_up, total, scale_ptr, zero_ptr, group + tl.cast(N, tl.int64) * G, ZERO)
    y = tl.sum(acc, 1)
    z = tl.sum(up, 1) if GATE != 0 else 0.0
    if SCALED:
        x_scale = tl.load(x_scale_ptr + pair // SHARE)
        y *= x_scale
        z *= x_scale
    finish(
        y, z, 0.0, rows, None, None, out_ptr + pair.to(tl.int64) * N, N, K, 0.0, 1.0, False, False, False, GATE
    )
