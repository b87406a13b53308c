// Products with quantized weights on processors with AVX-512, at the speed of memory.
//
// A weight's row is read in blocks of 64 bytes. A format says how a block becomes runs of 32 numbers that lie side by
// side, and how a run is multiplied with 32 numbers of x into 16 sums, which are scaled and added to the row's.
//
// x of 16 bits becomes integers of 16 bits, each run of 32 with a power of two as its scale: that is exact for every
// number that is at least 2**-7 (bf16; fp16: 2**-4) of the greatest in its run, and off by 2**-16 of that at most for
// others. Integers are multiplied and added in pairs, twice as fast as floats and four times as fast as bf16.
//
// A zero point costs nothing inside: sum((q - zero) * scale * x) is sum(q * scale * x) less zero * scale * sum(x) of
// each run, and the sums of x are the same for all rows.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define HAS_FAST_LINEAR

namespace {

constexpr int RUN = 32;
// How many bytes before they are used memory is asked for. Two steps, since few requests of the nearest cache can be
// under way at a time, and many of the next: that is a third faster than one step from memory to the nearest.
constexpr int NEAR = 768, FAR = 6144;
constexpr int ROWS = 4;      // of x, the most that a weight is unpacked for at once

// What stands for a run of x besides its numbers. Each format says besides: ADDED, what its codes are more than the
// numbers; unit(j), what one is worth in run j of a block.
struct OfRun {
    float scale, sum;
};

// ---- x as integers. ----

struct Shorts {
    using X = int16_t;

    // The scale is 2**(e - 14), the greatest number of the run being at least 2**e and less than 2**(e + 1).
    static OfRun arrange(const float* x, X* out) {
        uint32_t greatest = 0;
        for (int k = 0; k < RUN; k++) greatest = std::max(greatest, as_bits(x[k]) & 0x7fffffff);
        const uint32_t exponent = greatest >> 23;
        const bool ordinary = exponent > 14 && exponent < 255;
        const float inverse = ordinary ? as_float((268 - exponent) << 23) : 0;
        int32_t sum = 0;
        for (int k = 0; k < RUN; k++) sum += out[k] = int16_t(__builtin_rintf(x[k] * inverse));
        const float scale = ordinary ? as_float((exponent - 14) << 23) : exponent < 255 ? 0 : __builtin_nanf("");
        return {scale, float(sum) * scale};
    }
    static __m512 multiply(__m512i w, const X* x) {
        return _mm512_cvtepi32_ps(_mm512_madd_epi16(w, _mm512_loadu_si512(x)));
    }
};

struct Int8Shorts : Shorts {
    using Numbers = __m512i;
    static constexpr int RUNS = 2, ADDED = 0;
    static constexpr float unit(int) { return 1; }

    static void unpack(const uint8_t* block, Numbers* out) {
        for (int j = 0; j < RUNS; j++)
            out[j] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + j));
    }
};

// The codes stay where they are in their words, times 2**(BITS * j); only the uppermost, where a sign would be, move.
template <int BITS>
struct PackedShorts : Shorts {
    using Numbers = __m512i;
    static constexpr int RUNS = 16 / BITS, ADDED = 1 << (BITS - 1);
    static constexpr float unit(int j) { return j == RUNS - 1 ? 1 : 1.0f / float(1 << (BITS * j)); }

    static void unpack(const uint8_t* block, Numbers* out) {
        const __m512i words = _mm512_loadu_si512(block);
        for (int j = 0; j < RUNS - 1; j++)
            out[j] = _mm512_and_si512(words, _mm512_set1_epi16(short(((1 << BITS) - 1) << (BITS * j))));
        out[RUNS - 1] = _mm512_srli_epi16(words, 16 - BITS);
    }
};

// ---- x as floats. ----

struct Floats {
    using X = float;
    struct Numbers { __m512 first, second; };

    static OfRun arrange(const float* x, X* out) {
        std::memcpy(out, x, RUN * sizeof(X));
        return {1, sum(x)};
    }
    static float sum(const float* x) {
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)));
    }
    static __m512 multiply(const Numbers& w, const X* x) {
        return _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + 16), _mm512_mul_ps(w.first, _mm512_loadu_ps(x)));
    }
};

