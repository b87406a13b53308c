// model/products.py in C++: the same calls, so that both give the same bits.
#pragma once

#include "register.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <optional>

namespace {

constexpr int64_t WIDE_ROWS = 8, WIDE_PANEL_BYTES = 1 << 20;

// Whether this processor multiplies matrices of this type by instructions made for it.
bool multiplies(at::ScalarType type) {
    const auto asked = [](const char* name) {
        const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
        return op && op->typed<bool()>().call();
    };
    static const bool bf16 = asked("mkldnn::_is_mkldnn_bf16_supported");
    static const bool fp16 = asked("mkldnn::_is_mkldnn_fp16_supported");
    return type == at::kBFloat16 ? bf16 : type == at::kHalf ? fp16 : true;
}

at::Tensor linear_by_panels(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
    if (M < WIDE_ROWS) return at::linear(x, weight, bias);
    const at::Tensor y = at::empty({M, N}, x.options()), wide = x.to(at::kFloat);
    const int64_t step = std::max<int64_t>(32, WIDE_PANEL_BYTES / (4 * K) / 32 * 32);
    for (int64_t start = 0; start < N; start += step) {
        const int64_t rows = std::min(step, N - start);
        std::optional<at::Tensor> its_bias;
        if (bias) its_bias = bias->narrow(0, start, rows).to(at::kFloat);
        y.narrow(1, start, rows).copy_(at::linear(wide, weight.narrow(0, start, rows).to(at::kFloat), its_bias));
    }
    return y;
}

// `linear` of model/products.py for x [M, K].
at::Tensor wide_linear(const at::Tensor& x, const at::Tensor& weight) {
    return multiplies(x.scalar_type()) ? at::linear(x, weight) : linear_by_panels(x, weight, std::nullopt);
}

}  // namespace
