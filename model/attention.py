"""Attention over the KV cache: writes the new keys and values, then reads only the filled part of the cache.

Many tokens a row (prefill) go through `scaled_dot_product_attention`; one token a row (decode) through a kernel whose
cost follows the context that is there. Both are custom ops under the compiler, which then need not know its length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import kernels, portable
from model.ops import register_op
from model.rope import rotate
from model.tracing import is_portable, is_tracing

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch stand: the position of each one's first new token, its slot in the cache, both int64
    [B], and the largest position that any row reaches, plus one (a tensor on the CPU while a step is traced).
    """

    start_B: Tensor
    slots_B: Tensor
    context: int | Tensor


def attend(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    rotation: tuple[Tensor, Tensor] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of new tokens to themselves and to what the cache holds before them; [B, T, N, H].

    keys, values: [slots, K, max_seq_len, H], written at positions start_B .. start_B + T - 1 of rows slots_B. rotation:
    of queries and keys, as `model.rope.cos_sin` gives it; None leaves them as they are. A token attends to at most the
    `window` last positions, itself included. softcap: scores become tanh(s / softcap) * softcap.
    """
    start_B, slots_B, context = rows.start_B, rows.slots_B, rows.context
    decoding = q_BTNH.shape[1] == 1 and not isinstance(context, Tensor)
    if decoding and kernels.usable(q_BTNH):
        # Under the compiler too: it writes into the cache that it is given, and copies none of it.
        flash: Attend = kernels.flash_decode_op if is_tracing() else kernels.flash_decode
        cos, sin = rotation if rotation is not None else (None, None)
        return flash(q_BTNH, k_BTKH, v_BTKH, keys, values, start_B, slots_B, cos, sin, scale, window, softcap)
    if rotation is not None:
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotation), rotate(k_BTKH, *rotation)
    if is_portable():
        return portable.attend(q_BTNH, k_BTKH, v_BTKH, keys, values, rows, scale, window, softcap)
    positions_BT = start_B[:, None] + torch.arange(q_BTNH.shape[1], device=start_B.device)
    keys[slots_B[:, None], :, positions_BT] = k_BTKH
    values[slots_B[:, None], :, positions_BT] = v_BTKH
    if not decoding:
        prefill: Attend = _prefill_op if is_tracing() else prefill_attention
        return prefill(q_BTNH, k_BTKH, v_BTKH, keys, values, start_B, slots_B, context, scale, window, softcap)
    decode: Attend = _decode_op if is_tracing() else decode_attention
    return decode(q_BTNH[:, 0], keys, values, start_B, slots_B, scale, window, softcap).unsqueeze(1)


def prefill_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    keys: Tensor,
    values: Tensor,
    start_B: Tensor,
    slots_B: Tensor,
    context: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of many new tokens a row; the same result whether a prompt is read whole or in pieces."""
    q_BNTH, T = q_BTNH.transpose(1, 2), q_BTNH.shape[1]
    one_row = q_BTNH.shape[0] == 1
    # A window sees no more than its own length before the first new token.
    first = max(0, context - T - window + 1) if one_row and window is not None else 0
    if context == T:  # every row starts at 0: nothing to read from the cache
        k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
    else:
        k_BKSH = keys[:, :, first:context].index_select(0, slots_B)
        v_BKSH = values[:, :, first:context].index_select(0, slots_B)
    causal = (one_row or context == T) and (window is None or window >= context)
    if causal and softcap is None:  # without a mask in memory, which the fastest kernels do not take
        out = _causal(q_BNTH, k_BKSH, v_BKSH, scale)
    else:
        mask_B1TS = _causal_mask(start_B, T, first, context, window)
        groups = q_BNTH.shape[1] // k_BKSH.shape[1]
        k_BNSH, v_BNSH = k_BKSH.repeat_interleave(groups, dim=1), v_BKSH.repeat_interleave(groups, dim=1)
        if softcap is None:
            out = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_B1TS, scale=scale)
        else:
            out = _softcapped(q_BNTH, k_BNSH, v_BNSH, mask_B1TS, scale, softcap)
    return out.transpose(1, 2).contiguous()


def _causal(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float) -> Tensor:
    """Causal attention whose last query is at the last key."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    if T == S:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=True)
    if q_BNTH.is_cuda:
        # Imported where it is used: it brings the whole of torch.compile along, most of a second.
        from torch.nn.attention.bias import causal_lower_right

        mask: Tensor = causal_lower_right(T, S)
    else:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, scale=scale, enable_gqa=True)


def decode_attention(
    q_BNH: Tensor,
    keys: Tensor,
    values: Tensor,
    start_B: Tensor,
    slots_B: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one new token a row, already in the cache at `start_B`, over the filled cache alone; [B, N, H]."""
    B, N, H = q_BNH.shape
    K = keys.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)  # the heads that share keys take the place of the tokens
    out = torch.empty_like(q_BKGH)
    for row, (start, slot) in enumerate(zip(start_B.tolist(), slots_B.tolist(), strict=True)):
        end = start + 1
        first = 0 if window is None else max(0, end - window)
        q, k, v = q_BKGH[row : row + 1], keys[slot : slot + 1, :, first:end], values[slot : slot + 1, :, first:end]
        if softcap is None:
            out[row] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0]
        else:
            out[row] = _softcapped(q, k, v, None, scale, softcap)[0]
    return out.view(B, N, H)


def _causal_mask(start_B: Tensor, T: int, first: int, context: int, window: int | None) -> Tensor:
    """True where token t of a row may attend to the positions from `first` to `context`; [B, 1, T, S]."""
    positions_BT1 = (start_B[:, None] + torch.arange(T, device=start_B.device))[:, :, None]
    positions_S = torch.arange(first, context, device=start_B.device)
    mask = positions_S <= positions_BT1
    if window is not None:
        mask &= positions_S > positions_BT1 - window
    return mask[:, None]


def _softcapped(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask_B1TS: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention whose scores are bounded by tanh, as Gemma 2's are; the softmax in float32."""
    scores = torch.tanh(q_BNTH @ k_BNSH.transpose(2, 3) * (scale / softcap)) * softcap
    if mask_B1TS is not None:
        scores = scores.masked_fill(~mask_B1TS, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v_BNSH.dtype) @ v_BNSH


def _prefill(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    keys: Tensor,
    values: Tensor,
    start_B: Tensor,
    slots_B: Tensor,
    context: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`prefill_attention`, its context a tensor on the CPU: in a compiled step it changes from call to call."""
    return prefill_attention(
        q_BTNH, k_BTKH, v_BTKH, keys, values, start_B, slots_B, int(context), scale, window, softcap
    )


def _like_query(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_prefill_op = register_op("prefill_attention", _prefill, _like_query)
_decode_op = register_op("decode_attention", decode_attention, _like_query)
