// Products with quantized weights in vectors, at the speed of memory: what processors share that have instructions for
// it. What differs (`Vector` and what is done with it, the formats) is declared by the file that includes this one.
//
// A weight's row is read in blocks of 64 bytes, which hold several runs of 32 numbers. A format says how a block
// becomes vectors of numbers, in which order it wants x for them, and how the sums of products, LANES in each of
// PARTS vectors, are scaled: a sum never holds products of two runs.
//
// x of 16 bits becomes integers of 16 bits, each run of 32 with a power of two as its scale: that is exact for every
// number that is at least 2**-7 (bf16; fp16: 2**-4) of the greatest in its run, and off by 2**-16 of that at most for
// others. Integers are multiplied and added in pairs, twice as fast as floats and four times as fast as bf16.
//
// A zero point costs nothing inside: sum((q - zero) * scale * x) is sum(q * scale * x) less zero * scale * sum(x) of
// each run, and the sums of x are the same for all rows.
#pragma once

#include "kernels.h"

#define HAS_FAST_CODE

namespace {

// How many bytes before they are used memory is asked for. Two steps, since few requests of the nearest cache can be
// under way at a time, and many of the next: that is a third faster than one step from memory to the nearest.
constexpr int NEAR = 768, FAR = 6144;
constexpr int ROWS = 4;  // of x, the most that a weight is unpacked for at once

// ---- The product. ----

// One row of the weight, `blocks` blocks and, unless null, the block `tail`, times M rows of x with their scales of
// runs, which are `stride` and `runs` numbers apart.
template <class F, int M>
void multiply_row(const uint8_t* row, int64_t blocks, const uint8_t* tail, const typename F::X* x, int64_t stride,
                  const float* scales, int64_t runs, float* out) {
    Vector sums[M][F::PARTS];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < F::PARTS; i++) sums[m][i] = Vector{};
    const auto add = [&](const uint8_t* block, int64_t b) __attribute__((always_inline)) {
        for (int i = 0; i < F::PARTS; i++) {
            const typename F::Numbers w = F::unpack(block, i);
            for (int m = 0; m < M; m++) {
                const Vector products = F::multiply(w, i, x + m * stride + b * F::RUNS * RUN);
                sums[m][i] = multiply_add(products, F::scale(i, scales + m * runs + b * F::RUNS), sums[m][i]);
            }
        }
    };
    for (int64_t b = 0; b < blocks; b++) {
        _mm_prefetch(reinterpret_cast<const char*>(row + 64 * b + NEAR), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(row + 64 * b + FAR), _MM_HINT_T1);
        add(row + 64 * b, b);
    }
    if (tail) add(tail, blocks);
    for (int m = 0; m < M; m++) {
        Vector sum = sums[m][0];
        for (int i = 1; i < F::PARTS; i++) sum += sums[m][i];
        out[m] = sum_of(sum);
    }
}

// Rows of x in runs, and which groups of the weight the runs belong to.
struct Runs {
    int64_t stride, count;  // numbers, and runs, in memory for each row; a multiple of 16 runs
    float *scales, *sums;
    int32_t *base, *beyond;  // of each run: the group of the first of its LANES, and how many groups it is beyond that
};

// x [M, K] as a format wants it: the runs, and their numbers.
template <class F>
Runs arrange(const void* x, Dtype type, int64_t M, const Weight& weight, typename F::X*& numbers) {
    const int64_t stride = round_up(weight.K, F::RUNS * RUN), count = round_up(stride / RUN, 16);
    float* const scales = scratch<0>(M * (2 * count + stride) + stride + 2 * count);
    float *const sums = scales + M * count, *const wide = sums + M * count;
    int32_t *const base = reinterpret_cast<int32_t*>(wide + stride), *const beyond = base + count;
    numbers = reinterpret_cast<typename F::X*>(beyond + count);
    std::fill(scales, wide + stride, 0.0f);
    for (int64_t m = 0; m < M; m++) {
        to_floats(x, type, m * weight.K, weight.K, wide);
        for (int64_t r = 0; r < stride / RUN; r++) {
            constexpr int PIECE = RUN / F::PIECES;
            typename F::X run[RUN], *const block = numbers + m * stride + r / F::RUNS * F::RUNS * RUN;
            const OfRun of_run = F::arrange(wide + r * RUN, run);
            for (int i = 0; i < F::PIECES; i++)
                std::memcpy(block + i * F::APART + r % F::RUNS * PIECE, run + i * PIECE, PIECE * sizeof *run);
            scales[m * count + r] = of_run.scale * F::UNIT;
            sums[m * count + r] = of_run.sum;
        }
    }
    const int64_t repeats = weight.groups == 1 ? count : weight.group_size / RUN;
    int64_t group = 0;
    for (int64_t r = 0, left = repeats; r < count; r++, left--) {
        if (!left) {
            left = repeats;
            group = std::min(group + 1, weight.groups - 1);
        }
        base[r] = r % LANES ? base[r - 1] : int32_t(group);
        beyond[r] = int32_t(group) - base[r];
    }
    return {stride, count, scales, sums, base, beyond};
}

