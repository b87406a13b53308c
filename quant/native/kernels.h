// What all kernels share: the call, conversions to and from float32, and the dot product of floats.
//
// Every output is computed by one thread in one order that depends neither on the number of threads nor on how many
// rows of x come together, so that one request alone and the same among others see the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#endif

namespace {

enum Dtype : int { NONE = 0, BF16 = 1, FP16 = 2, FP32 = 3, INT8 = 4, FP8 = 5 };

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int RUN = 32;

// What stands for a run of x besides its numbers. Each format says besides: ADDED, what its codes are more than the
// numbers; UNIT, what one is worth; and where in a block the numbers of x go, in PIECES of each run that are APART.
struct OfRun {
    float scale, sum;
};

// One weight [N, K] in the storage that quant/packed.py describes.
struct Weight {
    const uint8_t* values;
    const void* scale;
    const void* zero;
    int64_t N, K, group_size, groups, row_bytes;
    int bits;
    Dtype kind, scale_type, zero_type;  // kind: INT8 for integers of any width, FP8

    Weight(const void* values, const void* scale, const void* zero, int64_t N, int64_t K, int64_t group_size, int bits,
           Dtype kind, Dtype scale_type, Dtype zero_type)
        : values(static_cast<const uint8_t*>(values)), scale(scale), zero(zero), N(N), K(K),
          group_size(group_size ? std::min(group_size, K) : K), groups((K + this->group_size - 1) / this->group_size),
          row_bytes(bits == 8 ? K : round_up(K, 32) * bits / 8), bits(bits), kind(kind),
          scale_type(scale_type), zero_type(zero_type) {}

    const uint8_t* row(int64_t n) const { return values + n * row_bytes; }
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Without a branch, so that loops of it become vectors.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) { return no ^ ((yes ^ no) & -uint32_t(condition)); }

inline float from_bf16(uint16_t half) { return as_float(uint32_t(half) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return uint16_t(choose(value != value, 0x7fc0, rounded));
}

// Subnormal numbers are converted as integers: processors take a hundred cycles for a float that is one.
inline float from_fp16(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff;
    const uint32_t small = as_bits(float(int(magnitude)) * 0x1p-24f);
    const uint32_t finite = choose(magnitude < 0x400, small, (magnitude << 13) + (112 << 23));
    const uint32_t bits = choose(magnitude < 0x7c00, finite, magnitude << 13 | 0x7f800000);
    return as_float(bits | uint32_t(half & 0x8000) << 16);
}

inline uint16_t to_fp16(float value) {
    const uint32_t sign = as_bits(value) >> 16 & 0x8000, magnitude = as_bits(value) & 0x7fffffff;
    // Subnormal halves: adding 0.5 leaves the rounded number of 2**-24 in the low bits.
    const uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t finite = std::min<uint32_t>(choose(magnitude < 0x38800000, small, normal), 0x7c00);
    return uint16_t(sign | choose(magnitude > 0x7f800000, 0x7e00, finite));
}

// e4m3fn: four bits of exponent with bias 7, no infinity, one NaN of each sign.
inline float from_fp8(uint8_t byte) {
    const uint32_t magnitude = byte & 0x7f;
    const uint32_t small = as_bits(float(int(magnitude)) * 0x1p-9f);
    const uint32_t finite = choose(magnitude < 8, small, (magnitude << 20) + (120 << 23));
    return as_float(choose(magnitude < 0x7f, finite, 0x7fc00000) | uint32_t(byte & 0x80) << 24);
}

inline float get(const void* source, Dtype type, int64_t i) {
    if (type == FP32) return static_cast<const float*>(source)[i];
    if (type == INT8) return static_cast<const int8_t*>(source)[i];
    const uint16_t half = static_cast<const uint16_t*>(source)[i];
    return type == BF16 ? from_bf16(half) : from_fp16(half);
}

inline void put(float value, Dtype type, void* out, int64_t i) {
    if (type == FP32)
        static_cast<float*>(out)[i] = value;
    else
        static_cast<uint16_t*>(out)[i] = type == BF16 ? to_bf16(value) : to_fp16(value);
}

// `count` numbers of `type` from position `start` on, as floats.
inline void to_floats(const void* source, Dtype type, int64_t start, int64_t count, float* __restrict out) {
    if (type == FP32) {
        std::memcpy(out, static_cast<const float*>(source) + start, 4 * count);
    } else if (type == BF16) {
        const uint16_t* in = static_cast<const uint16_t*>(source) + start;
        for (int64_t i = 0; i < count; i++) out[i] = from_bf16(in[i]);
    } else if (type == FP16) {
        const uint16_t* in = static_cast<const uint16_t*>(source) + start;
        for (int64_t i = 0; i < count; i++) out[i] = from_fp16(in[i]);
    } else {
        const int8_t* in = static_cast<const int8_t*>(source) + start;
        for (int64_t i = 0; i < count; i++) out[i] = in[i];
    }
}

inline void from_floats(const float* __restrict in, Dtype type, int64_t start, int64_t count, void* out) {
    if (type == FP32) {
        std::memcpy(static_cast<float*>(out) + start, in, 4 * count);
    } else if (type == BF16) {
        uint16_t* __restrict halves = static_cast<uint16_t*>(out) + start;
        for (int64_t i = 0; i < count; i++) halves[i] = to_bf16(in[i]);
    } else {
        uint16_t* __restrict halves = static_cast<uint16_t*>(out) + start;
        for (int64_t i = 0; i < count; i++) halves[i] = to_fp16(in[i]);
    }
}

// A register's worth of floats, in the compilers' own spelling.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));

constexpr int64_t PAD = 64;  // floats; vectors that `dot` reads are zero from their end to a multiple of it

inline Lanes load_lanes(const float* p) {
    Lanes value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// The sum of a[i] * b[i]; `count` is a multiple of PAD.
inline float dot(const float* a, const float* b, int64_t count) {
    Lanes sums[4] = {};
    for (int64_t i = 0; i < count; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] += load_lanes(a + i + j * LANES) * load_lanes(b + i + j * LANES);
    const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}

// Less weight than this is faster done by one thread than handed to others. Without OpenMP, which keeps its threads,
// they are made for each call.
#ifdef _OPENMP
constexpr int64_t SERIAL_BYTES = 1 << 15;
#else
constexpr int64_t SERIAL_BYTES = 1 << 19;
#endif

// work(first, last): all of [0, count) in one contiguous part for each thread; `bytes` of weight are read in all.
template <class Work>
void in_parts(int64_t count, int64_t bytes, int threads, const Work& work) {
    threads = bytes < SERIAL_BYTES ? 1 : int(std::min<int64_t>(threads, count));
    if (threads <= 1) {
        work(0, count);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        work(count * me / team, count * (me + 1) / team);
    }
#else
    std::vector<std::thread> others;
    for (int64_t me = 1; me < threads; me++)
        others.emplace_back([=, &work] { work(count * me / threads, count * (me + 1) / threads); });
    work(0, count / threads);
    for (std::thread& other : others) other.join();
#endif
}

// Memory that stays for the next call of this thread; each WHICH is another.
template <int WHICH>
float* scratch(int64_t floats) {
    thread_local std::vector<float> memory;
    if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
    return reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(memory.data()), 64));
}

}  // namespace
