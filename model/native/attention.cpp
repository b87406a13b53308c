// The attention of model/attention.py as operators in C++, for programs compiled ahead that run without Python. Line by
// line the same calls, so that both give the same bits.
#include "register.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <limits>

namespace {

using at::Tensor;
using std::optional;

// Attention whose scores are bounded by tanh; the softmax in float32.
Tensor softcapped(const Tensor& q_BNTH, const Tensor& k_BNSH, const Tensor& v_BNSH, const optional<Tensor>& mask_B1TS,
                  double scale, double softcap) {
    Tensor scores = q_BNTH.matmul(k_BNSH.transpose(2, 3)).mul(scale / softcap).tanh().mul(softcap);
    if (mask_B1TS) scores = scores.masked_fill(mask_B1TS->logical_not(), -std::numeric_limits<double>::infinity());
    return scores.softmax(-1, at::kFloat).to(v_BNSH.scalar_type()).matmul(v_BNSH);
}

// True where token t of a row may attend to the positions from `first` to `context`; [B, 1, T, S].
Tensor causal_mask(const Tensor& start_B, int64_t T, int64_t first, int64_t context, optional<int64_t> window) {
    const Tensor positions_BT1 = start_B.unsqueeze(1).add(at::arange(T)).unsqueeze(2);
    const Tensor positions_S = at::arange(first, context);
    Tensor mask = positions_S.le(positions_BT1);
    if (window) mask = mask.logical_and(positions_S.gt(positions_BT1.sub(*window)));
    return mask.unsqueeze(1);
}

// Causal attention whose last query is at the last key.
Tensor causal(const Tensor& q_BNTH, const Tensor& k_BKSH, const Tensor& v_BKSH, double scale) {
    const int64_t T = q_BNTH.size(2), S = k_BKSH.size(2);
    if (T == S) return at::scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, {}, 0.0, true, scale, true);
    const Tensor mask = at::ones({T, S}, at::kBool).tril(S - T);
    return at::scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, mask, 0.0, false, scale, true);
}

// `prefill_attention` of model/attention.py.
Tensor prefill_attention(const Tensor& q_BTNH, const Tensor& k_BTKH, const Tensor& v_BTKH, const Tensor& keys,
                         const Tensor& values, const Tensor& start_B, const Tensor& slots_B, const Tensor& context_,
                         double scale, optional<int64_t> window, optional<double> softcap) {
    const Tensor q_BNTH = q_BTNH.transpose(1, 2);
    const int64_t T = q_BTNH.size(1), context = context_.item<int64_t>();
    const bool one_row = q_BTNH.size(0) == 1;
    const int64_t first = one_row && window ? std::max<int64_t>(0, context - T - *window + 1) : 0;
    Tensor k_BKSH, v_BKSH;
    if (context == T) {  // every row starts at 0: nothing to read from the cache
        k_BKSH = k_BTKH.transpose(1, 2);
        v_BKSH = v_BTKH.transpose(1, 2);
    } else {
        k_BKSH = keys.narrow(2, first, context - first).index_select(0, slots_B);
        v_BKSH = values.narrow(2, first, context - first).index_select(0, slots_B);
    }
    Tensor out;
    if ((one_row || context == T) && (!window || *window >= context) && !softcap) {
        out = causal(q_BNTH, k_BKSH, v_BKSH, scale);
    } else {
        const Tensor mask_B1TS = causal_mask(start_B, T, first, context, window);
        const int64_t groups = q_BNTH.size(1) / k_BKSH.size(1);
        const Tensor k_BNSH = k_BKSH.repeat_interleave(groups, 1), v_BNSH = v_BKSH.repeat_interleave(groups, 1);
        out = softcap ? softcapped(q_BNTH, k_BNSH, v_BNSH, mask_B1TS, scale, *softcap)
                      : at::scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, mask_B1TS, 0.0, false, scale);
    }
    return out.transpose(1, 2).contiguous();
}

// `decode_attention` of model/attention.py.
Tensor decode_attention(const Tensor& q_BNH, const Tensor& keys, const Tensor& values, const Tensor& start_B,
                        const Tensor& slots_B, double scale, optional<int64_t> window, optional<double> softcap) {
    const int64_t B = q_BNH.size(0), N = q_BNH.size(1), H = q_BNH.size(2), K = keys.size(1);
    const Tensor q_BKGH = q_BNH.reshape({B, K, N / K, H});  // the heads that share keys take the place of the tokens
    Tensor out = at::empty_like(q_BKGH, at::MemoryFormat::Contiguous);
    const Tensor starts = start_B.contiguous(), slots = slots_B.contiguous();
    for (int64_t row = 0; row < B; row++) {
        const int64_t end = starts.const_data_ptr<int64_t>()[row] + 1, slot = slots.const_data_ptr<int64_t>()[row];
        const int64_t first = window ? std::max<int64_t>(0, end - *window) : 0;
        const Tensor q = q_BKGH.narrow(0, row, 1);
        const Tensor k = keys.narrow(0, slot, 1).narrow(2, first, end - first);
        const Tensor v = values.narrow(0, slot, 1).narrow(2, first, end - first);
        out.narrow(0, row, 1).copy_(softcap ? softcapped(q, k, v, {}, scale, *softcap)
                                            : at::scaled_dot_product_attention(q, k, v, {}, 0.0, false, scale));
    }
    return out.view({B, N, H});
}

const Registered prefill("prefill_attention",
                         "(Tensor q_BTNH, Tensor k_BTKH, Tensor v_BTKH, Tensor keys, Tensor values, Tensor start_B, "
                         "Tensor slots_B, Tensor context, float scale, SymInt? window, float? softcap) -> Tensor",
                         TORCH_FN(prefill_attention));
const Registered decode("decode_attention",
                        "(Tensor q_BNH, Tensor keys, Tensor values, Tensor start_B, Tensor slots_B, float scale, "
                        "SymInt? window, float? softcap) -> Tensor",
                        TORCH_FN(decode_attention));

}  // namespace
