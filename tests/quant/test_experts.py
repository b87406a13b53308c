"""Experts on quantized numbers give what their weights, taken out of the numbers, give: in every format and dtype, for
one token and for many, run or traced; and only what a token is sent to is read.
"""

import pytest
import torch
from torch import Tensor

from model.moe_experts import by_expert
from model.tracing import tracing
from quant import activations, experts, native
from quant.experts import QuantizedExpertLinear
from quant.formats import Format
from quant.packed import dequantize
from tests.model.test_moe import random_choice
from tests.quant.test_modules import DEVICES, DTYPES, FORMATS, random_numbers

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_layer(
    E: int, C: int, N: int, K: int, form: Format, dtype: torch.dtype, device: str
) -> QuantizedExpertLinear:
    torch.manual_seed(0)
    layer = QuantizedExpertLinear(E, C, E * N, K, form, dtype, torch.device(device))
    with torch.no_grad():
        random_numbers(layer)
    return layer


def exactly(
    layer: QuantizedExpertLinear, x: Tensor, experts_MC: Tensor, gate: str | None, weights_MC: Tensor | None
) -> Tensor:
    """With the weights that the numbers stand for, in float64, of inputs that are rounded as the layer rounds them."""
    form, E, K = layer.format, layer.num_experts, layer.K
    weight = dequantize(layer.values, layer.scale, layer.zero, K, form.bits, form.group_size, torch.float64)
    weight_ENK = weight.view(E, -1, K)
    exact = x.double()
    if form.activation is not None:
        numbers, scale = activations.quantize(x.reshape(-1, K), form.activation)
        exact = (numbers.double() * scale.double()).view(x.shape)
    weights = None if weights_MC is None else weights_MC.double()
    return by_expert(exact, experts_MC, weights, weight_ENK.shape[1], gate, lambda r, e: r @ weight_ENK[e].T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(32, 256), (34, 100)])
@pytest.mark.parametrize("M", [1, 3, 40])
@torch.no_grad()
def test_experts_are_those_of_their_weights(
    device: str, dtype: torch.dtype, form: Format, N: int, K: int, M: int
) -> None:
    E, C = 5, 2
    layer = random_layer(E, C, N, K, form, dtype, device)
    experts_MC, weights_MC = random_choice(M, E, C, device)
    for J, gate, weights in ((1, "silu", None), (C, None, weights_MC), (1, None, None)):
        x = torch.randn(M, J, K, device=device, dtype=dtype)
        run = layer(x, experts_MC, gate=gate, weights_MC=weights)
        with tracing():
            traced = layer(x, experts_MC, gate=gate, weights_MC=weights)
        assert run.dtype == dtype
        expected = exactly(layer, x, experts_MC, gate, weights)
        tolerance = TOLERANCE[dtype] * expected.abs().max()
        assert (run - expected).abs().max() <= tolerance
        assert (traced - expected).abs().max() <= tolerance


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[4], FORMATS[8]], ids=str)
@pytest.mark.parametrize("M", [1, 40])
@torch.no_grad()
def test_without_a_compiler_plain_pytorch_gives_the_same(
    form: Format, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(5, 2, 34, 100, form, torch.float32, "cpu")
    experts_MC, weights_MC = random_choice(M, 5, 2)
    x = torch.randn(M, 2, 100)
    expected = layer(x, experts_MC, weights_MC=weights_MC)
    monkeypatch.setattr(native, "available", lambda **_: False)
    torch.testing.assert_close(layer(x, experts_MC, weights_MC=weights_MC), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_only_the_experts_of_a_token_are_read(device: str) -> None:
    layer = random_layer(6, 2, 8, 64, Format("int", 8, 0, False), torch.float32, device)
    layer.scale.view(6, 8)[[0, 2, 3, 5]] = float("nan")
    for M in (1, 30):
        chosen = torch.tensor([[4, 1]], device=device).expand(M, 2)
        assert layer(torch.randn(M, 1, 64, device=device), chosen).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS, ids=str)
@torch.no_grad()
def test_on_cuda_without_our_kernel_it_is_the_same(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(5, 2, 34, 100, form, torch.bfloat16, "cuda")
    experts_MC, weights_MC = random_choice(3, 5, 2, "cuda")
    x = torch.randn(3, 2, 100, device="cuda", dtype=torch.bfloat16)
    expected = layer(x, experts_MC, weights_MC=weights_MC)
    monkeypatch.setattr(experts, "fused_usable", lambda *_: False)
    found = layer(x, experts_MC, weights_MC=weights_MC)
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
