// What a block of 64 bytes of a quantized weight holds, and how it is multiplied with x, on processors with AVX-512.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace {

// ---- What blocks.h does with vectors. ----

using Vector = __m512;

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }
inline Vector pick(const int32_t* which, Vector v) { return _mm512_permutexvar_ps(_mm512_loadu_si512(which), v); }

// The first `count` of LANES numbers.
inline Vector load_floats(const void* source, Dtype type, int64_t start, int64_t count) {
    const __mmask16 mask = __mmask16((1u << count) - 1);
    if (type == FP32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + start);
    if (type == INT8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const int8_t*>(source) + start);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(source) + start);
    return type == FP16 ? _mm512_cvtph_ps(halves)
                        : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// ---- Formats. ----

// Formats of a byte a number: the numbers of a run are 32 bytes, and a run is a part.
struct Bytes {
    static constexpr int RUNS = 2, PARTS = 2, ADDED = 0, PIECES = 1, APART = 0;

    static __m512 scale(int part, const float* of_runs) { return _mm512_set1_ps(of_runs[part]); }
};

// Formats of fewer bits: a block is 16 words of 32 bits, BITS of them a run; all runs of a block are one part.
template <int BITS>
struct Packed {
    static constexpr int RUNS = 16 / BITS, PARTS = 1, MASK = (1 << BITS) - 1;

    static __m512 scale(int, const float* of_runs) {
        // No more is loaded than is used: scales were stored just before, and a load across two stores waits for both.
        const __m512 scales = BITS == 4   ? _mm512_broadcast_f32x4(_mm_loadu_ps(of_runs))
                              : BITS == 2 ? _mm512_broadcast_f32x8(_mm256_loadu_ps(of_runs))
                                          : _mm512_loadu_ps(of_runs);
        const __m512i word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        constexpr int log2 = BITS == 4 ? 2 : BITS == 2 ? 1 : 0;
        return BITS == 1 ? scales : _mm512_permutexvar_ps(_mm512_srli_epi32(word, log2), scales);
    }
};

// ---- x as integers. ----

struct Shorts {
    using X = int16_t;

    // The scale is 2**(e - 14), the greatest number of the run being at least 2**e and less than 2**(e + 1).
    static OfRun arrange(const float* x, X* out) {
        const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
        const __m512i bits = _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(first)),
                                              _mm512_castps_si512(_mm512_abs_ps(second)));
        const uint32_t exponent = _mm512_reduce_max_epu32(bits) >> 23;
        const bool ordinary = exponent > 14 && exponent < 255;
        const __m512 inverse = _mm512_set1_ps(ordinary ? as_float((268 - exponent) << 23) : 0);
        const float scale = ordinary ? as_float((exponent - 14) << 23) : exponent < 255 ? 0 : __builtin_nanf("");
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtepi32_epi16(high));
        return {scale, float(_mm512_reduce_add_epi32(_mm512_add_epi32(low, high))) * scale};
    }
};

struct Int8Shorts : Shorts, Bytes {
    struct Numbers { __m512i run; };
    static constexpr float UNIT = 1;

    static Numbers unpack(const uint8_t* block, int part) {
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + part))};
    }
    static __m512 multiply(const Numbers& w, int part, const X* x) {
        return _mm512_cvtepi32_ps(_mm512_madd_epi16(w.run, _mm512_loadu_si512(x + RUN * part)));
    }
};

inline __m512i add_products(__m512i sums, __m512i w, __m512i x) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sums, w, x);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(w, x));
#endif
}

// Vector j of a block: of each half of its words the code at bits BITS * j.
template <int BITS>
struct PackedShorts : Shorts, Packed<BITS> {
    static constexpr int CODES = 16 / BITS, ADDED = 1 << (BITS - 1), PIECES = CODES, APART = RUN;
    static constexpr float UNIT = 1;
    struct Numbers { __m512i codes[CODES]; };