// For M rows of x from row m on: the scales of their runs times those of the weight's row n, into `out`; and what its
// zero points, and what was added to its codes, make of the sums of x, into `offsets`.
template <Dtype SCALE>
void scale_runs(const Runs& x, int64_t m, int64_t M, const Weight& weight, int64_t n, int added, float* out,
                float* offsets) {
    const int64_t G = weight.groups;
    Vector offset[ROWS];
    for (int i = 0; i < ROWS; i++) offset[i] = Vector{};
    for (int64_t r = 0; r < x.count; r += LANES) {
        const int64_t first = x.base[r], at = n * G + first;
        const int64_t left = std::min<int64_t>(LANES, G - first);
        const Vector scale = pick(x.beyond + r, load_floats(weight.scale, SCALE, at, left));
        Vector shift = scale * float(added);
        if (weight.zero) {
            const Vector zero = pick(x.beyond + r, load_floats(weight.zero, weight.zero_type, at, left));
            shift = multiply_add(scale, zero, shift);
        }
        _mm_prefetch(static_cast<const char*>(weight.scale) + 2 * at + 2048, _MM_HINT_T0);
        for (int64_t i = 0; i < M; i++) {
            const int64_t of_x = (m + i) * x.count + r;
            store(out + i * x.count + r, scale * load(x.scales + of_x));
            offset[i] = multiply_add(shift, load(x.sums + of_x), offset[i]);
        }
    }
    for (int64_t i = 0; i < M; i++) offsets[i] = sum_of(offset[i]);
}

template <class F>
void linear_by_blocks(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                      int threads) {
    const int64_t N = weight.N, blocks = weight.row_bytes / 64, rest = weight.row_bytes % 64;
    typename F::X* numbers;
    const Runs runs = arrange<F>(x, type, M, weight, numbers);
    const int64_t stride = runs.stride;
    const auto scale = weight.scale_type == BF16   ? scale_runs<BF16>
                       : weight.scale_type == FP16 ? scale_runs<FP16>
                                                   : scale_runs<FP32>;
    in_parts(N, N * weight.row_bytes, threads, [&](int64_t first, int64_t last) {
        float* const scales = scratch<1>(ROWS * runs.count);
        uint8_t tail[64] = {};
        for (int64_t n = first; n < last; n++) {
            const uint8_t* const row = weight.row(n);
            if (rest) std::memcpy(tail, row + 64 * blocks, rest);
            for (int64_t m = 0, rows; m < M; m += rows) {
                rows = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
                float offsets[ROWS], products[ROWS];
                scale(runs, m, rows, weight, n, F::ADDED, scales, offsets);
                const auto multiply = rows == 4   ? multiply_row<F, 4>
                                      : rows == 2 ? multiply_row<F, 2>
                                                  : multiply_row<F, 1>;
                multiply(row, blocks, rest ? tail : nullptr, numbers + m * stride, stride, scales, runs.count,
                         products);
                for (int64_t i = 0; i < rows; i++)
                    put(products[i] - offsets[i] + (bias ? get(bias, type, n) : 0), type, out, (m + i) * N + n);
            }
        }
    });
}

// As `torchchat_linear`; false, with nothing done, for what there is no fast code for.
inline bool fast_linear(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                        int threads) {
    if (weight.groups > 1 && weight.group_size % RUN) return false;
    const bool shorts = type != FP32;
    const auto linear =
        weight.kind == FP8 ? linear_by_blocks<Fp8Floats>
        : weight.bits == 8 ? (shorts ? linear_by_blocks<Int8Shorts> : linear_by_blocks<Int8Floats>)
        : weight.bits == 4 ? (shorts ? linear_by_blocks<PackedShorts<4>> : linear_by_blocks<PackedFloats<4>>)
        : weight.bits == 2 ? (shorts ? linear_by_blocks<PackedShorts<2>> : linear_by_blocks<PackedFloats<2>>)
                           : (shorts ? linear_by_blocks<PackedShorts<1>> : linear_by_blocks<PackedFloats<1>>);
    linear(x, type, M, weight, bias, out, threads);
    return true;
}

// ---- Rows of the weight itself, in 16 bits. ----

// run(first, count, scale, zero) for each run of row n: `count` numbers from the number `first` on.
template <class Run>
void for_runs(const Weight& weight, int64_t n, const Run& run) {
    for (int64_t g = 0; g < weight.groups; g++) {
        const int64_t at = n * weight.groups + g, last = std::min((g + 1) * weight.group_size, weight.K);
        const float scale = get(weight.scale, weight.scale_type, at);
        const float zero = weight.zero ? get(weight.zero, weight.zero_type, at) : 0;
        for (int64_t k = g * weight.group_size; k < last; k += RUN)
            run(k, std::min<int64_t>(RUN, last - k), scale, zero);
    }
}

// Row n of the weight, in the processor's own way.
template <class F>
void dequantize_bytes(const Weight& weight, int64_t n, Dtype type, uint16_t* out);
template <int BITS>
void dequantize_codes(const Weight& weight, int64_t n, Dtype type, uint16_t* out);

// Row n of the weight in `type`; false, with nothing done, for what there is no fast code for.
inline bool fast_dequantize(const Weight& weight, int64_t n, Dtype type, void* out) {
    if (type == FP32 || (weight.groups > 1 && weight.group_size % RUN)) return false;
    const auto dequantize = weight.kind == FP8   ? dequantize_bytes<Fp8Floats>
                            : weight.bits == 8   ? dequantize_bytes<Int8Floats>
                            : weight.bits == 4   ? dequantize_codes<4>
                            : weight.bits == 2   ? dequantize_codes<2>
                                                 : dequantize_codes<1>;
    dequantize(weight, n, type, static_cast<uint16_t*>(out));
    return true;
}

}  // namespace
