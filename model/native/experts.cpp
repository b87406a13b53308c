// The op of model/moe_experts.py in C++, for programs that run without Python.
#include "experts.h"
#include "products.h"

#include <ATen/ops/mv.h>

namespace {

Tensor expert_linear(const Tensor& x_MJK, const Tensor& weight, const Tensor& experts_MC,
                     const optional<Tensor>& weights_MC, int64_t num_experts, optional<std::string_view> gate) {
    const Tensor weight_ENK = weight.view({num_experts, -1, weight.size(1)});
    const auto product = [&](const Tensor& x_RK, int64_t expert) {
        if (x_RK.size(0) == 1 && x_RK.scalar_type() == at::kBFloat16)
            return at::mv(weight_ENK.select(0, expert), x_RK.view({-1})).unsqueeze(0);
        return wide_linear(x_RK, weight_ENK.select(0, expert));
    };
    return by_expert(x_MJK, experts_MC, weights_MC, weight_ENK.size(1), gate, product);
}

const Registered experts("expert_linear",
                         "(Tensor x_MJK, Tensor weight, Tensor experts_MC, Tensor? weights_MC, SymInt num_experts, "
                         "str? gate) -> Tensor",
                         TORCH_FN(expert_linear));

}  // namespace
