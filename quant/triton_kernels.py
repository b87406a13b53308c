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
def _float(numbers):
    """int8 or float8 as float32. A byte in the low bits of the float 2**23 adds what it is worth there: to put it in
    and to take the float away is four times as fast as the conversion of an integer, and exact.
    """
    if numbers.dtype != tl.int8:
        return numbers.to(tl.float32)
    bits = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 bytes;
        xor.b32 bytes, $4, 0x80808080;
        prmt.b32 $0, bytes, 0x4B000000, 0x7440;
        prmt.b32 $1, bytes, 0x4B000000, 0x7441;
        prmt.b32 $2, bytes, 0x4B000000, 0x7442;
        prmt.b32 $3, bytes, 0x4B000000, 0x7443;
        }
        """,
        "=r,=r,=r,=r,r", [numbers], tl.int32, True, 4,
    )  # fmt: skip
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)


@triton.jit
def _scaled(numbers, scale_ptr, zero_ptr, group, GROUP: tl.constexpr, ZERO: tl.constexpr):
    """Numbers as the weights that they stand for, but for a scale of their whole row (GROUP 0)."""
    weights = _float(numbers)
    if ZERO:
        weights -= tl.load(zero_ptr + group).to(tl.float32)
    if GROUP != 0:
        weights *= tl.load(scale_ptr + group).to(tl.float32)
    return weights


@triton.jit
def _finish_rows(
    acc, up, squares, rows, rows_there, scale_ptr, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
    GROUP: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):
    """The threads' sums of each row together, with the scale of the row where it has one, and what comes after."""
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
def gemv_8bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, N, K, G, eps, multiplier,
    GROUP: tl.constexpr, ZERO: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One number a byte, an integer or a float8. GROUP 0: a scale a row, applied at the end.

    STEPS: K in units of BLOCK_K, rounded up. The loop is unrolled: numbers of 8 bits that live from one turn to the
    next would be taken apart and put together again.
    """
    LANES: tl.constexpr = BLOCK_K // 16  # a thread takes 16 numbers at a time, and keeps one sum of them
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    rows_there = tl.minimum(rows, N - 1).to(tl.int64)  # a row beyond the last reads the last, and is not stored
    w_ptrs = w_ptr + rows_there[:, None] * K + cols[None, :]
    gate_stride = N.to(tl.int64) * K
    # The first numbers are on their way before the kernel that makes x has ended.
    w = tl.load(w_ptrs, mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    if GATE != 0:
        u = tl.load(w_ptrs + gate_stride, mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, LANES), tl.float32)
    up = tl.zeros((BLOCK_N, LANES), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK_K + cols
        plain, x = _inputs(x_ptr, norm_ptr, at, at < K, NORM, PLUS_ONE)
        if NORM:
            squares += tl.sum(tl.reshape(plain * plain, (LANES, 16)), 1)
        if step + 1 < STEPS:
            w_ptrs += BLOCK_K
            mask = (at + BLOCK_K < K)[None, :]
            w_next = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
            if GATE != 0:
                u_next = tl.load(w_ptrs + gate_stride, mask=mask, other=0.0, eviction_policy="evict_first")
        group = rows_there[:, None] * G + (tl.minimum(at // GROUP, G - 1)[None, :] if GROUP != 0 else 0)
        product = _scaled(w, scale_ptr, zero_ptr, group, GROUP, ZERO) * x[None, :]
        acc += tl.sum(tl.reshape(product, (BLOCK_N, LANES, 16)), 2)
        if GATE != 0:
            product = _scaled(u, scale_ptr, zero_ptr, group + N.to(tl.int64) * G, GROUP, ZERO) * x[None, :]
            up += tl.sum(tl.reshape(product, (BLOCK_N, LANES, 16)), 2)
        if step + 1 < STEPS:
            w = w_next
            if GATE != 0:
                u = u_next
    _finish_rows(
        acc, up, squares, rows, rows_there, scale_ptr, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
        GROUP, NORM, BIAS, RESIDUAL, GATE,
    )


@triton.jit
def _codes(words, half: tl.constexpr, j: tl.constexpr):
    """The codes at bits 4j of a half of each 32-bit word, less 8, times 16**j, as float32.

    A code in the low bits of the float 2**23 adds what it is worth there: to take the float away again is exact. One
    instruction, which the compiler does not find by itself, and a subtraction are much cheaper than a conversion.
    """
    bits = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;",  # ($1 & $2) | $3
        "=r,r,r,r", [words >> 16 if half == 1 else words, 0xF << (4 * j), 0x4B000000], tl.int32, True, 1,
    )  # fmt: skip
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * 16**j)


@triton.jit
def _pair(low, high):
    """Two floats as halves of a word."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)


