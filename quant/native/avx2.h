// Quantized weights on processors with AVX2, FMA and F16C: the formats for blocks.h, and rows of the weight in 16 bits.
//
// Blocks and the order of x are those of avx512_formats.h, in halves: each is a part. x of 16 bits becomes integers as
// there, whose products are added in pairs; other orders of the same sums are the only difference.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace {

// ---- What blocks.h does with vectors. ----

using Vector = __m256;

inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256i load_integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Vector pick(const int32_t* which, Vector v) { return _mm256_permutevar8x32_ps(v, load_integers(which)); }

inline float sum_of(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The first `count` of LANES numbers: no instruction loads less than all of a register of 8 or 16 bits a number.
inline Vector load_floats(const void* source, Dtype type, int64_t start, int64_t count) {
    const int64_t width = type == FP32 ? 4 : type == INT8 ? 1 : 2;
    const char* from = static_cast<const char*>(source) + start * width;
    char copy[4 * LANES] = {};
    if (count < LANES) {
        for (int64_t i = 0; i < count * width; i++) copy[i] = from[i];
        from = copy;
    }
    if (type == FP32) return load(reinterpret_cast<const float*>(from));
    if (type == INT8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return type == FP16 ? _mm256_cvtph_ps(halves)
                        : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// ---- Formats. ----

// The numbers of a run are 32 bytes, and a run is a part.
struct Bytes {
    static constexpr int RUNS = 2, PARTS = 2, ADDED = 0, PIECES = 1, APART = 0;

    static Vector scale(int part, const float* of_runs) { return _mm256_broadcast_ss(of_runs + part); }
};

// A part is 8 words of 32 bits, BITS of them a run.
template <int BITS>
struct Packed {
    static constexpr int RUNS = 16 / BITS, PARTS = 2, MASK = (1 << BITS) - 1;

    static Vector scale(int part, const float* of_runs) {
        const float* const first = of_runs + part * 8 / BITS;
        if (BITS == 1) return load(first);
        if (BITS == 2)
            return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(first)),
                                        _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
        const __m256d both = _mm256_broadcast_sd(reinterpret_cast<const double*>(first));
        return _mm256_permutevar_ps(_mm256_castpd_ps(both), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    }
};

inline uint32_t greatest_of(__m256i v) {
    const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1))));
}

struct Shorts {
    using X = int16_t;

    // The scale is 2**(e - 14), the greatest number of the run being at least 2**e and less than 2**(e + 1).
    static OfRun arrange(const float* x, X* out) {
        __m256i bits = _mm256_setzero_si256();
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        for (int i = 0; i < RUN; i += LANES)
            bits = _mm256_max_epu32(bits, _mm256_and_si256(load_integers(x + i), magnitude));
        const uint32_t exponent = greatest_of(bits) >> 23;
        const bool ordinary = exponent > 14 && exponent < 255;
        const Vector inverse = _mm256_set1_ps(ordinary ? as_float((268 - exponent) << 23) : 0);
        const float scale = ordinary ? as_float((exponent - 14) << 23) : exponent < 255 ? 0 : __builtin_nanf("");
        __m256i sums = _mm256_setzero_si256();
        for (int i = 0; i < RUN; i += 2 * LANES) {
            const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load(x + i), inverse));
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load(x + i + LANES), inverse));
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), both);
            sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
        }
        // Each of the eight is less than 2**17, and so is exact as a float, and so is their sum.
        return {scale, sum_of(_mm256_cvtepi32_ps(sums)) * scale};
    }
};

inline __m256i add_products(__m256i sums, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sums, w, x);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
#endif
}

struct Int8Shorts : Shorts, Bytes {
    struct Numbers { __m256i first, second; };
    static constexpr float UNIT = 1;

