// Products with quantized weights on processors with AVX-512, at the speed of memory.
//
// A weight's row is read in blocks of 64 bytes. A format says how a block becomes PRODUCTS vectors of WIDTH numbers
// each, and how one of them is multiplied with as many numbers of x and added to 16 sums. The products of CHAIN
// numbers, which share a scale, are chained; their sums are then scaled and added to the row's.
//
// A zero point costs nothing inside: sum((q - zero) * scale * x) is sum(q * scale * x) less zero * scale * sum(x) of
// each group, and the sums of x are the same for all rows.
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define HAS_FAST_LINEAR

namespace {

constexpr int AHEAD = 2048;  // bytes that memory is asked for before they are used

// ---- Formats: X is what x is stored as, in blocks that `arrange` writes. ----

// Integers of 8 bits times floats.
struct Int8 {
    using X = float;
    using Numbers = __m512;
    static constexpr int BLOCK = 64, WIDTH = 16, PRODUCTS = 4;

    static void unpack(const uint8_t* block, Numbers* out) {
        for (int j = 0; j < PRODUCTS; j++) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block) + j);
            out[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        }
    }
    static __m512 multiply(Numbers w, const X* x, __m512 sums) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sums); }
    static void arrange(const float* x, X* out) { std::memcpy(out, x, sizeof(X) * BLOCK); }
};

// Integers of 4, 2 or 1 bits times floats. A lane of 32 bits holds two words: the numbers 2i and 2i + 1 of each product.
template <int BITS>
struct Packed {
    using X = float;
    struct Numbers { __m512 even, odd; };
    static constexpr int BLOCK = 512 / BITS, WIDTH = 32, PRODUCTS = 16 / BITS;

    static __m512 look_up(__m512i lanes) {  // the instruction reads the lowest 4 bits only
        constexpr int MASK = (1 << BITS) - 1, MIDDLE = 1 << (BITS - 1);
        alignas(64) static constexpr auto table = [] {
            struct { float value[16]; } made{};
            for (int i = 0; i < 16; i++) made.value[i] = float((i & MASK) - MIDDLE);
            return made;
        }();
        return _mm512_permutexvar_ps(lanes, _mm512_load_ps(table.value));
    }
    static void unpack(const uint8_t* block, Numbers* out) {
        const __m512i lanes = _mm512_loadu_si512(block);
        for (int j = 0; j < PRODUCTS; j++)
            out[j] = {look_up(_mm512_srli_epi32(lanes, BITS * j)), look_up(_mm512_srli_epi32(lanes, 16 + BITS * j))};
    }
    static __m512 multiply(Numbers w, const X* x, __m512 sums) {
        sums = _mm512_fmadd_ps(w.even, _mm512_loadu_ps(x), sums);
        return _mm512_fmadd_ps(w.odd, _mm512_loadu_ps(x + 16), sums);
    }
    static void arrange(const float* x, X* out) {
        for (int k = 0; k < BLOCK; k++) out[k / 32 * 32 + k % 2 * 16 + k % 32 / 2] = x[k];
    }
};

