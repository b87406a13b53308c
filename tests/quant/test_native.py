"""Products with quantized weights in native code: what they compute, and how the code is made, kept and refused."""

import ctypes
import itertools
import platform
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.native import load_op_library, op_library
from quant import experts, native, ops

KINDS = ("int8", "int4", "int2", "int1", "fp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 100, 288, 4096 + 32)
GROUPS = {
    "int8": (0, 32, 64, 20),
    "int4": (0, 32, 64, 96, 128, 256),
    "int2": (0, 32, 96),
    "int1": (0, 64),
    "fp8": (0, 32, 20),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with the library in it. The compiler takes seconds, and so is asked once."""
    path = tmp_path_factory.mktemp("cache")
    native._find_or_compile(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def library(cache: Path) -> Iterator[None]:
    """What is under test is what was made here, not what another run has kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHCHAT_CACHE_DIR", str(cache))
        patch.setattr(native, "_library", None)
        patch.setattr(native, "_why_not", None)
        assert native.available(), native.why_not()
        assert native.why_not() is None
        yield


@dataclass
class Weight:
    """A random weight as stored, and what it stands for, in float64."""

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    K: int
    bits: int
    group_size: int
    numbers: Tensor
    of_groups: Tensor

    @property
    def exact(self) -> Tensor:
        scale, zero = self.scale.double(), 0 if self.zero is None else self.zero.double()[:, self.of_groups]
        return (self.numbers.double() - zero) * scale[:, self.of_groups]

    @property
    def greatest(self) -> Tensor:
        """The most that takes part in computing each number."""
        zero = 0 if self.zero is None else self.zero.double().abs()[:, self.of_groups]
        return (self.numbers.double().abs() + zero + 2 ** (self.bits - 1)) * self.scale.double()[:, self.of_groups]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return native.linear(x, self.values, self.scale, self.zero, bias, self.K, self.bits, self.group_size)

    def dequantize(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return native.dequantize(
            self.values, self.scale, self.zero, self.K, self.bits, self.group_size, dtype, start, stop
        )


def stored(numbers: Tensor, bits: int) -> Tensor:
    """Bit by bit as `quant.packed` describes it: 32 neighbours in `bits` words of 32 bits."""
    rows = []
    for row in numbers.tolist():
        words = [0] * (-(-len(row) // 32) * bits)
        for k in range(len(words) // bits * 32):
            code = (row[k] if k < len(row) else 0) + (1 << (bits - 1))
            words[k // 32 * bits + k % bits] |= code << (k % 32 // bits * bits)
        rows.append(list(b"".join(word.to_bytes(4, "little") for word in words)))
    return torch.tensor(rows, dtype=torch.uint8)


def make(
    kind: str, N: int, K: int, group_size: int, dtype: torch.dtype, zero: str | None = None, seed: int = 0
) -> Weight:
    random = torch.Generator().manual_seed(seed)
    bits = 8 if kind == "fp8" else int(kind[3:])
    groups = -(-K // group_size) if group_size else 1
    scale = (torch.rand(N, groups, generator=random) / 50 + 0.01).to(dtype)
    zeros = torch.randn(N, groups, generator=random) * 2
    its_zero = None if zero is None else zeros.to(torch.int8) if zero == "int8" else zeros.to(dtype)
    if kind == "fp8":
        numbers = torch.randn(N, K, generator=random).to(torch.float8_e4m3fn)
    else:
        numbers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), generator=random).to(torch.int8)
    values = stored(numbers, bits) if bits < 8 else numbers
    return Weight(values, scale, its_zero, K, bits, group_size, numbers, torch.arange(K) // (group_size or K))


def cases(kind: str, dtype: torch.dtype) -> Iterator[tuple[Weight, Tensor, Tensor]]:
    """Weights, inputs and biases of all sorts."""
    zeros = (None,) if kind == "fp8" else (None, "int8", "same")
    random = torch.Generator().manual_seed(1)
    rows = itertools.cycle((1, 2, 3, 7, 17))
    for K, group_size, zero in itertools.product(WIDTHS, GROUPS[kind], zeros):
        N, M = 3 + K % 5, next(rows)
        scales = torch.bfloat16 if M == 2 else dtype  # they need not be of one dtype
        x = torch.randn(M, K, generator=random).to(dtype)
        yield make(kind, N, K, group_size, scales, zero, seed=K), x, torch.randn(N, generator=random).to(dtype)


# ---- What is computed. ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_exact_one_within_rounding(kind: str, dtype: torch.dtype) -> None:
    # A run of 32 numbers of 16 bits shares a scale: they are off by 2**-16 of the greatest at most.
    of_x = 1e-6 if dtype == torch.float32 else 2.0**-16
    for weight, x, bias in cases(kind, dtype):
        wide = x.double()
        greatest = torch.nn.functional.pad(wide.abs(), (0, -weight.K % 32)).unflatten(1, (-1, 32)).amax(2)
        greatest = greatest.repeat_interleave(32, dim=1)[:, : weight.K]
        bound = of_x * greatest @ weight.exact.abs().T + 1e-6 * wide.abs() @ weight.greatest.T
        for its_bias in (bias, None):
            exact = wide @ weight.exact.T + (0 if its_bias is None else its_bias.double())
            y = weight.linear(x, its_bias)
            assert y.dtype == dtype
            assert y.shape == exact.shape
            error = (y.double() - exact).abs()
            assert (error <= bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + 1e-7).all(), weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company_and_with_any_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    weight = make(kind, 301, 288 + 20, 32, dtype, None if kind == "fp8" else "same")
    check_company(weight, dtype)


def check_company(weight: Weight, dtype: torch.dtype) -> None:
    x = torch.randn(17, weight.K, generator=torch.Generator().manual_seed(2)).to(dtype)
    alone = torch.cat([weight.linear(row) for row in x[:, None]])
    threads = torch.get_num_threads()
    try:
        for number, rows in itertools.product((1, 2, 5), (1, 2, 3, 4, 7, 17)):
            torch.set_num_threads(number)
            assert weight.linear(x[:rows].contiguous()).equal(alone[:rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "int1"])
def test_products_of_integers_are_exact(kind: str) -> None:
    """As those of inputs quantized to 8 bits are."""
    weight = make(kind, 9, 416, 0, torch.float32)
    weight.scale.fill_(1)
    x = torch.randint(-128, 128, (5, weight.K), generator=torch.Generator().manual_seed(3)).to(torch.float16)
    assert weight.linear(x).equal((x.double() @ weight.numbers.double().T).to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_weight_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    for weight, _, _ in cases(kind, torch.bfloat16):
        N = len(weight.values)
        scaled = weight.numbers.float()
        if weight.zero is not None:
            scaled = scaled - weight.zero.float()[:, weight.of_groups]
        expected = (scaled * weight.scale.float()[:, weight.of_groups]).to(dtype)
        for start, stop in ((0, N), (1, N - 1), (2, 3), (1, 1)):
            assert weight.dequantize(dtype, start, stop).equal(expected[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_is_not_hidden(kind: str, dtype: torch.dtype, wrong: float) -> None:
    weight = make(kind, 4, 128, 32, dtype)
    x = torch.zeros(2, 128, dtype=dtype)
    x[1, 77] = wrong
    y = weight.linear(x)
    assert not y[0].any()
    expected = (x[1:].double() @ weight.exact.T)[0]
    assert not y[1][~expected.isfinite()].isfinite().any()


def test_the_smallest_and_the_largest_inputs() -> None:
    """Sums of numbers near the ends of a dtype's range, each run of 32 with another magnitude."""
    weight = make("int4", 5, 256, 32, torch.float32)
    for magnitude in (1e-30, 1e-10, 1e10, 1e30):
        x = torch.randn(1, 256, generator=torch.Generator().manual_seed(4)) * magnitude
        x *= torch.logspace(-4, 4, 8).repeat_interleave(32)
        half = x.to(torch.bfloat16)
        exact = half.double() @ weight.exact.T
        assert ((weight.linear(half).double() - exact).abs() <= 2**-8 * exact.abs().max()).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="knows the names of libraries on Linux alone")
def test_the_threads_are_pytorchs_own(cache: Path) -> None:
    """Of the OpenMP runtimes in the process (other packages bring theirs) our code calls the one that PyTorch does."""
    libraries = [next((cache / "native").glob("*.so")), Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"]
    ours, pytorchs = (ctypes.CDLL(str(path)).omp_get_max_threads for path in libraries)
    assert ctypes.cast(ours, ctypes.c_void_p).value == ctypes.cast(pytorchs, ctypes.c_void_p).value


# ---- How the code is made and kept. ----


@pytest.fixture
def compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the compiler: what it makes is the library made before. Says in a file beside it how often it ran."""
    made = next((cache / "native").glob("*.so"))
    path = tmp_path / "compiler"
    script = f'echo once >> "{path}.ran"\nwhile [ "$1" != -o ]; do shift; done\ncp "{made}" "$2"\n'
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def times(compiler: Path) -> int:
    ran = Path(f"{compiler}.ran")
    return len(ran.read_text().splitlines()) if ran.exists() else 0


def test_what_was_made_is_kept_and_made_again_when_damaged(compiler: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    native._find_or_compile(kept)
    native._find_or_compile(kept)
    assert times(compiler) == 1
    (file,) = (kept / "native").glob("*.so")
    data = file.read_bytes()
    for damaged in (data[:-1], data[:5000] + b"?" + data[5001:], b""):
        file.unlink()  # what is loaded stays as it was
        file.write_bytes(damaged)
        native._find_or_compile(kept)
        assert file.read_bytes() == data
    assert times(compiler) == 4
    file.with_suffix(".sha256").unlink()
    native._find_or_compile(kept)
    assert times(compiler) == 5


def test_other_sources_flags_and_processors_are_other_code(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    native._find_or_compile(kept)
    other = tmp_path / "other.h"
    other.write_text("//")
    for name, value in (("SOURCES", (*native.SOURCES, other)), ("FLAGS", ("-O1",)), ("cpu_flags", lambda: "more")):
        monkeypatch.setattr(native, name, value)
        before = times(compiler)
        native._find_or_compile(kept)
        assert times(compiler) == before + 1, name


def test_many_may_make_it_at_once(compiler: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with ThreadPoolExecutor(4) as pool:
        for library in pool.map(native._find_or_compile, [kept] * 4):
            native._check(library)
    before = times(compiler)
    native._find_or_compile(kept)
    assert times(compiler) == before


def test_without_a_place_to_keep_it_it_is_made_all_the_same(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    native._find_or_compile(None)
    assert capsys.readouterr().err == ""
    (tmp_path / "native").write_text("a file, where a directory should be")
    native._find_or_compile(tmp_path)
    assert "native code is not kept: " in capsys.readouterr().err
    assert not list(scratch.iterdir())


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has loaded nothing, and a cache with nothing in it."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_why_not", None)
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "empty"))


def test_without_a_compiler_there_is_a_reason(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.available()
    assert native.why_not() == "CXX names no-such-compiler, which is not there"
    monkeypatch.delenv("CXX")
    assert not native.available()  # it is asked once


def test_a_compiler_that_fails_is_the_reason(
    afresh: None, compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler.write_text('#!/bin/sh\necho "a.cpp: note" >&2\necho "a.cpp:1: error: no" >&2\nexit 1\n')
    monkeypatch.setenv("TORCHCHAT_DEBUG", "1")
    assert native.why_not() == f"{compiler} failed: a.cpp:1: error: no"
    assert capsys.readouterr().err.count("a.cpp: note") == len(native.CHOICES)


def test_code_that_computes_something_else_is_not_used(
    afresh: None, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "plain_dequantize", lambda values, *rest: torch.ones(5, 300))
    assert not native.available()
    assert "computes something else than PyTorch" in str(native.why_not())


def test_it_is_loaded_once_for_all_threads(afresh: None, compiler: Path) -> None:
    barrier = threading.Barrier(8)

    def ask(_: int) -> bool:
        barrier.wait()
        return native.available()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert times(compiler) == 1


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="code for other processors")
AVX2 = pytest.mark.skipif(not native.INSTRUCTIONS["AVX2"] <= set(native.cpu_flags().split()), reason="no AVX2 here")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="any processor, no OpenMP"),
        pytest.param(("-march=x86-64", "-fopenmp"), id="any processor", marks=X86),
        pytest.param(("-march=haswell", "-fopenmp"), id="AVX2", marks=AVX2),
    ],
)
def test_the_code_for_other_processors(flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no AVX-512, no AVX2 or no OpenMP keeps the same laws: compiled for itself, seconds."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "CHOICES", (flags,))
    monkeypatch.setattr(native, "_library", native._find_or_compile(tmp_path))
    for kind, dtype in itertools.product(KINDS, DTYPES):
        test_a_product_is_the_exact_one_within_rounding(kind, dtype)
        test_rows_of_the_weight_are_rounded_once(kind, dtype)
        test_a_row_is_the_same_in_any_company_and_with_any_number_of_threads(kind, dtype)
        for wrong in (float("nan"), float("inf")):
            test_what_is_not_finite_is_not_hidden(kind, dtype, wrong)
    for kind in KINDS[:4]:
        test_products_of_integers_are_exact(kind)
    test_the_smallest_and_the_largest_inputs()
    check_company(make("int8", 2000, 300, 0, torch.float32), torch.float32)  # large enough for several threads


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fma f16c avx2 avx512f avx512bw avx512dq avx512vl", "AVX-512"),
        ("fma f16c avx2 avx512f", "AVX2"),
        ("avx2", "C++"),
        ("asimd", "C++"),
    ],
)
def test_the_code_has_the_name_of_its_instructions(flags: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cxx_compiler", lambda: "any")
    monkeypatch.setattr(native, "cpu_flags", lambda: flags)
    assert native.code_name() == name


def test_the_ops_in_cpp_give_the_same_bits(warm: Path, tmp_path: Path) -> None:
    """For programs without Python: few rows, and many that are multiplied by panels; and experts, with their inputs
    quantized or not.
    """
    (path := tmp_path / "quantized.so").write_bytes(op_library(native.OP_SOURCES, warm, lambda _: None, native.CHOICES))
    load_op_library(path)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("torchchat::quantized_linear", "CPU")
    for kind, dtype, rows in itertools.product(KINDS, DTYPES, (1, ops.NATIVE_ROWS, ops.NATIVE_ROWS + 1, 70)):
        weight = make(kind, 200, 288, 32, torch.float32)
        x, bias = torch.randn(rows, weight.K).to(dtype), torch.randn(200).to(dtype)
        for its_bias in (None, bias):
            numbers = (weight.values, weight.scale, weight.zero, its_bias, weight.K, weight.bits, weight.group_size)
            expected = ops.quantized_linear(x, *numbers)
            assert torch.equal(torch.ops.torchchat.quantized_linear(x, *numbers), expected), (kind, dtype, rows)
    kinds, tokens = (None, "fp8", "int8-symmetric", "int8"), (1, 3, 40)
    for kind, dtype, activation, count in itertools.product(KINDS, DTYPES, kinds, tokens):
        weight = make(kind, 4 * 32, 64, 32, torch.float32)
        to = torch.stack([torch.randperm(4)[:2] for _ in range(count)])
        numbers = (weight.values, weight.scale, weight.zero, to)
        how = (weight.bits, weight.group_size, activation)
        up, down = torch.randn(count, 1, 64).to(dtype), torch.randn(count, 2, 64).to(dtype)
        weights = torch.rand(count, 2)
        for inputs in ((up, *numbers, None, 4, "silu", *how), (down, *numbers, weights, 4, None, *how)):
            expected = experts.quantized_experts(*inputs)
            assert torch.equal(torch.ops.torchchat.quantized_experts(*inputs), expected), (kind, dtype, activation)