    static OfRun arrange(const float* x, X* out) {
        X run[RUN];
        alignas(64) X from[RUN];
        for (int i = 0; i < RUN; i++) from[i] = X((i / (2 * BITS) + i % 2 * CODES) * BITS + i % (2 * BITS) / 2);
        const OfRun of_run = Shorts::arrange(x, run);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(from), _mm512_loadu_si512(run)));
        return of_run;
    }
    static Numbers unpack(const uint8_t* block, int) {
        __m512i words = _mm512_loadu_si512(block), mask = _mm512_set1_epi16(Packed<BITS>::MASK);
        asm("" : "+v"(words));  // or compilers load it again for each shift
        Numbers w;
        for (int j = 0; j < CODES - 1; j++) w.codes[j] = _mm512_and_si512(_mm512_srli_epi16(words, BITS * j), mask);
        w.codes[CODES - 1] = _mm512_srli_epi16(words, 16 - BITS);
        return w;
    }
    static __m512 multiply(const Numbers& w, int, const X* x) {
        __m512i sums = _mm512_madd_epi16(w.codes[0], _mm512_loadu_si512(x));
        for (int j = 1; j < CODES; j++) sums = add_products(sums, w.codes[j], _mm512_loadu_si512(x + RUN * j));
        return _mm512_cvtepi32_ps(sums);
    }
};

// ---- x as floats. ----

struct Floats {
    using X = float;

    static OfRun arrange(const float* x, X* out) {
        std::memcpy(out, x, RUN * sizeof(X));
        return {1, _mm512_reduce_add_ps(_mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)))};
    }
};

struct ByteFloats : Floats, Bytes {
    struct Numbers { __m512 first, second; };

    static __m512 multiply(const Numbers& w, int part, const X* x) {
        const __m512 first = _mm512_mul_ps(w.first, _mm512_loadu_ps(x + RUN * part));
        return _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + RUN * part + 16), first);
    }
};

struct Int8Floats : ByteFloats {
    static constexpr float UNIT = 1;

    static __m512 half(const uint8_t* bytes) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    }
    static Numbers widen(const uint8_t* run) { return {half(run), half(run + 16)}; }
    static Numbers unpack(const uint8_t* block, int part) { return widen(block + RUN * part); }
};

// The bits of e4m3 are those of a half with fewer bits, whose exponent has another bias: it is 2**-8 of the number.
// (Its NaN becomes a number; but then the scale, which is made from the greatest number, is NaN.)
struct Fp8Floats : ByteFloats {
    static constexpr float UNIT = 256;

    static Numbers widen(const uint8_t* run) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run));
        const __m512i moved = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);  // with the sign in two bits
        const __m512i halves = _mm512_and_si512(moved, _mm512_set1_epi16(short(0xbfff)));
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    }
    static Numbers unpack(const uint8_t* block, int part) { return widen(block + RUN * part); }
};

// Vector j of a block: of each of its words the number at bits BITS * j.
template <int BITS>
struct PackedFloats : Floats, Packed<BITS> {
    static constexpr int CODES = 32 / BITS, ADDED = 0, PIECES = CODES, APART = 16;
    static constexpr float UNIT = 1;
    struct Numbers { __m512 of[CODES]; };

    static Numbers unpack(const uint8_t* block, int) {
        float table[16];
        for (int i = 0; i < 16; i++) table[i] = float((i & Packed<BITS>::MASK) - (1 << (BITS - 1)));
        const __m512 numbers = _mm512_loadu_ps(table);
        const __m512i words = _mm512_loadu_si512(block);
        Numbers w;  // the instruction reads the lowest 4 bits of a word only
        for (int j = 0; j < CODES; j++) w.of[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, BITS * j), numbers);
        return w;
    }
    static __m512 multiply(const Numbers& w, int, const X* x) {
        __m512 sums = _mm512_mul_ps(w.of[0], _mm512_loadu_ps(x));
        for (int j = 1; j < CODES; j++) sums = _mm512_fmadd_ps(w.of[j], _mm512_loadu_ps(x + 16 * j), sums);
        return sums;
    }
};

}  // namespace