#if defined(__AVX512BF16__)
inline __m512 multiply_bf16(__m512i w, const uint16_t* x, __m512 sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

// Integers of 4, 2 or 1 bits times bf16, which holds them exactly.
template <int BITS>
struct PackedBf16 {
    using X = uint16_t;
    using Numbers = __m512i;
    static constexpr int BLOCK = 512 / BITS, WIDTH = 32, PRODUCTS = 16 / BITS;

    static void unpack(const uint8_t* block, Numbers* out) {
        constexpr int MASK = (1 << BITS) - 1, MIDDLE = 1 << (BITS - 1);
        alignas(64) uint16_t table[32];
        for (int i = 0; i < 32; i++) table[i] = to_bf16(float((i & MASK) - MIDDLE));
        const __m512i words = _mm512_loadu_si512(block), values = _mm512_load_si512(table);
        for (int j = 0; j < PRODUCTS; j++)  // the instruction reads the lowest 5 bits only
            out[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, BITS * j), values);
    }
    static __m512 multiply(Numbers w, const X* x, __m512 sums) { return multiply_bf16(w, x, sums); }
    static void arrange(const float* x, X* out) {
        for (int k = 0; k < BLOCK; k++) out[k] = to_bf16(x[k]);
    }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// e4m3 times bf16, which holds it exactly: the upper and lower bytes come out of two tables.
struct Fp8Bf16 {
    using X = uint16_t;
    using Numbers = __m512i;
    static constexpr int BLOCK = 64, WIDTH = 32, PRODUCTS = 2;

    static void unpack(const uint8_t* block, Numbers* out) {
        alignas(64) static const auto tables = [] {
            struct { uint8_t low[128], high[128]; } made;
            for (int i = 0; i < 128; i++) {
                const uint16_t value = to_bf16(from_fp8(uint8_t(i)));
                made.low[i] = uint8_t(value);
                made.high[i] = uint8_t(value >> 8);
            }
            return made;
        }();
        const auto look_up = [](const uint8_t* table, __m512i bytes) {  // reads the lowest 7 bits only
            return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
        };
        const __m512i bytes = _mm512_loadu_si512(block), low = look_up(tables.low, bytes);
        const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(char(0x80)));
        const __m512i high = _mm512_or_si512(look_up(tables.high, bytes), sign);
        out[0] = _mm512_unpacklo_epi8(low, high);
        out[1] = _mm512_unpackhi_epi8(low, high);
    }
    static __m512 multiply(Numbers w, const X* x, __m512 sums) { return multiply_bf16(w, x, sums); }
    static void arrange(const float* x, X* out) {  // unpacklo and unpackhi split each 16 bytes into halves
        for (int k = 0; k < BLOCK; k++) out[k / 8 % 2 * 32 + k / 16 * 8 + k % 8] = to_bf16(x[k]);
    }
};
#endif

// ---- The product. ----

// One row of the weight, `blocks` blocks and, unless null, the block `tail`, times ROWS rows of x.
template <class F, int CHAIN, int ROWS>
void multiply_row(const uint8_t* row, int64_t blocks, const uint8_t* tail, const float* scales,
                  const typename F::X* x, int64_t stride, float* out) {
    constexpr int CHAINS = F::BLOCK / CHAIN, LINKS = CHAIN / F::WIDTH, SUMS = std::min(CHAINS, 4);
    __m512 sums[ROWS][SUMS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    const auto add = [&](const uint8_t* block) __attribute__((always_inline)) {
        typename F::Numbers w[F::PRODUCTS];
        F::unpack(block, w);
        for (int c = 0; c < CHAINS; c++) {
            const __m512 scale = _mm512_set1_ps(scales[c]);
            for (int m = 0; m < ROWS; m++) {
                __m512 part = _mm512_setzero_ps();
                for (int j = c * LINKS; j < (c + 1) * LINKS; j++)
                    part = F::multiply(w[j], x + m * stride + j * F::WIDTH, part);
                sums[m][c % SUMS] = _mm512_fmadd_ps(part, scale, sums[m][c % SUMS]);
            }
        }
        scales += CHAINS;
        x += F::BLOCK;
    };
    for (int64_t b = 0; b < blocks; b++) {
        _mm_prefetch(reinterpret_cast<const char*>(row + 64 * b + AHEAD), _MM_HINT_T0);
        add(row + 64 * b);
    }
    if (tail) add(tail);
    for (int m = 0; m < ROWS; m++) {
        __m512 sum = sums[m][0];
        for (int i = 1; i < SUMS; i++) sum = _mm512_add_ps(sum, sums[m][i]);
        out[m] = _mm512_reduce_add_ps(sum);
    }
}

// Scales of a row, one for each chain of CHAIN numbers, and zero * scale of each group.
struct Scales {
    const Weight& weight;
    int64_t chains, repeats;
    float *of_chains, *offsets;

    void read(int64_t n) const {
        const int64_t G = weight.groups;
        to_floats(weight.scale, weight.scale_type, n * G, G, of_chains);
        if (weight.zero) {
            to_floats(weight.zero, weight.zero_type, n * G, G, offsets);
            for (int64_t g = 0; g < G; g++) offsets[g] *= of_chains[g];
        }
        if (repeats > 1)  // from the back, so that none is overwritten before it was read
            for (int64_t c = chains - 1; c > 0; c--) of_chains[c] = of_chains[std::min(c / repeats, G - 1)];
    }
};

// Sums over the groups of x [K].
inline void sums_of_groups(const float* x, const Weight& weight, float* out) {
    for (int64_t g = 0; g < weight.groups; g++) {
        const int64_t last = std::min((g + 1) * weight.group_size, weight.K);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = g * weight.group_size; k < last; k++) sum += x[k];
        out[g] = sum;
    }
}