@triton.jit
def _dot(words, x04, x15, x26, x37):
    """The sum of a word's eight numbers times inputs, which come in pairs of halves: number j of a word with number
    j + 4, those of odd j divided by 16. In float16, two at a time, with 1024 in the place that 2**23 has in `_codes`.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 code, high, sum, eight, eights;
        .reg .f16 low_half, high_half;
        .reg .f32 low_sum, high_sum;
        mov.b32 eight, 0xE408E408;
        mov.b32 eights, 0xE480E480;
        lop3.b32 code, $1, 0x000F000F, 0x64006400, 0xEA;
        add.f16x2 code, code, eight;
        mul.f16x2 sum, code, $2;
        lop3.b32 code, $1, 0x00F000F0, 0x64006400, 0xEA;
        add.f16x2 code, code, eights;
        fma.rn.f16x2 sum, code, $3, sum;
        shr.u32 high, $1, 8;
        lop3.b32 code, high, 0x000F000F, 0x64006400, 0xEA;
        add.f16x2 code, code, eight;
        fma.rn.f16x2 sum, code, $4, sum;
        lop3.b32 code, high, 0x00F000F0, 0x64006400, 0xEA;
        add.f16x2 code, code, eights;
        fma.rn.f16x2 sum, code, $5, sum;
        mov.b32 {low_half, high_half}, sum;
        cvt.f32.f16 low_sum, low_half;
        cvt.f32.f16 high_sum, high_half;
        add.f32 $0, low_sum, high_sum;
        }
        """,
        "=f,r,r,r,r,r", [words, x04, x15, x26, x37], tl.float32, True, 1,
    )  # fmt: skip


