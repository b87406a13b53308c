"""Attention and quantized layers in ExecuTorch's operators, held against what they stand for. Where the extra
[executorch] is installed, the operators run in torch too.
"""

import pytest
import torch

from model import attention, portable
from model.attention import Rows
from quant.formats import Format
from quant.modules import QuantizedEmbedding, QuantizedLinear
from quant.portable import PortableEmbedding, PortableLinear, why_not

pytest.importorskip("executorch", reason="the extra [executorch] is not installed")
LENGTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 8


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    from generate.executorch import _load_ops, _quiet

    with _quiet():
        _load_ops()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention(window: int | None, softcap: float | None) -> None:
    """A prompt in two pieces, and tokens after it."""
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.zeros(1, KV_HEADS, LENGTH, SIZE) for _ in range(2)]
    ours = [torch.zeros(1, LENGTH, KV_HEADS, SIZE) for _ in range(2)]
    start = 0
    for count in (9, 4, 1, 1):
        q, k, v = (torch.randn(1, count, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
        rows = Rows(torch.tensor([start]), torch.tensor([0]), start + count)
        expected = attention.attend(q, k, v, *theirs, rows, None, 0.3, window, softcap)
        found = portable.attend(q, k, v, *ours, rows, 0.3, window, softcap)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        start += count
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.transpose(1, 2), other)


def numbers(module: QuantizedLinear | QuantizedEmbedding) -> None:
    """Random numbers and scales."""
    generator = torch.Generator().manual_seed(1)
    low, high = (0, 256) if module.values.dtype == torch.uint8 else (-128, 128)
    module.values.copy_(torch.randint(low, high, module.values.shape, generator=generator))
    module.scale.copy_((torch.rand(module.scale.shape, generator=generator) + 0.1).to(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 7])
def test_linear(rows: int) -> None:
    layer = QuantizedLinear(6, 64, Format("int", 4, 32, False, "int8"), torch.float32, torch.device("cpu"))
    numbers(layer)
    layer.bias = torch.nn.Parameter(torch.arange(6.0), requires_grad=False)
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(PortableLinear(layer)(x), layer(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (8, 32), (4, 0), (4, 32)])
def test_embedding(bits: int, group_size: int) -> None:
    table = QuantizedEmbedding(9, 64, Format("int", bits, group_size, False), torch.float32, torch.device("cpu"))
    numbers(table)
    ids = torch.tensor([[3, 0, 8, 3]])
    torch.testing.assert_close(PortableEmbedding(table)(ids), table(ids))


def test_what_has_no_kernel_is_told() -> None:
    form = Format("int", 4, 32, False, "int8")
    assert why_not("linear:a8w4dq", form, 64) is None
    assert "32 does not divide 48" in str(why_not("linear:a8w4dq", form, 48))
    assert "no kernel for linear:int8" in str(why_not("linear:int8", Format("int", 8, 0, False), 64))
