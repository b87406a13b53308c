// The experts of a layer, each multiplied with the tokens that were sent to it: `by_expert` of model/moe_experts.py, line
// by line. Shapes in names are described there.
#pragma once

#include "register.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/zeros.h>

#include <string_view>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

// `finish` of model/layers.py, as far as experts need it.
inline Tensor gated(const Tensor& y, const optional<std::string_view>& gate) {
    if (!gate) return y;
    const std::vector<Tensor> halves = y.chunk(2, -1);
    if (*gate == "silu") return at::silu(halves[0]).mul(halves[1]);
    return at::gelu(halves[0], *gate == "gelu_tanh" ? "tanh" : "none").mul(halves[1]);
}

// product(x [R, K], the number of an expert) -> [R, N].
template <class Product>
Tensor by_expert(const Tensor& x_MJK, const Tensor& experts_MC, const optional<Tensor>& weights_MC, int64_t N,
                 const optional<std::string_view>& gate, const Product& product,
                 const optional<Tensor>& scale_MJ1 = {}) {
    const int64_t M = x_MJK.size(0), J = x_MJK.size(1), K = x_MJK.size(2), C = experts_MC.size(1);
    const Tensor x = x_MJK.reshape({M * J, K});
    const Tensor scale = scale_MJ1 ? scale_MJ1->reshape({M * J, 1}) : Tensor();
    const Tensor weights = weights_MC ? weights_MC->reshape({M * C, 1}) : Tensor();
    Tensor out = weights_MC ? at::zeros({M, N}, x.options().dtype(at::kFloat))
                            : at::empty({M * C, gate ? N / 2 : N}, x.options());

    const auto run = [&](int64_t expert, const Tensor& pairs, const Tensor& rows, const Tensor& tokens) {
        Tensor y = product(x.index_select(0, rows), expert);
        if (scale_MJ1) y = y.to(at::kFloat).mul(scale.index_select(0, rows)).to(x.scalar_type());
        y = gated(y, gate);
        if (weights_MC)
            out.index_put_({tokens}, out.index_select(0, tokens).add(y.mul(weights.index_select(0, pairs))));
        else
            out.index_put_({pairs}, y);
    };

    const Tensor flat = experts_MC.reshape({M * C});
    const Tensor order = flat.argsort(/*stable=*/true, 0, false);
    const auto [needed, inverse, counts] = at::unique_consecutive(flat.index_select(0, order), false, true);
    const int64_t* numbers = needed.const_data_ptr<int64_t>();
    const int64_t* sizes = counts.const_data_ptr<int64_t>();
    for (int64_t i = 0, start = 0; i < needed.numel(); start += sizes[i++]) {
        const Tensor pairs = order.narrow(0, start, sizes[i]), tokens = pairs.floor_divide(C);
        run(numbers[i], pairs, J > 1 ? pairs : tokens, tokens);
    }
    return weights_MC ? out.to(x.scalar_type()) : out.view({M, C, -1});
}

}  // namespace
