// Products with quantized weights on a CPU: the two entry points, and code for any processor.
#include "kernels.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#endif

namespace {

typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

// Numbers that follow one another are in words that do, or in the same: four at a time are shifted by the same.
template <int BITS>
void unpack(const uint8_t* row, int64_t K, float* __restrict out) {
    constexpr uint32_t MASK = (1 << BITS) - 1;
    for (int64_t k = 0; k < K; k += RUN, row += 4 * BITS) {
        uint32_t words[BITS];
        std::memcpy(words, row, 4 * BITS);
        Words codes;
        for (int i = 0; i < 4; i++) codes[i] = words[i % BITS] >> i / BITS * BITS;
        for (int j = 0; j < RUN / 4; j++, codes >>= 4, out += 4) {
            const FourFloats numbers = __builtin_convertvector(Integers(codes & MASK), FourFloats) - float(1 << (BITS - 1));
            std::memcpy(out, &numbers, sizeof numbers);
        }
    }
}

// Row n of the weight as floats, in memory for round_up(K, 512) of them. What lies beyond K is undefined.
void dequantize_row(const Weight& weight, int64_t n, float* __restrict out) {
    const uint8_t* row = weight.row(n);
    if (weight.kind == FP8)
        for (int64_t k = 0; k < weight.K; k++) out[k] = from_fp8(row[k]);
    else if (weight.bits == 8)
        to_floats(row, INT8, 0, weight.K, out);
    else if (weight.bits == 4)
        unpack<4>(row, weight.K, out);
    else if (weight.bits == 2)
        unpack<2>(row, weight.K, out);
    else
        unpack<1>(row, weight.K, out);
    for (int64_t g = 0; g < weight.groups; g++) {
        const int64_t first = g * weight.group_size, last = std::min(first + weight.group_size, weight.K);
        const float scale = get(weight.scale, weight.scale_type, n * weight.groups + g);
        const float zero = weight.zero ? get(weight.zero, weight.zero_type, n * weight.groups + g) : 0;
        for (int64_t k = first; k < last; k++) out[k] = (out[k] - zero) * scale;
    }
}

// x [M, K] as floats [M, stride], zero from K on.
void widen(const void* x, Dtype type, int64_t M, int64_t K, int64_t stride, float* out) {
    for (int64_t m = 0; m < M; m++) {
        to_floats(x, type, m * K, K, out + m * stride);
        std::fill(out + m * stride + K, out + (m + 1) * stride, 0.0f);
    }
}

void linear_by_rows(const void* x, Dtype type, int64_t M, const Weight& weight, const void* bias, void* out,
                    int threads) {
    const int64_t stride = round_up(weight.K, PAD), row_floats = round_up(weight.K, 512);
    float* wide = scratch<0>(M * stride);
    widen(x, type, M, weight.K, stride, wide);
    in_parts(weight.N, weight.N * weight.row_bytes, threads, [&](int64_t first, int64_t last) {
        float* const row = scratch<1>(row_floats);
        for (int64_t n = first; n < last; n++) {
            dequantize_row(weight, n, row);
            std::fill(row + weight.K, row + row_floats, 0.0f);
            for (int64_t m = 0; m < M; m++)
                put(dot(row, wide + m * stride, stride) + (bias ? get(bias, type, n) : 0), type, out, m * weight.N + n);
        }
    });
}

}  // namespace

// out [M, N] = x [M, K] @ weight.T + bias; x, bias and out of `x_type`.
extern "C" void torchchat_linear(const void* x, const void* values, const void* scale, const void* zero,
                                 const void* bias, void* out, int64_t M, int64_t N, int64_t K, int64_t group_size,
                                 int bits, int kind, int x_type, int scale_type, int zero_type, int threads) {
    const Weight weight(values, scale, zero, N, K, group_size, bits, Dtype(kind), Dtype(scale_type), Dtype(zero_type));
#ifdef HAS_FAST_CODE
    if (fast_linear(x, Dtype(x_type), M, weight, bias, out, threads)) return;
#endif
    linear_by_rows(x, Dtype(x_type), M, weight, bias, out, threads);
}

// out [last - first, K]: rows of the weight in `out_type`.
extern "C" void torchchat_dequantize(const void* values, const void* scale, const void* zero, void* out, int64_t first,
                                     int64_t last, int64_t N, int64_t K, int64_t group_size, int bits, int kind,
                                     int scale_type, int zero_type, int out_type, int threads) {
    const Weight weight(values, scale, zero, N, K, group_size, bits, Dtype(kind), Dtype(scale_type), Dtype(zero_type));
    in_parts(last - first, (last - first) * weight.row_bytes, threads, [&](int64_t begin, int64_t end) {
        float* const row = scratch<1>(round_up(K, 512));
        for (int64_t n = begin; n < end; n++) {
#ifdef HAS_FAST_CODE
            uint8_t* const its_place = static_cast<uint8_t*>(out) + n * K * (out_type == FP32 ? 4 : 2);
            if (fast_dequantize(weight, first + n, Dtype(out_type), its_place)) continue;
#endif
            dequantize_row(weight, first + n, row);
            from_floats(row, Dtype(out_type), n * K, K, out);
        }
    });
}
