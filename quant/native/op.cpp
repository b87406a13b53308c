// The operators of quant/ops.py and quant/experts.py in C++, for programs compiled ahead that run without Python: the
// same kernels, called for the same numbers of rows, so that both give the same bits.
#include "kernels.cpp"

#include "../../model/native/experts.h"
#include "../../model/native/products.h"

#include <ATen/Parallel.h>

namespace {

constexpr int64_t NATIVE_ROWS = 16, PANEL_BYTES = 1 << 20;  // as in quant/ops.py

// `CODES` of quant/native.py.
int code(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kBFloat16: return BF16;
        case at::kHalf: return FP16;
        case at::kFloat: return FP32;
        case at::kChar:
        case at::kByte: return INT8;
        case at::kFloat8_e4m3fn: return FP8;
        default: TORCH_CHECK(false, "no weight is of type ", tensor.scalar_type());
    }
}

const void* data(const optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// x [M, K] @ weight.T + bias, [M, N] in x's dtype.
Tensor quantized_linear(const Tensor& x_MK, const Tensor& values, const Tensor& scale, const optional<Tensor>& zero,
                        const optional<Tensor>& bias, int64_t K, int64_t bits, int64_t group_size) {
    const Tensor x = x_MK.contiguous();
    const int64_t M = x.size(0), N = values.size(0);
    TORCH_CHECK(x.dim() == 2 && x.size(1) == K, "rows of ", K, " numbers are wanted");
    const int zero_type = zero ? code(*zero) : NONE, threads = at::get_num_threads();
    Tensor out = at::empty({M, N}, x.options());
    if (M <= NATIVE_ROWS) {
        torchchat_linear(x.const_data_ptr(), values.const_data_ptr(), scale.const_data_ptr(), data(zero), data(bias),
                         out.mutable_data_ptr(), M, N, K, group_size, int(bits), code(values), code(x), code(scale),
                         zero_type, threads);
        return out;
    }
    const Tensor wide = multiplies(x.scalar_type()) ? x : x.to(at::kFloat);
    const int64_t step = std::max<int64_t>(64, PANEL_BYTES / (K * wide.element_size()) / 32 * 32);
    for (int64_t start = 0; start < N; start += step) {
        const int64_t rows = std::min(step, N - start);
        Tensor panel = at::empty({rows, K}, wide.options());
        torchchat_dequantize(values.const_data_ptr(), scale.const_data_ptr(), data(zero), panel.mutable_data_ptr(),
                             start, start + rows, N, K, group_size, int(bits), code(values), code(scale), zero_type,
                             code(wide), threads);
        optional<Tensor> its_bias;
        if (bias) its_bias = bias->narrow(0, start, rows).to(wide.scalar_type());
        out.narrow(1, start, rows).copy_(at::linear(wide, panel, its_bias));
    }
    return out;
}

// `quantize` of quant/activations.py: numbers in x's dtype, and their scales.
std::pair<Tensor, Tensor> quantize(const Tensor& x_MK, std::string_view kind) {
    const Tensor x = x_MK.to(at::kFloat);
    const auto type = x_MK.scalar_type();
    const double eps = std::numeric_limits<float>::epsilon();
    Tensor numbers, scale;
    if (kind == "fp8") {
        scale = x.abs().amax(-1, true).div(448.0).clamp_min(eps);
        numbers = x.div(scale).clamp(-448.0, 448.0).to(at::kFloat8_e4m3fn).to(type);
    } else if (kind == "int8-symmetric") {
        scale = x.abs().amax(-1, true).div(127.5).clamp_min(eps);
        numbers = x.div(scale).round().clamp(-128, 127).to(type);
    } else {
        const Tensor low = x.amin(-1, true).clamp_max(0), high = x.amax(-1, true).clamp_min(0);
        scale = high.sub(low).div(255).clamp_min(eps);
        const Tensor zero = low.div(scale).round().neg().sub(128).clamp(-128, 127);
        numbers = x.div(scale).round().add(zero).clamp(-128, 127).sub(zero).to(type);
    }
    if (type == at::kHalf) return {numbers.div(256), scale.mul(256)};
    return {numbers, scale};
}

Tensor quantized_experts(const Tensor& x_MJK, const Tensor& values, const Tensor& scale, const optional<Tensor>& zero,
                         const Tensor& experts_MC, const optional<Tensor>& weights_MC, int64_t num_experts,
                         optional<std::string_view> gate, int64_t bits, int64_t group_size,
                         optional<std::string_view> activation) {
    const int64_t M = x_MJK.size(0), J = x_MJK.size(1), K = x_MJK.size(2), N = values.size(0) / num_experts;
    Tensor x = x_MJK;
    optional<Tensor> scale_MJ1;
    if (activation) {
        const auto [numbers, scales] = quantize(x_MJK.reshape({M * J, K}), *activation);
        x = numbers.view({M, J, K});
        scale_MJ1 = scales.view({M, J, 1});
    }
    const auto product = [&](const Tensor& x_RK, int64_t expert) {
        const auto rows = [&](const Tensor& of) { return of.narrow(0, expert * N, N); };
        const optional<Tensor> its_zero = zero ? optional<Tensor>(rows(*zero)) : std::nullopt;
        return quantized_linear(x_RK, rows(values), rows(scale), its_zero, std::nullopt, K, bits, group_size);
    };
    return by_expert(x, experts_MC, weights_MC, N, gate, product, scale_MJ1);
}

const Registered experts_op("quantized_experts",
                            "(Tensor x_MJK, Tensor values, Tensor scale, Tensor? zero, Tensor experts_MC, "
                            "Tensor? weights_MC, SymInt num_experts, str? gate, SymInt bits, SymInt group_size, "
                            "str? activation) -> Tensor",
                            TORCH_FN(quantized_experts));
const Registered linear_op("quantized_linear",
                           "(Tensor x, Tensor values, Tensor scale, Tensor? zero, Tensor? bias, SymInt K, SymInt bits, "
                           "SymInt group_size) -> Tensor",
                           TORCH_FN(quantized_linear));

}  // namespace
