"""Our ops in C++: the bits that Python's give, for every kind of attention. Loaded, they take the place of Python's."""

import itertools
from pathlib import Path

import pytest
import torch

from config.errors import UserError
from model.attention import decode_attention, prefill_attention
from model.moe_experts import expert_linear, shape_of
from model.native import ATTENTION, EXPERTS, PRODUCTS, load_op_library, op_library
from model.products import WIDE_ROWS, linear_by_panels

SLOTS, KV_HEADS, LENGTH, SIZE = 3, 2, 40, 16
KINDS = list(itertools.product((1, 3), (None, 5, 64), (None, 2.0), (torch.float32, torch.bfloat16)))
"""Heads that share keys, window, softcap, dtype."""


@pytest.fixture(scope="module", autouse=True)
def library(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("ops")
    for name, sources in (("experts.so", EXPERTS), ("products.so", PRODUCTS), ("attention.so", ATTENTION)):
        (path := directory / name).write_bytes(op_library(sources, warm, lambda line: None))
        load_op_library(path)
    load_op_library(path)  # once is enough, and twice does no harm
    again = path.with_name("again.so")
    again.write_bytes(path.read_bytes() + b"\0")
    load_op_library(again)
    for name in ("decode_attention", "prefill_attention", "expert_linear", "linear_by_panels"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchchat::{name}", "CPU")


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2])).to(dtype)


@pytest.mark.parametrize(("groups", "window", "softcap", "dtype"), KINDS)
def test_decoding_gives_the_same_bits(
    groups: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    keys, values = noise(SLOTS, KV_HEADS, LENGTH, SIZE, dtype=dtype), noise(SLOTS, KV_HEADS, LENGTH, SIZE, dtype=dtype)
    for starts, slots in (([0], [1]), ([39], [2]), ([3, 17, 0], [2, 0, 1])):
        q = noise(len(slots), KV_HEADS * groups, SIZE, dtype=dtype)
        inputs = (q, keys, values, torch.tensor(starts), torch.tensor(slots), 0.3, window, softcap)
        assert torch.equal(torch.ops.torchchat.decode_attention(*inputs), decode_attention(*inputs))


@pytest.mark.parametrize(("groups", "window", "softcap", "dtype"), KINDS)
def test_reading_gives_the_same_bits(
    groups: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    keys, values = noise(SLOTS, KV_HEADS, LENGTH, SIZE, dtype=dtype), noise(SLOTS, KV_HEADS, LENGTH, SIZE, dtype=dtype)
    for start, tokens in ((0, 2), (0, 33), (7, 20), (38, 2)):
        q, k, v = (noise(1, tokens, KV_HEADS * n, SIZE, dtype=dtype) for n in (groups, 1, 1))
        context = start + tokens
        rows = (torch.tensor([start]), torch.tensor([1]))
        rest = (0.3, window, softcap)
        found = torch.ops.torchchat.prefill_attention(q, k, v, keys, values, *rows, torch.tensor(context), *rest)
        assert torch.equal(found, prefill_attention(q, k, v, keys, values, *rows, context, *rest))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_give_the_same_bits(dtype: torch.dtype) -> None:
    weight, bias = noise(2050, 260, dtype=dtype), noise(1, 2050, dtype=dtype)[0]  # two panels and a part of one
    for rows, its_bias in itertools.product((1, WIDE_ROWS - 1, WIDE_ROWS, 40), (None, bias)):
        inputs = (noise(rows, 260, dtype=dtype), weight, its_bias)
        assert torch.equal(torch.ops.torchchat.linear_by_panels(*inputs), linear_by_panels(*inputs))


@pytest.mark.parametrize("gate", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_give_the_same_bits(gate: str | None, dtype: torch.dtype) -> None:
    experts, chosen, K, N = 5, 2, 24, 16
    weight = noise(experts * N, K, dtype=dtype)
    for tokens, own_rows, weighted in itertools.product((1, 2, 9), (1, chosen), (False, gate is None)):
        x = noise(tokens, own_rows, K, dtype=dtype)
        to = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)])
        weights = noise(tokens, chosen, dtype=torch.float32).softmax(-1) if weighted else None
        inputs = (x, weight, to, weights, experts, gate)
        found = torch.ops.torchchat.expert_linear(*inputs)
        assert torch.equal(found, expert_linear(*inputs)), (tokens, own_rows, weighted)
        assert found.shape == shape_of(x, N, to, weights, gate).shape


def test_what_is_kept_and_damaged_is_compiled_anew(tmp_path: Path) -> None:
    (source := tmp_path / "native" / "small.cpp").parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }\n')
    said: list[str] = []
    made = op_library((source,), tmp_path / "cache", said.append)
    assert len(said) == 1
    assert op_library((source,), tmp_path / "cache", said.append) == made
    assert len(said) == 1
    (kept,) = (tmp_path / "cache" / "ops").glob("*.so")
    kept.write_bytes(b"damaged")
    assert op_library((source,), tmp_path / "cache", said.append)[:4] == b"\x7fELF"
    assert len(said) == 2


def test_what_the_compiler_refuses_is_one_line(tmp_path: Path) -> None:
    (source := tmp_path / "native" / "small.cpp").parent.mkdir()
    source.write_text("this is no C++\n")
    with pytest.raises(UserError, match=r"failed on small\.cpp: .*error: ") as caught:
        op_library((source,), None, lambda line: None)
    assert "\n" not in str(caught.value)


def test_what_is_no_library_is_one_line(tmp_path: Path) -> None:
    (path := tmp_path / "x.so").write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not load here"):
        load_op_library(path)
