"""Products of a few rows on CUDA equal those with the weight that the numbers stand for, whatever the format."""

import pytest
import torch
import torch.nn.functional as F

from quant import matmul, ops
from quant.packed import dequantize, pack

FORMATS = [  # bits, kind, group size, zero points
    (8, "int", 0, False),
    (8, "int", 32, False),
    (8, "int", 64, True),
    (8, "int", 0, True),
    (8, "fp8", 0, False),
    (4, "int", 0, False),
    (4, "int", 32, False),
    (4, "int", 64, True),
    (4, "int", 256, False),
    (4, "int", 0, True),
]


def weight_of(bits, kind, group_size, has_zero, N, K, dtype):
    random = torch.Generator().manual_seed(bits + K)
    half = 1 << (bits - 1)
    numbers = torch.randint(-half, half, (N, K), generator=random).to(torch.int8)
    values = numbers.to(torch.float8_e4m3fn) if kind == "fp8" else numbers if bits == 8 else pack(numbers, bits)
    groups = -(-K // (group_size or K))
    scale = (torch.rand(N, groups, generator=random) / 50 + 0.001).to(dtype)
    zero = torch.randint(-3, 4, (N, groups), generator=random).to(torch.int8) if has_zero else None
    return values, scale, zero


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64])
@pytest.mark.parametrize(("N", "K"), [(40, 512), (96, 544), (4100, 1000), (9000, 2048)])
@pytest.mark.parametrize(("bits", "kind", "group_size", "has_zero"), FORMATS)
def test_a_few_rows_are_multiplied_as_by_the_weight_itself(bits, kind, group_size, has_zero, N, K, rows):
    for dtype in (torch.bfloat16, torch.float16):
        values, scale, zero = weight_of(bits, kind, group_size, has_zero, N, K, dtype)
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype).cuda()
        bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
        values, scale, zero = (t if t is None else t.cuda() for t in (values, scale, zero))
        assert matmul.usable(x, kind, bits)
        y = matmul.matmul(x, values, scale, zero, bias, K, bits, group_size)
        weight = dequantize(values, scale, zero, K, bits, group_size, torch.float64)
        exact = F.linear(x.double(), weight, bias.double())
        made = F.linear(x, weight.to(dtype), bias)
        ours, theirs = ((product.double() - exact).norm() / exact.norm() for product in (y, made))
        assert ours < max(1.1 * theirs, torch.finfo(dtype).eps)
        assert torch.equal(ops.quantized_linear(x, values, scale, zero, bias, K, bits, group_size), y)


@pytest.mark.gpu
def test_what_it_is_not_for_goes_the_other_way():
    assert not matmul.usable(torch.empty(1, 64, dtype=torch.bfloat16, device="cuda"), "int", 4)
    assert not matmul.usable(torch.empty(matmul.MAX_ROWS + 1, 64, dtype=torch.bfloat16, device="cuda"), "int", 4)
    assert not matmul.usable(torch.empty(4, 64, device="cuda"), "int", 4)
    assert not matmul.usable(torch.empty(4, 64, dtype=torch.bfloat16, device="cuda"), "int", 2)


def test_a_cpu_has_other_kernels():
    assert not matmul.usable(torch.empty(4, 64, dtype=torch.bfloat16), "int", 4)
