"""Products with quantized weights on the CPU, by code that the C++ compiler of this machine makes of `quant/native/` at
first use and that is kept. Knows the storage of `quant.packed`; where there is no compiler it says so, and the caller
uses plain PyTorch.
"""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config.cache import cache_dir, is_whole, keep
from config.compiler import cpu_flags, cxx_compiler
from quant.packed import dequantize as plain_dequantize
from quant.packed import pack

SOURCES = tuple(
    Path(__file__).parent / "native" / name
    for name in ("kernels.cpp", "kernels.h", "blocks.h", "avx512.h", "avx512_formats.h", "avx2.h")
)
"""The first is compiled, and includes the others."""
OP_SOURCES = (
    Path(__file__).parent / "native" / "op.cpp",
    *(Path(__file__).parent.parent / "model" / "native" / name for name in ("register.h", "experts.h", "products.h")),
    *SOURCES,
)
"""The same, and the op that calls it, for programs without Python (`model.native.op_library`)."""
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread")
CHOICES = tuple(
    (*target, *threads)
    for threads in (("-fopenmp",), ())
    for target in (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
)
"""Further flags, the best first: not every compiler has every one. OpenMP is what PyTorch's own threads are from."""
KEPT_LIBRARIES = 4
COMPILE_TIMEOUT_S = 300
CODES = {
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.int8: 4,
    torch.uint8: 4,  # integers of fewer bits
    torch.float8_e4m3fn: 5,
}
"""`Dtype` in kernels.h."""

INSTRUCTIONS = {"AVX-512": {"avx512bw", "avx512dq", "avx512vl"}, "AVX2": {"avx2", "fma", "f16c"}}
"""What kernels.cpp has code of its own for, the best first, and the flags of processors (`cpu_flags`) that have it."""

_Function = Callable[..., None]


class _Unusable(Exception):
    """Why there is no native code; told to a person."""


@dataclass(frozen=True)
class _Library:
    """The functions of a loaded library, which take addresses, called with tensors."""

    of_linear: _Function
    of_dequantize: _Function

    def linear(
        self, x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, K: int, bits: int,
        group_size: int,
    ) -> Tensor:  # fmt: skip
        M, N = x.shape[0], values.shape[0]
        assert x.shape[1] == K
        assert x.is_contiguous()
        out = torch.empty(M, N, dtype=x.dtype)
        self.of_linear(
            x.data_ptr(), values.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(),
            0 if bias is None else bias.data_ptr(), out.data_ptr(), M, N, K, group_size, bits, CODES[values.dtype],
            CODES[x.dtype], CODES[scale.dtype], 0 if zero is None else CODES[zero.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def dequantize(
        self, values: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group_size: int,
        dtype: torch.dtype, start: int, stop: int,
    ) -> Tensor:  # fmt: skip
        assert 0 <= start <= stop <= values.shape[0]
        out = torch.empty(stop - start, K, dtype=dtype)
        self.of_dequantize(
            values.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(), out.data_ptr(), start, stop,
            values.shape[0], K, group_size, bits, CODES[values.dtype], CODES[scale.dtype],
            0 if zero is None else CODES[zero.dtype], CODES[dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out


_library: _Library | None = None
_why_not: str | None = None
_lock = threading.Lock()


def available(say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether `linear` and `dequantize` can be called. The first call compiles, which `say` is told of, or loads what
    was compiled before.
    """
    return _library is not None or _load(say) is not None


def code_name() -> str | None:
    """What the code is called where there is a compiler for it, None where there is none. Compiles nothing."""
    try:
        cxx_compiler()
    except FileNotFoundError:
        return None
    flags = set(cpu_flags().split())
    return next((name for name, needed in INSTRUCTIONS.items() if needed <= flags), "C++")


def use(path: Path) -> None:
    """Use a library that was compiled before, of `OP_SOURCES` or `SOURCES`, unless one is in use. What does not load or
    work here is left, and compiled when it is needed.
    """
    global _library
    with _lock, contextlib.suppress(OSError, _Unusable):
        _library = _library or _checked(path)


def why_not() -> str | None:
    """Why they cannot be called: one line. None if they can."""
    return None if available() else _why_not


def linear(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, K: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """x [M, K] @ weight.T + bias, [M, N] in x's dtype, summed in float32; all tensors contiguous and on the CPU.

    A row's result is the same whatever rows stand beside it and however many threads there are. Each sum of products
    with x of 16 bits is as exact as numbers of 16 bits that share a scale with the 31 others of their group of 32.
    """
    return (_library or _need()).linear(x, values, scale, zero, bias, K, bits, group_size)


def dequantize(
    values: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group_size: int, dtype: torch.dtype,
    start: int, stop: int,
) -> Tensor:  # fmt: skip
    """Rows [start, stop) of the weight: [stop - start, K] in `dtype`, each number rounded once."""
    return (_library or _need()).dequantize(values, scale, zero, K, bits, group_size, dtype, start, stop)


def _need() -> _Library:
    library = _load()
    assert library is not None, _why_not
    return library


def _load(say: Callable[[str], None] = lambda line: None) -> _Library | None:
    """The library, once a process: found, or compiled, and checked."""
    global _library, _why_not
    with _lock:
        if _library is None and _why_not is None:
            try:
                _library = _find_or_compile(cache_dir(), say)
            except (_Unusable, OSError) as error:
                _why_not = str(error)
    return _library


def _find_or_compile(cache: Path | None, say: Callable[[str], None] = lambda line: None) -> _Library:
    """Raises _Unusable, or an OSError of the system's."""
    compiler = cxx_compiler()
    digest = hashlib.sha256(repr((compiler, cpu_flags(), FLAGS, CHOICES)).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    kept = None if cache is None else cache / "native" / f"{digest.hexdigest()}.so"
    if kept is not None and (library := _load_kept(kept)) is not None:
        return library
    say("compiling the products of quantized weights for this processor, once: some seconds")
    with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
        made = Path(directory) / "kernels.so"
        _compile(compiler, made)
        library = _checked(made)  # what is in memory stays there when the file goes
        if kept is not None:
            try:
                keep(made.read_bytes(), kept, KEPT_LIBRARIES)
            except OSError as error:
                print(f"native code is not kept: {kept.parent}: {error.strerror}", file=sys.stderr)
    return library


def _load_kept(path: Path) -> _Library | None:
    """None if it is missing, damaged, or does not load or work here."""
    try:
        if not is_whole(path):
            return None
        library = _checked(path)
        os.utime(path)
    except (OSError, _Unusable):
        return None
    return library


def _compile(compiler: str, made: Path) -> None:
    """Raises _Unusable."""
    debug = os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0")
    why = ""
    for choice in CHOICES:
        command = [compiler, *FLAGS, *choice, "-o", str(made), str(SOURCES[0])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise _Unusable(f"{compiler} took more than {COMPILE_TIMEOUT_S} s") from error
        if debug:
            print(" ".join(command), done.stderr, sep="\n", file=sys.stderr)
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
    raise _Unusable(f"{compiler} failed: {why}")


def _checked(path: Path) -> _Library:
    """The library in a file. Raises OSError if it does not load, _Unusable if it does not compute what PyTorch does."""
    loaded = ctypes.CDLL(str(path))
    pointer, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    linear, dequantize = loaded.torchchat_linear, loaded.torchchat_dequantize
    linear.argtypes = [pointer] * 6 + [size] * 4 + [code] * 6
    dequantize.argtypes = [pointer] * 4 + [size] * 5 + [code] * 6
    linear.restype = dequantize.restype = None
    library = _Library(linear, dequantize)
    _check(library)
    return library


def _check(library: _Library) -> None:
    """Raises _Unusable if products of any format are not PyTorch's, or not those of each row of x alone."""
    K, M, N, group_size = 300, 3, 5, 64
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(N, -(-K // group_size), generator=random) + 0.5
    zero = torch.randint(-1, 2, scale.shape, generator=random, dtype=torch.int8)
    for bits, kind in ((8, torch.int8), (4, torch.uint8), (2, torch.uint8), (1, torch.uint8), (8, torch.float8_e4m3fn)):
        half = 1 << (bits - 1)
        numbers = torch.randint(-half, half, (N, K), generator=random, dtype=torch.int8)
        values = pack(numbers, bits) if bits < 8 else numbers.to(kind)
        its_zero = None if kind.is_floating_point else zero
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(M, K, generator=random).to(dtype)
            weight = plain_dequantize(values, scale, its_zero, K, bits, group_size, torch.float32)
            y = library.linear(x, values, scale, its_zero, None, K, bits, group_size)
            alone = [library.linear(row, values, scale, its_zero, None, K, bits, group_size) for row in x[:, None]]
            again = library.dequantize(values, scale, its_zero, K, bits, group_size, torch.float32, 0, N)
            error = (y.float() - F.linear(x.float(), weight)).norm() / y.float().norm()
            if not (error < torch.finfo(dtype).eps + 1e-5 and torch.equal(y, torch.cat(alone)) and again.equal(weight)):
                raise _Unusable(f"what the compiler made computes something else than PyTorch ({bits} bits, {dtype})")
