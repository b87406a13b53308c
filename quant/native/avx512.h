// Quantized weights on processors with AVX-512: the products of blocks.h, and rows of the weight in 16 bits.
#pragma once

#include "avx512_formats.h"

#include "blocks.h"

namespace {

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
        const typename F::Numbers w = F::widen(run);
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

}  // namespace