    static Numbers unpack(const uint8_t* block, int part) {
        const __m128i* const halves = reinterpret_cast<const __m128i*>(block + RUN * part);
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128(halves)), _mm256_cvtepi8_epi16(_mm_loadu_si128(halves + 1))};
    }
    static Vector multiply(const Numbers& w, int part, const X* x) {
        x += RUN * part;
        const __m256i sums = _mm256_madd_epi16(w.first, load_integers(x));
        return _mm256_cvtepi32_ps(add_products(sums, w.second, load_integers(x + RUN / 2)));
    }
};

// Vector j of a part: of each half of its words the code at bits BITS * j.
template <int BITS>
struct PackedShorts : Shorts, Packed<BITS> {
    static constexpr int CODES = 16 / BITS, ADDED = 1 << (BITS - 1), PIECES = CODES, APART = RUN;
    static constexpr float UNIT = 1;
    struct Numbers { __m256i codes[CODES]; };

    static OfRun arrange(const float* x, X* out) {
        X run[RUN];
        const OfRun of_run = Shorts::arrange(x, run);
        for (int i = 0; i < RUN; i++) out[i] = run[(i / (2 * BITS) + i % 2 * CODES) * BITS + i % (2 * BITS) / 2];
        return of_run;
    }
    static Numbers unpack(const uint8_t* block, int part) {
        __m256i words = load_integers(block + 32 * part);
        const __m256i mask = _mm256_set1_epi16(Packed<BITS>::MASK);
        asm("" : "+x"(words));  // or compilers load it again for each shift
        Numbers w;
        for (int j = 0; j < CODES - 1; j++) w.codes[j] = _mm256_and_si256(_mm256_srli_epi16(words, BITS * j), mask);
        w.codes[CODES - 1] = _mm256_srli_epi16(words, 16 - BITS);
        return w;
    }
    static Vector multiply(const Numbers& w, int part, const X* x) {
        x += 16 * part;
        __m256i sums = _mm256_madd_epi16(w.codes[0], load_integers(x));
        for (int j = 1; j < CODES; j++) sums = add_products(sums, w.codes[j], load_integers(x + RUN * j));
        return _mm256_cvtepi32_ps(sums);
    }
};

struct Floats {
    using X = float;

    static OfRun arrange(const float* x, X* out) {
        std::memcpy(out, x, RUN * sizeof(X));
        return {1, sum_of((load(x) + load(x + 8)) + (load(x + 16) + load(x + 24)))};
    }
};

struct ByteFloats : Floats, Bytes {
    struct Numbers { Vector of[4]; };

    static Vector multiply(const Numbers& w, int part, const X* x) {
        x += RUN * part;
        Vector sums = w.of[0] * load(x);
        for (int i = 1; i < 4; i++) sums = multiply_add(w.of[i], load(x + LANES * i), sums);
        return sums;
    }
};

struct Int8Floats : ByteFloats {
    static constexpr float UNIT = 1;

    static Vector eight(const uint8_t* bytes) {
        const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    }
    static Numbers widen(const uint8_t* run) { return {eight(run), eight(run + 8), eight(run + 16), eight(run + 24)}; }
    static Numbers unpack(const uint8_t* block, int part) { return widen(block + RUN * part); }
};

// As in avx512_formats.h: the bits of e4m3 are those of a half with another bias, which is 2**-8 of the number.
struct Fp8Floats : ByteFloats {
    static constexpr float UNIT = 256;

    static __m256i halves(const uint8_t* bytes) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(sixteen), 7);  // with the sign in two bits
        return _mm256_and_si256(moved, _mm256_set1_epi16(short(0xbfff)));
    }
    static Vector low(__m256i halves) { return _mm256_cvtph_ps(_mm256_castsi256_si128(halves)); }
    static Vector high(__m256i halves) { return _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)); }
    static Numbers widen(const uint8_t* run) {
        const __m256i first = halves(run), second = halves(run + 16);
        return {low(first), high(first), low(second), high(second)};
    }
    static Numbers unpack(const uint8_t* block, int part) { return widen(block + RUN * part); }
};

