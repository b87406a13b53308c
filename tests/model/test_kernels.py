"""Our CUDA kernels give what plain PyTorch gives, on shapes that fit their blocks and shapes that do not."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from generate.backends import ARTIFACT
from model import kernels
from model.attention import Rows, attend, decode_attention
from model.layers import Linear, RMSNorm
from model.rope import rotate
from model.tracing import tracing

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_no_worse(fused: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, roundings: float = 4) -> None:
    """The kernel is as near to the exact result as plain PyTorch is,
    within a few roundings of the largest number."""
    rounding = torch.finfo(fused.dtype).eps * exact.abs().max()
    assert torch.isfinite(fused).all()
    assert (fused - exact).abs().max() <= 4 * (plain - exact).abs().max() + roundings * rounding


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


@dataclass
class Step:
    """One new token a row, and the cache that it goes into: what `flash_decode` takes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    slots: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def random(
        cls, heads: int, kv_heads: int, head_dim: int, starts: list[int], dtype: torch.dtype, rotary_dim: int = 0
    ) -> "Step":
        torch.manual_seed(0)
        rows = len(starts)
        together = torch.randn(rows, 1, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
        keys = torch.randn(rows + 1, kv_heads, 1500, head_dim, device="cuda", dtype=dtype)
        values = torch.randn_like(keys)
        slots = list(reversed(range(1, rows + 1)))
        for slot, start in zip(slots, starts, strict=True):
            # What is at a row's position and past it was written by others, or never: it must not count.
            keys[slot, :, start:], values[slot, :, start:] = float("nan"), float("nan")
        angles = torch.randn(rows, 1, 1, rotary_dim // 2, device="cuda")
        return cls(
            *together.split([heads, kv_heads, kv_heads], dim=2), keys, values,
            torch.tensor(starts, device="cuda"), torch.tensor(slots, device="cuda"),
            (angles.cos(), angles.sin()) if rotary_dim else None,
        )  # fmt: skip

    def copy(self, dtype: torch.dtype) -> "Step":
        """The same numbers, in a cache of its own."""
        five = [self.query, self.key, self.value, self.keys, self.values]
        return replace(
            self, **{name: x.to(dtype, copy=True) for name, x in zip(list(vars(self))[:5], five, strict=True)}
        )

    def fused(self, *options: Any) -> torch.Tensor:
        cos, sin = self.rotation if self.rotation is not None else (None, None)
        return kernels.flash_decode(
            self.query, self.key, self.value, self.keys, self.values, self.starts, self.slots, cos, sin, *options
        )

    def plain(self, *options: Any) -> torch.Tensor:
        query, key = self.query, self.key
        if self.rotation is not None:
            query, key = rotate(query, *self.rotation), rotate(key, *self.rotation)
        self.keys[self.slots[:, None], :, self.starts[:, None]] = key.to(self.keys.dtype)
        self.values[self.slots[:, None], :, self.starts[:, None]] = self.value
        query = query[:, 0].to(self.keys.dtype)
        return decode_attention(query, self.keys, self.values, self.starts, self.slots, *options)[:, None]

    def exact(self, *options: Any) -> torch.Tensor:
        """In float64, of rotated queries and keys as they are rounded."""
        step = self.copy(self.query.dtype)
        if step.rotation is not None:
            step.query, step.key = rotate(step.query, *step.rotation), rotate(step.key, *step.rotation)
        step.rotation = None
        return step.copy(torch.float64).plain(*options)

    def check(self, scale: float, window: int | None, softcap: float | None) -> None:
        """The kernel's result is attention's, and the cache is what it is to be."""
        options = (scale, window, softcap)
        exact, plain = self.exact(*options), self.copy(self.query.dtype)
        result, fused = plain.plain(*options), self.fused(*options)
        # Capped scores are made out of a number near 1: they are exact to a rounding of the cap.
        assert_no_worse(fused, result, exact, 4 + (softcap or 0.0))
        eps = torch.finfo(self.query.dtype).eps
        torch.testing.assert_close(self.keys, plain.keys, rtol=2 * eps, atol=2 * eps, equal_nan=True)
        torch.testing.assert_close(self.values, plain.values, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (6, 6, 48), (4, 2, 16), (8, 1, 256)])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (17, None), (1, None), (32, None), (None, 30.0), (100, 5.0)]
)
def test_flash_decode_is_attention_over_the_filled_cache(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None, softcap: float | None
) -> None:
    for starts in ([0, 1499, 77], [1498], [31], [32], [128, 256]):
        Step.random(heads, kv_heads, head_dim, starts, dtype).check(head_dim**-0.5, window, softcap)


