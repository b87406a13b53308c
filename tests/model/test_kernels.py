"""Our CUDA kernels give what plain PyTorch gives, on shapes that fit their blocks and shapes that do not."""

import copy

import pytest
import torch

from model import kernels
from model.attention import decode_attention
from model.layers import Linear, RMSNorm
from model.rope import rotate
from model.tracing import tracing

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_no_worse(fused: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The kernel is as near to the exact result as plain PyTorch is,
    within a few roundings of the largest number."""
    rounding = torch.finfo(fused.dtype).eps * exact.abs().max()
    assert torch.isfinite(fused).all()
    assert (fused - exact).abs().max() <= 4 * (plain - exact).abs().max() + 4 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (512, 288), (130, 1000), (4096, 4096)])
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_times_a_matrix_is_linear(
    dtype: torch.dtype, rows: int, columns: int, gate: str | None, plus_one: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = Linear(columns, rows, bias=bias, device="cuda", dtype=dtype)
    norm = RMSNorm(columns, 1e-5, plus_one).to("cuda", dtype)
    x = torch.randn(1, 1, columns, device="cuda", dtype=dtype)
    residual = None if gate else torch.randn(1, 1, rows, device="cuda", dtype=dtype)
    with torch.no_grad():
        linear.weight.normal_(std=columns**-0.5)
        norm.weight.normal_(mean=1.0, std=0.2)
        if bias:
            linear.bias.normal_()
        given = {"norm": norm, "gate": gate, "residual": residual, "multiplier": 1.0 if gate else 0.5}
        plain = linear(x, **given)
        with tracing():  # a traced step takes the kernel
            assert kernels.usable(x)
            fused = linear(x, **given)
        exact_given = {**given, "norm": copy.deepcopy(norm).double()}
        exact_given["residual"] = None if residual is None else residual.double()
        exact = copy.deepcopy(linear).double()(x.double(), **exact_given)
    assert_no_worse(fused, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (6, 6, 48), (4, 2, 16), (8, 1, 256)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (17, None), (None, 30.0), (100, 5.0)])
def test_flash_decode_is_attention_over_the_filled_cache(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads, head_dim, device="cuda", dtype=dtype)
    keys = torch.randn(4, kv_heads, 600, head_dim, device="cuda", dtype=dtype)
    values = torch.randn_like(keys)
    starts = torch.tensor([0, 599, 77], device="cuda")
    slots = torch.tensor([3, 0, 2], device="cuda")
    # What is past a row's position was written by others, or never: it must not count.
    keys[2, :, 78:], values[2, :, 78:] = float("nan"), float("nan")
    plain = decode_attention(query, keys, values, starts, slots, head_dim**-0.5, window, softcap)
    fused = kernels.flash_decode(query, keys, values, starts, slots, head_dim**-0.5, window, softcap)
    double = (tensor.double() for tensor in (query, keys, values))
    exact = decode_attention(*double, starts, slots, head_dim**-0.5, window, softcap)
    assert_no_worse(fused, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(8, 2, 64, 64), (4, 4, 48, 48), (6, 1, 80, 32)]
)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_rotating_and_storing_in_one_is_both(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, rotated: bool, apart: bool
) -> None:
    torch.manual_seed(0)
    together = torch.randn(3, 1, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
    query, key, value = together.split([heads, kv_heads, kv_heads], dim=2)
    if apart:  # as norms of queries and keys leave them
        query, key = query.contiguous(), key.contiguous()
    angles = torch.randn(3, 1, 1, rotary_dim // 2, device="cuda")
    rotation = (angles.cos(), angles.sin()) if rotated else None
    keys = torch.zeros(4, kv_heads, 16, head_dim, device="cuda", dtype=dtype)
    values = torch.zeros_like(keys)
    starts, slots = torch.tensor([0, 15, 7], device="cuda"), torch.tensor([3, 0, 2], device="cuda")
    out = kernels.rotate_and_store(query, key, value, keys, values, starts, slots, rotation)
    turn = (lambda x: rotate(x, *rotation)) if rotation is not None else (lambda x: x)
    plain_keys, plain_values = torch.zeros_like(keys), torch.zeros_like(values)
    plain_keys[slots[:, None], :, starts[:, None]] = turn(key)
    plain_values[slots[:, None], :, starts[:, None]] = value
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, turn(query)[:, 0], **rounding)
    torch.testing.assert_close(keys, plain_keys, **rounding)
    assert torch.equal(values, plain_values)
