"""Laws of products by panels: what `F.linear` gives, no less exact, whatever the shapes, and the same when compiled."""

import pytest
import torch
import torch.nn.functional as F

from model import products
from model.products import WIDE_ROWS, linear

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (WIDE_ROWS - 1,), (WIDE_ROWS,), (3, 70), (0,)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 40), (33, 7), (2050, 264)])
def test_it_is_the_product_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], outputs: int, inputs: int) -> None:
    x, weight = numbers(*shape, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype)
    for bias in (None, numbers(outputs, dtype=dtype)):
        y = linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert y.shape == exact.shape
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-3 * inputs**0.5)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_as_exact_as_each_row_by_itself(dtype: torch.dtype) -> None:
    x, weight = numbers(40, 264, dtype=dtype), numbers(100, 264, dtype=dtype)
    alone = torch.cat([F.linear(row[None], weight) for row in x])
    torch.testing.assert_close(linear(x, weight), alone, rtol=2 * torch.finfo(dtype).eps, atol=0.1)


def test_where_there_are_instructions_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    monkeypatch.setattr(products, "linear_by_panels", None)
    x, weight = numbers(40, 264, dtype=torch.bfloat16), numbers(100, 264, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_float32_is_multiplied_as_it_is() -> None:
    assert products.multiplies(torch.float32)
