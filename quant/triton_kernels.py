"""The kernels for quantized weights in Triton's own language; `quant.kernels` says what they compute and launches them,
`quant.packed` how the numbers lie. Untyped, because Triton is.
"""

import triton
import triton.language as tl

from model.triton_kernels import finish


@triton.jit
def _inputs(x_ptr, norm_ptr, at, mask, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Inputs at `at`, and multiplied by the norm's weight."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scaled = x
    if NORM:
        g = tl.load(norm_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scaled = x * (g + 1.0) if PLUS_ONE else x * g
    return x, scaled


@triton.jit
def gemv_8bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, N, K, G, eps, multiplier,
    GROUP: tl.constexpr, ZERO: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One number a byte, an integer or a float8. GROUP 0: a scale a row, applied at the end."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    rows_there = tl.minimum(rows, N - 1).to(tl.int64)  # a row beyond the last reads the last, and is not stored
    w_ptrs = w_ptr + rows_there[:, None] * K + cols[None, :]
    gate_stride = N.to(tl.int64) * K
    mask = (cols < K)[None, :]
    # The first numbers are on their way before the kernel that makes x has ended.
    w = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATE != 0:
        u = tl.load(w_ptrs + gate_stride, mask=mask, other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        at = k + cols
        plain, x = _inputs(x_ptr, norm_ptr, at, at < K, NORM, PLUS_ONE)
        if NORM:
            squares += plain * plain
        w_ptrs += BLOCK_K
        mask = (at + BLOCK_K < K)[None, :]
        w_next = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATE != 0:
            u_next = tl.load(w_ptrs + gate_stride, mask=mask, other=0.0, eviction_policy="evict_first")
        number = w.to(tl.float32)
        if GROUP != 0:
            group = rows_there[:, None] * G + tl.minimum(at // GROUP, G - 1)[None, :]
            if ZERO:
                number -= tl.load(zero_ptr + group).to(tl.float32)
            number *= tl.load(scale_ptr + group).to(tl.float32)
        acc += number * x[None, :]
        if GATE != 0:
            number = u.to(tl.float32)
            if GROUP != 0:
                group += N.to(tl.int64) * G
                if ZERO:
                    number -= tl.load(zero_ptr + group).to(tl.float32)
                number *= tl.load(scale_ptr + group).to(tl.float32)
            up += number * x[None, :]
            u = u_next
        w = w_next
    y = tl.sum(acc, 1)
    z = tl.sum(up, 1) if GATE != 0 else 0.0
    if GROUP == 0:
        y *= tl.load(scale_ptr + rows_there).to(tl.float32)
        if GATE != 0:
            z *= tl.load(scale_ptr + N + rows_there).to(tl.float32)
    finish(
        y, z, tl.sum(squares, 0) if NORM else 0.0, rows, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
        NORM, BIAS, RESIDUAL, GATE,
    )


@triton.jit
def _pairs(x_ptr, norm_ptr, at, K, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The inputs at `at` and at their next neighbours."""
    even, even_scaled = _inputs(x_ptr, norm_ptr, at, at < K, NORM, PLUS_ONE)
    odd, odd_scaled = _inputs(x_ptr, norm_ptr, at + 1, at + 1 < K, NORM, PLUS_ONE)
    squares = even * even + odd * odd
    return even_scaled, odd_scaled, squares


@triton.jit
def _plane(words, even, odd, j: tl.constexpr):
    """The products with the numbers at bits 4j of both halves of each 32-bit word, times 16**j, summed over a thread's
    words. A code in the low bits of a float32 2**23 is that float plus the code; taking the float away is exact, and
    cheaper than a conversion.
    """
    magic: tl.constexpr = 0x4B000000
    taken: tl.constexpr = 8388608.0 + 8.0 * 16**j
    low = ((words & (0xF << (4 * j))) | magic).to(tl.float32, bitcast=True) - taken
    high = (((words >> 16) & (0xF << (4 * j))) | magic).to(tl.float32, bitcast=True) - taken
    return tl.sum(low * even[None] + high * odd[None], 2)


@triton.jit
def gemv_4bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, N, K, WORDS, G, eps, multiplier,
    GROUP: tl.constexpr, ZERO: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Eight numbers a 32-bit word, WORDS words a row, a thread takes four words at a time. GROUP 0: a scale a row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_there = tl.minimum(rows, N - 1).to(tl.int64)
    # Planes of a block that share a scale: all where blocks lie within groups, else as many as lie in one.
    SPAN: tl.constexpr = 128 if GROUP % 128 == 0 else (GROUP if 128 % GROUP == 0 else 32)
    quads = tl.arange(0, BLOCK_Q)  # a quad is four words, 32 numbers of four groups of 32; four quads make a block
    words_at = quads[:, None] * 4 + tl.arange(0, 4)[None, :]
    w_ptrs = w_ptr + rows_there[:, None, None] * WORDS + words_at[None]
    gate_stride = N.to(tl.int64) * WORDS
    mask = (words_at < WORDS)[None]
    w = tl.load(w_ptrs, mask=mask, other=0, eviction_policy="evict_first")
    if GATE != 0:
        u = tl.load(w_ptrs + gate_stride, mask=mask, other=0, eviction_policy="evict_first")
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    squares = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(0, WORDS, BLOCK_Q * 4):
        block = (first // 4 + quads) // 4
        x_at = block[:, None] * 128 + (words_at % 16) * 2
        mask = (first + BLOCK_Q * 4 + words_at < WORDS)[None]
        w_ptrs += BLOCK_Q * 4
        w_next = tl.load(w_ptrs, mask=mask, other=0, eviction_policy="evict_first")
        if GATE != 0:
            u_next = tl.load(w_ptrs + gate_stride, mask=mask, other=0, eviction_policy="evict_first")
        part = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
        part_up = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        for j in tl.static_range(4):
            even, odd, its_squares = _pairs(x_ptr, norm_ptr, x_at + 32 * j, K, NORM, PLUS_ONE)
            if NORM:
                squares += tl.sum(its_squares, 1)
            if ZERO:
                total += tl.sum(even + odd, 1)
            even, odd = even * (1.0 / 16**j), odd * (1.0 / 16**j)
            part += _plane(w, even, odd, j)
            if GATE != 0:
                part_up += _plane(u, even, odd, j)
            # The numbers of plane j lie in one group; a group may hold the planes after it too.
            if (32 * (j + 1)) % SPAN == 0:
                if GROUP == 0:
                    acc += part
                    up += part_up
                else:
                    group = rows_there[:, None] * G + tl.minimum((block * 128 + 32 * j) // GROUP, G - 1)[None, :]
                    if ZERO:
                        part -= tl.load(zero_ptr + group).to(tl.float32) * total[None, :]
                    acc += part * tl.load(scale_ptr + group).to(tl.float32)
                    if GATE != 0:
                        group += N.to(tl.int64) * G
                        if ZERO:
                            part_up -= tl.load(zero_ptr + group).to(tl.float32) * total[None, :]
                        up += part_up * tl.load(scale_ptr + group).to(tl.float32)
                part = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
                part_up = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
                total = tl.zeros((BLOCK_Q,), tl.float32)
        w = w_next
        if GATE != 0:
            u = u_next
    y = tl.sum(acc, 1)
    z = tl.sum(up, 1) if GATE != 0 else 0.0
    if GROUP == 0:
        y *= tl.load(scale_ptr + rows_there).to(tl.float32)
        if GATE != 0:
            z *= tl.load(scale_ptr + N + rows_there).to(tl.float32)
    finish(
        y, z, tl.sum(squares, 0) if NORM else 0.0, rows, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
        NORM, BIAS, RESIDUAL, GATE,
    )


@triton.jit
def dequantize_kernel(
    w_ptr, scale_ptr, zero_ptr, out_ptr, K, ROW_BYTES, G, GROUP,
    BITS: tl.constexpr, ZERO: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A row's BLOCK_K weights out of their numbers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = k < K
    if BITS == 8:
        number = tl.load(w_ptr + row * ROW_BYTES + k, mask=mask, other=0.0).to(tl.float32)
    else:
        held: tl.constexpr = 512 // BITS
        bit = (k % held) // 32 * BITS  # of the number in its 16-bit word
        byte = tl.load(w_ptr + row * ROW_BYTES + k // held * 64 + k % 32 * 2 + bit // 8, mask=mask, other=0)
        code = (byte.to(tl.int32) >> (bit % 8)) & ((1 << BITS) - 1)
        number = (code - (1 << (BITS - 1))).to(tl.float32)
    group = row * G + k // GROUP
    if ZERO:
        number -= tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    number *= tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * K + k, number.to(out_ptr.dtype.element_ty), mask=mask)