@triton.jit
def gemv_4bit_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, N, K, WORDS, G, eps, multiplier,
    GROUP: tl.constexpr, ZERO: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STEPS: tl.constexpr,
    HALVES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Eight numbers a 32-bit word, WORDS words a row, four words to 32 numbers of one group. GROUP 0: a scale a row.

    STEPS: WORDS in units of BLOCK_W, rounded up.
    """
    BLOCK_Q: tl.constexpr = BLOCK_W // 4
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_there = tl.minimum(rows, N - 1).to(tl.int64)  # a row beyond the last reads the last, and is not stored
    at = tl.arange(0, BLOCK_W)
    w_ptrs = w_ptr + rows_there[:, None] * WORDS + at[None, :]
    gate_stride = N.to(tl.int64) * WORDS
    w = tl.load(w_ptrs, mask=(at < WORDS)[None, :], other=0, eviction_policy="evict_first")
    if GATE != 0:
        u = tl.load(w_ptrs + gate_stride, mask=(at < WORDS)[None, :], other=0, eviction_policy="evict_first")
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    squares = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, BLOCK_W if STEPS == 1 else WORDS, BLOCK_W):
        x_at = (first + at) // 4 * 32 + at % 4
        if STEPS > 1:
            w_ptrs += BLOCK_W
            mask = (first + BLOCK_W + at < WORDS)[None, :]
            w_next = tl.load(w_ptrs, mask=mask, other=0, eviction_policy="evict_first")
            if GATE != 0:
                u_next = tl.load(w_ptrs + gate_stride, mask=mask, other=0, eviction_policy="evict_first")
        total = tl.zeros((BLOCK_W,), tl.float32)
        if HALVES:
            plain0, x0 = _inputs(x_ptr, norm_ptr, x_at, x_at < K, NORM, PLUS_ONE)
            plain1, x1 = _inputs(x_ptr, norm_ptr, x_at + 4, x_at + 4 < K, NORM, PLUS_ONE)
            plain2, x2 = _inputs(x_ptr, norm_ptr, x_at + 8, x_at + 8 < K, NORM, PLUS_ONE)
            plain3, x3 = _inputs(x_ptr, norm_ptr, x_at + 12, x_at + 12 < K, NORM, PLUS_ONE)
            plain4, x4 = _inputs(x_ptr, norm_ptr, x_at + 16, x_at + 16 < K, NORM, PLUS_ONE)
            plain5, x5 = _inputs(x_ptr, norm_ptr, x_at + 20, x_at + 20 < K, NORM, PLUS_ONE)
            plain6, x6 = _inputs(x_ptr, norm_ptr, x_at + 24, x_at + 24 < K, NORM, PLUS_ONE)
            plain7, x7 = _inputs(x_ptr, norm_ptr, x_at + 28, x_at + 28 < K, NORM, PLUS_ONE)
            if NORM:
                squares += plain0 * plain0 + plain1 * plain1 + plain2 * plain2 + plain3 * plain3
                squares += plain4 * plain4 + plain5 * plain5 + plain6 * plain6 + plain7 * plain7
            if ZERO:
                total += x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
            # Float16 reaches as far as is needed when the greatest of the 32 inputs of a run is 1.
            top = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
            top = tl.maximum(top, tl.maximum(tl.maximum(tl.abs(x4), tl.abs(x5)), tl.maximum(tl.abs(x6), tl.abs(x7))))
            top_Q = tl.max(tl.reshape(top, (BLOCK_Q, 4)), 1)
            inverse_Q = tl.where(top_Q > 0, 1.0 / top_Q, 0.0)
            inverse = tl.reshape(tl.broadcast_to(inverse_Q[:, None], (BLOCK_Q, 4)), (BLOCK_W,))
            sixteenth = inverse / 16
            x04 = _pair(x0 * inverse, x4 * inverse)[None, :]
            x15 = _pair(x1 * sixteenth, x5 * sixteenth)[None, :]
            x26 = _pair(x2 * inverse, x6 * inverse)[None, :]
            x37 = _pair(x3 * sixteenth, x7 * sixteenth)[None, :]
            part = _dot(w, x04, x15, x26, x37)
            if GATE != 0:
                part_up = _dot(u, x04, x15, x26, x37)
        else:
            part = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
            part_up = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
            for j in tl.static_range(8):
                k = x_at + 4 * j
                plain, x = _inputs(x_ptr, norm_ptr, k, k < K, NORM, PLUS_ONE)
                if NORM:
                    squares += plain * plain
                if ZERO:
                    total += x
                x = x * (1.0 / 16 ** (j % 4))
                part += _codes(w, j // 4, j % 4) * x[None, :]
                if GATE != 0:
                    part_up += _codes(u, j // 4, j % 4) * x[None, :]
        quads = first // 4 + tl.arange(0, BLOCK_Q)
        sums = tl.sum(tl.reshape(part, (BLOCK_N, BLOCK_Q, 4)), 2)
        if HALVES:
            sums *= top_Q[None, :]
        if GATE != 0:
            sums_up = tl.sum(tl.reshape(part_up, (BLOCK_N, BLOCK_Q, 4)), 2)
            if HALVES:
                sums_up *= top_Q[None, :]
        if GROUP == 0:
            acc += sums
            if GATE != 0:
                up += sums_up
        else:
            group = rows_there[:, None] * G + tl.minimum(quads // (GROUP // 32), G - 1)[None, :]
            if ZERO:
                total_Q = tl.sum(tl.reshape(total, (BLOCK_Q, 4)), 1)[None, :]
                sums -= tl.load(zero_ptr + group).to(tl.float32) * total_Q
            acc += sums * tl.load(scale_ptr + group).to(tl.float32)
            if GATE != 0:
                group += N.to(tl.int64) * G
                if ZERO:
                    sums_up -= tl.load(zero_ptr + group).to(tl.float32) * total_Q
                up += sums_up * tl.load(scale_ptr + group).to(tl.float32)
        if STEPS > 1:
            w = w_next
            if GATE != 0:
                u = u_next
    _finish_rows(
        acc, up, squares, rows, rows_there, scale_ptr, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
        GROUP, NORM, BIAS, RESIDUAL, GATE,
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
        in_run = k % 32
        bit = in_run // BITS * BITS  # of the number in its word
        byte = tl.load(w_ptr + row * ROW_BYTES + k // 32 * 4 * BITS + in_run % BITS * 4 + bit // 8, mask=mask, other=0)
        code = (byte.to(tl.int32) >> (bit % 8)) & ((1 << BITS) - 1)
        number = (code - (1 << (BITS - 1))).to(tl.float32)
    group = row * G + k // GROUP
    if ZERO:
        number -= tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    number *= tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * K + k, number.to(out_ptr.dtype.element_ty), mask=mask)