def test_flash_decode_of_many_rows_needs_no_parts() -> None:
    starts = [(37 * i) % 1500 for i in range(80)]
    Step.random(16, 2, 64, starts, torch.bfloat16, 64).check(0.125, None, None)
    assert kernels.decode_splits(0, 80 * 2) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(8, 2, 64, 64), (4, 4, 48, 48), (6, 1, 80, 32)]
)
@pytest.mark.parametrize("apart", [True, False])
def test_flash_decode_rotates_and_stores(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, apart: bool
) -> None:
    step = Step.random(heads, kv_heads, head_dim, [0, 1499, 7], dtype, rotary_dim)
    if apart:  # as norms of queries and keys leave them
        step.query, step.key = step.query.contiguous(), step.key.contiguous()
    step.check(0.3, None, None)


@pytest.mark.parametrize("window", [None, 50])
def test_a_captured_flash_decode_gives_the_same_at_every_replay(window: int | None) -> None:
    """Whatever ends first; and though the position is made by the very kernel before it."""
    step = Step.random(32, 8, 64, [0, 120, 990], torch.bfloat16, 64)
    step.keys.nan_to_num_()
    step.values.nan_to_num_()
    twin = step.copy(torch.bfloat16)
    twin.starts = step.starts.clone()
    step.fused(0.125, window, None)  # as every step is run before it is captured
    step.starts -= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.starts += 1
        outs = [step.fused(0.125, window, None) for _ in range(4)]
    for _ in range(150):
        for mine, its in zip((step.query, step.key, step.value), (twin.query, twin.key, twin.value), strict=True):
            its.copy_(mine.normal_())
        graph.replay()
        expected = twin.fused(0.125, window, None)
        assert all(torch.equal(out, expected) for out in outs)
        twin.starts += 1
    assert torch.equal(step.keys, twin.keys)
    assert torch.equal(step.values, twin.values)
    twin.starts -= 1
    assert_no_worse(expected, twin.copy(torch.bfloat16).plain(0.125, window, None), twin.exact(0.125, window, None))


def test_a_compiled_step_writes_into_the_cache_without_copying_it(tmp_path: Path) -> None:
    step = Step.random(32, 8, 64, [5, 300], torch.bfloat16, 64)
    assert step.rotation is not None
    keys, values = (torch.randn(3, 8, 40_000, 64, device="cuda").bfloat16() for _ in range(2))
    small = replace(step, keys=keys[:, :, :1500].clone(), values=values[:, :, :1500].clone())
    inputs = [step.query, step.key, step.value, keys, values, step.starts, step.slots, *step.rotation]

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        starts: torch.Tensor, slots: torch.Tensor, *rotation: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        rows = Rows(starts + 0, slots, 40_000)
        return attend(q * 2, k, v, keys, values, rows, rotation, 0.125, None, None) + 1  # type: ignore[arg-type]

    ARTIFACT.compile(function, inputs, {}, 8, tmp_path / "step", "c++")
    program = ARTIFACT.load(tmp_path / "step", torch.device("cuda"))
    small.query = small.query * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = program(inputs)
    assert torch.cuda.max_memory_allocated() - before < keys.nbytes / 2
    torch.testing.assert_close(out, small.fused(0.125, None, None) + 1)
    assert torch.equal(keys[:, :, :1500], small.keys)
    assert torch.equal(values[:, :, :1500], small.values)
