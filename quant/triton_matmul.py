"""Products of several rows with quantized weights, in Triton's own language; `quant.matmul` says what they compute and
launches them. Each weight is made on its way to the tensor cores and never stands in memory.

Untyped, because Triton is: a kernel's arguments are pointers, numbers and compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(number, scale_ptr, zero_ptr, group, GROUP: tl.constexpr, ZERO: tl.constexpr, dtype: tl.constexpr):
    """Numbers as weights, rounded once as `dequantize` rounds them; without the scale where a row has but one."""
    if GROUP == 0:
        return number.to(dtype)
    if ZERO:
        number -= tl.load(zero_ptr + group).to(tl.float32)
    return (number * tl.load(scale_ptr + group).to(tl.float32)).to(dtype)


@triton.jit
def _store(
    acc, rows_m, rows_n, scale_ptr, bias_ptr, out_ptr, M, N, GROUP: tl.constexpr, BIAS: tl.constexpr,
):
    there = tl.minimum(rows_n, N - 1)
    if GROUP == 0:
        acc *= tl.load(scale_ptr + there).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + there).to(tl.float32)[:, None]
    at = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(rows_m < M)[None, :] & (rows_n < N)[:, None])


@triton.jit
def matmul_8bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, G, STEPS,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """x [M, K] times rows of numbers [N, K], G scales a row. STEPS: K in units of BLOCK_K, rounded up."""
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there_n = tl.minimum(rows_n, N - 1).to(tl.int64)  # a row beyond the last reads the last, and is not stored
    there_m = tl.minimum(rows_m, M - 1)
    cols = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + there_n[:, None] * K + cols[None, :]
    x_ptrs = x_ptr + there_m[:, None] * K + cols[None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        at = step * BLOCK_K + cols
        if EVEN_K:
            w = tl.load(w_ptrs, eviction_policy="evict_first")
            x = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(at < K)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs, mask=(at < K)[None, :], other=0.0)
        group = there_n[:, None] * G + (tl.minimum(at // GROUP, G - 1)[None, :] if GROUP != 0 else 0)
        weight = _weights(w.to(tl.float32), scale_ptr, zero_ptr, group, GROUP, ZERO, dtype)
        acc = tl.dot(weight, tl.trans(x), acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    _store(acc, rows_m, rows_n, scale_ptr, bias_ptr, out_ptr, M, N, GROUP, BIAS)


@triton.jit
def matmul_4bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, WORDS, G, STEPS,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The same with eight numbers a 32-bit word, WORDS words a row, four words to 32 numbers of one group."""
    BLOCK_W: tl.constexpr = BLOCK_K // 8
    RUNS: tl.constexpr = BLOCK_K // 32
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there_n = tl.minimum(rows_n, N - 1).to(tl.int64)
    there_m = tl.minimum(rows_m, M - 1)
    word, cols, run = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_K), tl.arange(0, RUNS)
    w_ptrs = w_ptr + there_n[:, None] * WORDS + word[None, :]
    x_ptrs = x_ptr + there_m[:, None] * K + cols[None, :]
    shifts = (4 * tl.arange(0, 8))[None, None, :, None]
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        if EVEN_K:
            words = tl.load(w_ptrs, eviction_policy="evict_first")
            x = tl.load(x_ptrs)
        else:
            mask = (step * BLOCK_W + word < WORDS)[None, :]
            words = tl.load(w_ptrs, mask=mask, other=0, eviction_policy="evict_first")
            x = tl.load(x_ptrs, mask=(step * BLOCK_K + cols < K)[None, :], other=0.0)
        # Word j of a run has its numbers j, j + 4, ...: by the place in the word, then by the word, they are in order.
        codes = (tl.broadcast_to(tl.reshape(words, (BLOCK_N, RUNS, 1, 4)), (BLOCK_N, RUNS, 8, 4)) >> shifts) & 15
        group = there_n[:, None] * G
        if GROUP != 0:
            group += tl.minimum((step * BLOCK_K + run * 32) // GROUP, G - 1)[None, :]
        group = tl.reshape(group, (BLOCK_N, RUNS if GROUP != 0 else 1, 1, 1))
        weight = _weights((codes - 8).to(tl.float32), scale_ptr, zero_ptr, group, GROUP, ZERO, dtype)
        acc = tl.dot(tl.reshape(weight, (BLOCK_N, BLOCK_K)), tl.trans(x), acc)
        w_ptrs += BLOCK_W
        x_ptrs += BLOCK_K
    _store(acc, rows_m, rows_n, scale_ptr, bias_ptr, out_ptr, M, N, GROUP, BIAS)
