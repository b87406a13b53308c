"""Attention for ExecuTorch: the same as `model.attention`, in operators that its runtime has. Written down once, when a
model is exported; never run by this process.

The cache of one conversation lies as ExecuTorch's operators read it, [1, S, K, H]: S positions, K key/value heads, H
head size.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.attention import Rows


def attend(
    q_1TNH: Tensor,
    k_1TKH: Tensor,
    v_1TKH: Tensor,
    keys_1SKH: Tensor,
    values_1SKH: Tensor,
    rows: "Rows",
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`model.attention.attend` of one row, rotated already; [1, T, N, H]. rows.context: start + T, a number."""
    context = rows.context
    assert not isinstance(context, Tensor)
    start = context - q_1TNH.shape[1]
    llama = torch.ops.llama
    llama.update_cache(k_1TKH, keys_1SKH, start)
    llama.update_cache(v_1TKH, values_1SKH, start)
    if window is None and softcap is None:  # reads the filled part of the cache alone
        out: Tensor = llama.custom_sdpa(q_1TNH, keys_1SKH, values_1SKH, start, None, 0.0, True, scale)
        return out
    return _masked(q_1TNH, keys_1SKH, values_1SKH, rows.start_B, scale, window, softcap)


def _masked(
    q_1TNH: Tensor,
    keys_1SKH: Tensor,
    values_1SKH: Tensor,
    start_1: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Over the whole cache, what is not to be seen masked: for scores that the operator has no way to change."""
    T, S = q_1TNH.shape[1], keys_1SKH.shape[1]
    groups = q_1TNH.shape[2] // keys_1SKH.shape[2]
    q_NTH = q_1TNH[0].transpose(0, 1)
    k_NSH = keys_1SKH[0].transpose(0, 1).repeat_interleave(groups, dim=0)
    v_NSH = values_1SKH[0].transpose(0, 1).repeat_interleave(groups, dim=0)
    scores_NTS = q_NTH @ k_NSH.transpose(1, 2) * scale
    if softcap is not None:
        scores_NTS = torch.tanh(scores_NTS / softcap) * softcap
    positions_T1 = (start_1 + torch.arange(T))[:, None]
    seen_TS = torch.arange(S) <= positions_T1
    if window is not None:
        seen_TS = seen_TS & (torch.arange(S) > positions_T1 - window)
    weights_NTS = torch.where(seen_TS, scores_NTS, float("-inf")).softmax(-1)
    return (weights_NTS @ v_NSH).transpose(0, 1).unsqueeze(0)
