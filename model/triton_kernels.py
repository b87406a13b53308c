"""The kernels themselves, in Triton's own language; `model.kernels` says what they compute and launches them.

Untyped, because Triton is: a kernel's arguments are pointers, numbers and compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def finish(
    y, z, squares, rows, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):
    """What comes after a matrix-vector product: y (and with a gate z, the rows' other halves) of `rows`, stored."""
    mask_n = rows < N
    scale = 1.0
    if NORM:  # the norm's 1 / rms is one factor for the whole row: it is applied once, at the end
        scale = tl.rsqrt(squares / K + eps)
        y = y * scale
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    if GATE != 0:
        z = z * scale
        if BIAS:
            z += tl.load(bias_ptr + N + rows, mask=mask_n, other=0.0).to(tl.float32)
        if GATE == 1:
            y = y * tl.sigmoid(y) * z
        elif GATE == 2:
            inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
            y = 0.5 * y * (2.0 * tl.sigmoid(2.0 * inner)) * z
        else:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476)) * z
    y = y * multiplier
    if RESIDUAL:
        y += tl.load(residual_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def gemv_kernel(
    x_ptr, w_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, N, K, eps, multiplier,
    NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, OVERLAP: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    w_ptrs = w_ptr + rows[:, None].to(tl.int64) * K + cols[None, :]
    gate_stride = N.to(tl.int64) * K
    mask = mask_n[:, None] if EVEN_K else mask_n[:, None] & (cols < K)[None, :]
    # The first weights are on their way before the kernel that makes x has ended.
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
        x = tl.load(x_ptr + at, mask=None if EVEN_K else at < K, other=None if EVEN_K else 0.0).to(tl.float32)
        if NORM:
            squares += x * x
            g = tl.load(norm_ptr + at, mask=None if EVEN_K else at < K, other=None if EVEN_K else 0.0)
            g = g.to(tl.float32)
            x = x * (g + 1.0) if PLUS_ONE else x * g
        ahead = at + BLOCK_K
        mask_next = mask_n[:, None] & (ahead < K)[None, :]
        w_ptrs += BLOCK_K
        w_next = tl.load(w_ptrs, mask=mask_next, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
        if GATE != 0:
            u_next = tl.load(w_ptrs + gate_stride, mask=mask_next, other=0.0, eviction_policy="evict_first")
            up += u.to(tl.float32) * x[None, :]
            u = u_next
        w = w_next
    z = tl.sum(up, 1) if GATE != 0 else 0.0
    finish(
        tl.sum(acc, 1), z, tl.sum(squares, 0) if NORM else 0.0, rows, bias_ptr, residual_ptr, out_ptr, N, K, eps,
        multiplier, NORM, BIAS, RESIDUAL, GATE,
    )


@triton.jit
def rotate_and_store_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, keys_ptr, values_ptr, start_ptr, slots_ptr, q_stride, k_stride,
    v_stride, S, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    mask = h < H
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.load(slots_ptr + row) * K * S + tl.load(start_ptr + row)  # in the cache, of head 0
    if head < N:
        source, target = q_ptr + row * q_stride + head * H, out_ptr + (row * N + head) * H
    elif head < N + K:
        source = k_ptr + row * k_stride + (head - N) * H
        target = keys_ptr + (place + (head - N) * S) * H
    else:
        source = v_ptr + row * v_stride + (head - N - K) * H
        target = values_ptr + (place + (head - N - K) * S) * H
    x = tl.load(source + h, mask=mask, other=0.0).to(tl.float32)
    if HALF != 0 and head < N + K:
        turned = mask & (h < 2 * HALF)
        other = tl.load(source + tl.where(h < HALF, h + HALF, h - HALF), mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * HALF + h % HALF, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + row * HALF + h % HALF, mask=turned, other=0.0)
        x = x * cos + tl.where(h < HALF, -other, other) * sin
    tl.store(target + h, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend_part_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, slots_ptr, part_ptr, stats_ptr, scale, window, softcap, S,
    K_HEADS: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    end = tl.load(start_ptr + row) + 1
    first = tl.maximum(end - window, 0) if WINDOW else end * 0
    # The filled context is shared out evenly: the work follows it, and not the size of the cache.
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_S) * BLOCK_S
    low = first + split * share
    high = tl.minimum(low + share, end)
    g, h, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S)
    q_rows = (row * K_HEADS + head) * G + g
    mask_gh = (g < G)[:, None] & (h < H)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] * H + h[None, :], mask=mask_gh, other=0.0)
    base = (tl.load(slots_ptr + row) * K_HEADS + head) * S * H
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
    for at in range(low, high, BLOCK_S):
        pos = at + s
        mask = (pos < high)[:, None] & (h < H)[None, :]
        k = tl.load(k_ptr + base + pos[:, None] * H + h[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + base + pos[:, None] * H + h[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
        scores = tl.where((pos < high)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        p = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    part = q_rows * SPLITS + split
    tl.store(part_ptr + part[:, None] * H + h[None, :], acc, mask=mask_gh)
    tl.store(stats_ptr + part * 2, top, mask=g < G)
    tl.store(stats_ptr + part * 2 + 1, total, mask=g < G)

@triton.jit
def attend_join_kernel(
    part_ptr, stats_ptr, out_ptr, H: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    n, h = tl.arange(0, SPLITS), tl.arange(0, BLOCK_H)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = row * SPLITS + n
    top = tl.load(stats_ptr + at * 2)
    total = tl.load(stats_ptr + at * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))
    parts = tl.load(part_ptr + at[:, None] * H + h[None, :], mask=(h < H)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + row * H + h, out.to(out_ptr.dtype.element_ty), mask=h < H)