struct Int8Floats : Floats {
    static constexpr int RUNS = 2, ADDED = 0;
    static constexpr float unit(int) { return 1; }

    static __m512 widen(const uint8_t* bytes) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    }
    static void unpack(const uint8_t* block, Numbers* out) {
        for (int j = 0; j < RUNS; j++) out[j] = {widen(block + RUN * j), widen(block + RUN * j + 16)};
    }
};

// Lanes of 32 bits hold two words: the even and the odd numbers of each run.
template <int BITS>
struct PackedFloats : Floats {
    static constexpr int RUNS = 16 / BITS, ADDED = 0;
    static constexpr float unit(int) { return 1; }

    static __m512 look_up(__m512i lanes) {  // the instruction reads their lowest 4 bits only
        float table[16];
        for (int i = 0; i < 16; i++) table[i] = float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
        return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(table));
    }
    static void unpack(const uint8_t* block, Numbers* out) {
        const __m512i lanes = _mm512_loadu_si512(block);
        for (int j = 0; j < RUNS; j++)
            out[j] = {look_up(_mm512_srli_epi32(lanes, BITS * j)), look_up(_mm512_srli_epi32(lanes, 16 + BITS * j))};
    }
    static OfRun arrange(const float* x, X* out) {
        for (int k = 0; k < RUN; k++) out[k % 2 * 16 + k / 2] = x[k];
        return {1, sum(x)};
    }
};

// The bits of e4m3 are those of a half with fewer bits, whose exponent has another bias: it is 2**-8 of the number.
struct Fp8Floats : Floats {
    static constexpr int RUNS = 2, ADDED = 0;
    static constexpr float unit(int) { return 256; }

    static void unpack(const uint8_t* block, Numbers* out) {
        for (int j = 0; j < RUNS; j++) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + j);
            const __m512i moved = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);  // with the sign in two bits
            const __m512i halves = _mm512_and_si512(moved, _mm512_set1_epi16(short(0xbfff)));
            out[j] = {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                      _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
        }
    }
};

// ---- The product. ----

// One row of the weight, `blocks` blocks and, unless null, the block `tail`, times M rows of x with their scales of
// runs, which are `stride` and `runs` numbers apart.
template <class F, int M>
void multiply_row(const uint8_t* row, int64_t blocks, const uint8_t* tail, const typename F::X* x, int64_t stride,
                  const float* scales, int64_t runs, float* out) {
    constexpr int SUMS = std::min(F::RUNS, 4);
    __m512 sums[M][SUMS];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < SUMS; i++) sums[m][i] = _mm512_setzero_ps();
    const auto add = [&](const uint8_t* block, int64_t b) __attribute__((always_inline)) {
        typename F::Numbers w[F::RUNS];
        F::unpack(block, w);
        for (int j = 0; j < F::RUNS; j++)
            for (int m = 0; m < M; m++) {
                const __m512 products = F::multiply(w[j], x + m * stride + (b * F::RUNS + j) * RUN);
                const __m512 scale = _mm512_set1_ps(scales[m * runs + b * F::RUNS + j]);
                sums[m][j % SUMS] = _mm512_fmadd_ps(products, scale, sums[m][j % SUMS]);
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
        for (int i = 1; i < SUMS; i++) sum = _mm512_add_ps(sum, sums[m][i]);
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
            const OfRun of_run = F::arrange(wide + r * RUN, numbers + m * stride + r * RUN);
            scales[m * count + r] = of_run.scale * F::unit(int(r % F::RUNS));
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
    constexpr int64_t BLOCK = F::RUNS * RUN;
    const int64_t N = weight.N, rest = weight.bits == 8 ? weight.K % BLOCK : 0;
    typename F::X* numbers;
    const Runs runs = arrange<F>(x, type, M, weight, numbers);
    const int64_t stride = runs.stride, blocks = stride / BLOCK - (rest ? 1 : 0);
    const auto scale = weight.scale_type == BF16   ? scale_runs<BF16>
                       : weight.scale_type == FP16 ? scale_runs<FP16>
                                                   : scale_runs<FP32>;
    in_parts(N, threads, [&](int64_t first, int64_t last) {
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

}  // namespace
