// Products with quantized weights on processors with AVX-512, at the speed of memory.
//
// A zero point costs nothing inside: sum((q - zero) * scale * x) is sum(q * scale * x) less zero * scale * sum(x) of
// each run, and the sums of x are the same for all rows.
#pragma once

#include "avx512_formats.h"

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
    __m512 sums[M][F::PARTS];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < F::PARTS; i++) sums[m][i] = _mm512_setzero_ps();
    const auto add = [&](const uint8_t* block, int64_t b) __attribute__((always_inline)) {
        const typename F::Numbers w = F::unpack(block);
        for (int m = 0; m < M; m++)
            for (int i = 0; i < F::PARTS; i++) {
                const __m512 products = F::multiply(w, i, x + m * stride + b * F::RUNS * RUN);
                sums[m][i] = _mm512_fmadd_ps(products, F::scale(i, scales + m * runs + b * F::RUNS), sums[m][i]);
            }
    };
    for (int64_t b = 0; b < blocks; b++) {
        _mm_prefetch(reinterpret_cast<const char*>(row + 64 * b + NEAR), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(row + 64 * b + FAR), _MM_HINT_T1);
        add(row + 64 * b, b);
    }
    if (tail) add(tail, blocks);
    for (int m = 0; m < M; m++) {
        __m512 sum = sums[m][0];
        for (int i = 1; i < F::PARTS; i++) sum = _mm512_add_ps(sum, sums[m][i]);
        out[m] = _mm512_reduce_add_ps(sum);
    }
}

// Rows of x in runs, and which groups of the weight the runs belong to.
struct Runs {
    int64_t stride, count;  // numbers, and runs, in memory for each row; a multiple of 16 runs
    float *scales, *sums;
    int32_t *base, *beyond;  // of each run: the group of the first of its 16, and how many groups it is beyond that
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
        base[r] = r % 16 ? base[r - 1] : int32_t(group);
        beyond[r] = int32_t(group) - base[r];
    }
    return {stride, count, scales, sums, base, beyond};
}

inline __m512 load_floats(const void* source, Dtype type, int64_t start, __mmask16 mask) {
    if (type == FP32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + start);
    if (type == INT8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const int8_t*>(source) + start);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(source) + start);
    return type == FP16 ? _mm512_cvtph_ps(halves)
                        : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// For M rows of x from row m on: the scales of their runs times those of the weight's row n, into `out`; and what its
// zero points, and what was added to its codes, make of the sums of x, into `offsets`.
template <Dtype SCALE>
void scale_runs(const Runs& x, int64_t m, int64_t M, const Weight& weight, int64_t n, int added, float* out,
                float* offsets) {
    const int64_t G = weight.groups;
    __m512 offset[ROWS];
    for (int i = 0; i < ROWS; i++) offset[i] = _mm512_setzero_ps();
    for (int64_t r = 0; r < x.count; r += 16) {
        const int64_t first = x.base[r], at = n * G + first;
        const __mmask16 mask = __mmask16((1u << std::min<int64_t>(16, G - first)) - 1);
        const __m512i beyond = _mm512_loadu_si512(x.beyond + r);
        const __m512 scale = _mm512_permutexvar_ps(beyond, load_floats(weight.scale, SCALE, at, mask));
        __m512 shift = _mm512_mul_ps(scale, _mm512_set1_ps(float(added)));
        if (weight.zero) {
            const __m512 zero = _mm512_permutexvar_ps(beyond, load_floats(weight.zero, weight.zero_type, at, mask));
            shift = _mm512_fmadd_ps(scale, zero, shift);
        }
        _mm_prefetch(static_cast<const char*>(weight.scale) + 2 * at + 2048, _MM_HINT_T0);
        for (int64_t i = 0; i < M; i++) {
            const int64_t of_x = (m + i) * x.count + r;
            _mm512_storeu_ps(out + i * x.count + r, _mm512_mul_ps(scale, _mm512_loadu_ps(x.scales + of_x)));
            offset[i] = _mm512_fmadd_ps(shift, _mm512_loadu_ps(x.sums + of_x), offset[i]);
        }
    }
    for (int64_t i = 0; i < M; i++) offsets[i] = _mm512_reduce_add_ps(offset[i]);
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

inline __m256i to_halves(__m512 values, Dtype type) {
    if (type == FP16) return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0));
#endif
}

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

inline void store_halves(__m512i halves, int64_t count, uint16_t* out) {
    if (count == RUN)
        _mm512_storeu_si512(out, halves);
    else
        _mm512_mask_storeu_epi16(out, (__mmask32(1) << count) - 1, halves);
}

template <class F>
void dequantize_bytes(const Weight& weight, int64_t n, Dtype type, uint16_t* out) {
    for_runs(weight, n, [&](int64_t k, int64_t count, float scale, float zero) __attribute__((always_inline)) {
        const uint8_t* run = weight.row(n) + k;
        uint8_t copy[RUN] = {};
        if (count < RUN) run = static_cast<const uint8_t*>(std::memcpy(copy, run, count));
        const typename F::Run w = F::widen(run);
        const auto weigh = [&](__m512 numbers) {
            numbers = _mm512_sub_ps(_mm512_mul_ps(numbers, _mm512_set1_ps(F::UNIT)), _mm512_set1_ps(zero));
            return to_halves(_mm512_mul_ps(numbers, _mm512_set1_ps(scale)), type);
        };
        store_halves(_mm512_inserti64x4(_mm512_castsi256_si512(weigh(w.first)), weigh(w.second), 1), count, out + k);
    });
}

// What each code of a run stands for is computed once, and then looked up.
template <int BITS>
void dequantize_codes(const Weight& weight, int64_t n, Dtype type, uint16_t* out) {
    alignas(64) float codes[16];
    for (int i = 0; i < 16; i++) codes[i] = float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
    const __m512 numbers = _mm512_load_ps(codes);
    alignas(64) int16_t halves[RUN], shifts[RUN];  // where the code of each number of a run is
    for (int k = 0; k < RUN; k++) {
        halves[k] = int16_t(k % BITS * 2 + k / 16);
        shifts[k] = int16_t(k % 16 / BITS * BITS);
    }
    const __m512i half_of_word = _mm512_load_si512(halves), shift = _mm512_load_si512(shifts);
    for_runs(weight, n, [&](int64_t k, int64_t count, float scale, float zero) __attribute__((always_inline)) {
        const __m512 values = _mm512_mul_ps(_mm512_sub_ps(numbers, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
        const __m512i table = _mm512_broadcast_i64x4(to_halves(values, type));
        int64_t run[2] = {};
        std::memcpy(run, weight.row(n) + k / RUN * 4 * BITS, 4 * BITS);
        const __m512i words = _mm512_castsi128_si512(_mm_set_epi64x(run[1], run[0]));
        const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(half_of_word, words), shift);
        store_halves(_mm512_permutexvar_epi16(shifted, table), count, out + k);  // it reads the lowest 5 bits only
    });
}

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