template <class F, int CHAIN>
void linear_by_blocks(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                      int threads) {
    using X = typename F::X;
    const int64_t N = weight.N, K = weight.K, groups = round_up(weight.groups, PAD);
    const int64_t rest = weight.bits == 8 ? K % F::BLOCK : 0, stride = round_up(K, F::BLOCK);
    const int64_t blocks = (stride - (rest ? F::BLOCK : 0)) / F::BLOCK, chains = stride / CHAIN;
    const int64_t repeats = weight.groups == 1 ? chains : weight.group_size / CHAIN;
    float* const sums_of_x = scratch<0>(M * (stride + groups) + stride);
    float* const wide = sums_of_x + M * groups;
    X* const arranged = reinterpret_cast<X*>(wide + stride);
    std::fill(sums_of_x, wide + stride, 0.0f);
    for (int64_t m = 0; m < M; m++) {
        to_floats(x, type, m * K, K, wide);
        for (int64_t k = 0; k < stride; k += F::BLOCK) F::arrange(wide + k, arranged + m * stride + k);
        if (weight.zero) sums_of_groups(wide, weight, sums_of_x + m * groups);
    }
    in_parts(N, threads, [&](int64_t first, int64_t last) {
        const int64_t most = round_up(chains, PAD);
        float* const own = scratch<1>(most + groups);
        std::fill(own, own + most + groups, 0.0f);
        const Scales scales{weight, chains, repeats, own, own + most};
        uint8_t tail[64] = {};
        for (int64_t n = first; n < last; n++) {
            const uint8_t* const row = weight.row(n);
            scales.read(n);
            if (rest) std::memcpy(tail, row + 64 * blocks, rest);
            for (int64_t m = 0, rows; m < M; m += rows) {
                float product[4];
                rows = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
                const auto multiply = rows == 4   ? multiply_row<F, CHAIN, 4>
                                      : rows == 2 ? multiply_row<F, CHAIN, 2>
                                                  : multiply_row<F, CHAIN, 1>;
                multiply(row, blocks, rest ? tail : nullptr, scales.of_chains, arranged + m * stride, stride, product);
                for (int64_t i = 0; i < rows; i++) {
                    if (weight.zero) product[i] -= dot(scales.offsets, sums_of_x + (m + i) * groups, groups);
                    store(product[i], bias, type, n, (m + i) * N + n, out);
                }
            }
        }
    });
}

// The longest chain that no group's end divides; false if there is none.
template <class F, int CHAIN>
bool linear_by_chains(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                      int threads) {
    if (weight.groups == 1 || weight.group_size % CHAIN == 0) {
        linear_by_blocks<F, CHAIN>(x, type, M, weight, bias, out, threads);
        return true;
    }
    if constexpr (CHAIN > F::WIDTH)
        return linear_by_chains<F, CHAIN / 2>(x, type, M, weight, bias, out, threads);
    return false;
}

// As `torchchat_linear`; false, with nothing done, for what there is no fast code for.
inline bool fast_linear(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                        int threads) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    if (weight.kind == FP8 && type == BF16 && (weight.groups == 1 || weight.group_size % 64 == 0)) {
        linear_by_blocks<Fp8Bf16, 64>(x, type, M, weight, bias, out, threads);
        return true;
    }
#endif
    if (weight.kind == FP8) return false;
    if (weight.bits == 8) return linear_by_chains<Int8, 64>(x, type, M, weight, bias, out, threads);
#if defined(__AVX512BF16__)
    if (type == BF16) {
        const auto linear = weight.bits == 4   ? linear_by_chains<PackedBf16<4>, 128>
                            : weight.bits == 2 ? linear_by_chains<PackedBf16<2>, 128>
                                               : linear_by_chains<PackedBf16<1>, 128>;
        return linear(x, type, M, weight, bias, out, threads);
    }
#endif
    const auto linear = weight.bits == 4   ? linear_by_chains<Packed<4>, 128>
                        : weight.bits == 2 ? linear_by_chains<Packed<2>, 128>
                                           : linear_by_chains<Packed<1>, 128>;
    return linear(x, type, M, weight, bias, out, threads);
}

}  // namespace