// With its highest bit inverted a code is the number itself in two's complement.
template <int BITS>
inline __m256i as_signed(__m256i words) {
    return _mm256_xor_si256(words, _mm256_set1_epi32(BITS == 4 ? 0x88888888 : BITS == 2 ? 0xaaaaaaaa : 0xffffffff));
}

// Vector j of a part: of each of its words the number at bits BITS * j.
template <int BITS>
struct PackedFloats : Floats, Packed<BITS> {
    static constexpr int CODES = 32 / BITS, ADDED = 0, PIECES = CODES, APART = 16;
    static constexpr float UNIT = 1;
    struct Numbers { __m256i words; };

    static Numbers unpack(const uint8_t* block, int part) { return {as_signed<BITS>(load_integers(block + 32 * part))}; }
    static Vector multiply(const Numbers& w, int part, const X* x) {
        x += LANES * part;
        Vector sums[2] = {};
        for (int j = 0; j < CODES; j++) {
            const __m256i top = _mm256_slli_epi32(w.words, 32 - BITS - BITS * j);
            const Vector numbers = _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - BITS));
            sums[j % 2] = multiply_add(numbers, load(x + 16 * j), sums[j % 2]);
        }
        return sums[0] + sums[1];
    }
};

}  // namespace

#include "blocks.h"

namespace {

// ---- Rows of the weight itself, in 16 bits. ----

inline __m256i to_halves(Vector first, Vector second, Dtype type) {
    if (type == FP16) {
        const __m128i low = _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m128i high = _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const auto round = [](Vector values) __attribute__((always_inline)) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    };
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round(first), round(second)), 0xd8);
}

// Row n, whose runs are `bytes` apart and become numbers by `widen`, each worth `unit`.
template <class Widen>
void dequantize_runs(const Weight& weight, int64_t n, int bytes, float unit, Dtype type, uint16_t* out,
                     const Widen& widen) {
    for_runs(weight, n, [&](int64_t k, int64_t count, float scale, float zero) __attribute__((always_inline)) {
        const int64_t start = k / RUN * bytes;
        const uint8_t* run = weight.row(n) + start;
        uint8_t copy[RUN] = {};
        if (weight.row_bytes - start < bytes)
            run = static_cast<const uint8_t*>(std::memcpy(copy, run, weight.row_bytes - start));
        const ByteFloats::Numbers w = widen(run);
        uint16_t rest[RUN], *const to = count < RUN ? rest : out + k;
        for (int i = 0; i < 4; i += 2) {
            const Vector first = (w.of[i] * unit - zero) * scale, second = (w.of[i + 1] * unit - zero) * scale;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), to_halves(first, second, type));
        }
        if (count < RUN) std::memcpy(out + k, rest, 2 * count);
    });
}

template <class F>
void dequantize_bytes(const Weight& weight, int64_t n, Dtype type, uint16_t* out) {
    dequantize_runs(weight, n, RUN, F::UNIT, type, out, F::widen);
}

template <int BITS>
void dequantize_codes(const Weight& weight, int64_t n, Dtype type, uint16_t* out) {
    alignas(32) int32_t shifts[RUN];  // that bring the code of each number of a run to the top of its word
    for (int k = 0; k < RUN; k++) shifts[k] = 32 - BITS - k / BITS * BITS;
    dequantize_runs(weight, n, 4 * BITS, 1, type, out, [&](const uint8_t* run) __attribute__((always_inline)) {
        int32_t words[LANES];
        for (int i = 0; i < LANES; i++) std::memcpy(words + i, run + i % BITS * 4, 4);
        const __m256i repeated = as_signed<BITS>(load_integers(words));
        ByteFloats::Numbers w;
        for (int i = 0; i < 4; i++) {
            const __m256i top = _mm256_sllv_epi32(repeated, load_integers(shifts + LANES * i));
            w.of[i] = _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - BITS));
        }
        return w;
    });
}

}  // namespace
