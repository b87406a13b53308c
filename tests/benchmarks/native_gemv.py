"""The CPU's product of one row with a quantized weight: bytes of weight a second, beside what plain reading reaches.

Each weight is there in so many copies, used in turn, that no cache holds them. Reading the same memory (the largest of
its words) and the product are timed in turn, so that what disturbs one disturbs the other; the best of the repeats
counts. `torch.mv` with the weight in bf16 is what there is without quantization. The last line on stdout is a JSON
document.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from model.device import TORCH_DTYPES, device_name
from quant import native
from quant.formats import Format

SHAPES = "16384x2048,2048x8192,3072x2048,128256x2048,4096x14336,28672x4096"
FORMATS = "int8,int8:32,int4:32,int4:128,int2:32,int1:32,fp8"
CALLS = 10_000


def shape(text: str) -> tuple[int, int]:
    N, _, K = text.partition("x")
    return int(N), int(K)


def format_of(text: str) -> Format:
    """ "int4:32" is 4 bits with a scale for 32 numbers, "int8" 8 bits with one for a row; "fp8" too."""
    kind, _, group_size = text.partition(":")
    if kind == "fp8":
        return Format("fp8", 8, int(group_size or 0), False)
    return Format("int", int(kind.removeprefix("int")), int(group_size or 0), False)


def weight(N: int, K: int, its_format: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers as stored, and their scales."""
    values = torch.randint(0, 120, (N, its_format.padded_width(K) * its_format.bits // 8), dtype=torch.uint8)
    groups = -(-K // its_format.group_size) if its_format.group_size else 1
    if its_format.bits == 8:
        values = values.view(torch.float8_e4m3fn if its_format.kind == "fp8" else torch.int8)
    return values, torch.rand(N, groups).to(dtype)


def best_seconds(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """The best time of each, run in turn `repeats` times after once for warm-up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, its_times in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            its_times.append(time.perf_counter() - began)
    return [min(its_times[1:]) for its_times in times]


def compare(N: int, K: int, its_format: Format, name: str, args: argparse.Namespace) -> dict[str, Any]:
    dtype = TORCH_DTYPES[args.dtype]
    x = torch.randn(args.rows, K).to(dtype)
    weights = [weight(N, K, its_format, dtype)]
    size = sum(tensor.nbytes for tensor in weights[0])
    weights += [weight(N, K, its_format, dtype) for _ in range(int(args.megabytes * 1e6) // size)]

    def read() -> None:
        for values, _ in weights:
            values.view(torch.int32).amax()

    def multiply() -> None:
        for values, scale in weights:
            native.linear(x, values, scale, None, None, K, its_format.bits, its_format.group_size)

    read_s, multiply_s = best_seconds([read, multiply], args.repeats)
    read_gb_s = len(weights) * weights[0][0].nbytes / read_s / 1e9
    gb_s, us = len(weights) * size / multiply_s / 1e9, 1e6 * multiply_s / len(weights)
    print(f"{N:>7} x {K:<6}{name:<9}{gb_s:>6.1f} GB/s{us:>9.0f} us{read_gb_s:>12.1f} GB/s read", flush=True)
    return {"N": N, "K": K, "format": name, "bytes": size, "gb_s": gb_s, "us": us, "read_gb_s": read_gb_s}


def plain(N: int, K: int, args: argparse.Namespace) -> dict[str, Any]:
    """`torch.mv`, the weight not quantized."""
    x = torch.randn(K).to(torch.bfloat16)
    weights = [torch.randn(N, K).to(torch.bfloat16)]
    weights += [weights[0].clone() for _ in range(int(args.megabytes * 1e6) // weights[0].nbytes)]
    (seconds,) = best_seconds([lambda: [torch.mv(each, x) for each in weights]], args.repeats)
    gb_s, us = len(weights) * weights[0].nbytes / seconds / 1e9, 1e6 * seconds / len(weights)
    print(f"{N:>7} x {K:<6}{'bf16':<9}{gb_s:>6.1f} GB/s{us:>9.0f} us{'':>4}torch.mv", flush=True)
    return {"N": N, "K": K, "format": "bf16", "bytes": weights[0].nbytes, "gb_s": gb_s, "us": us}


def call_seconds() -> float:
    """What a call costs besides the work: one with next to none."""
    values, scale = weight(1, 32, format_of("int8"), torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)

    def calls() -> None:
        for _ in range(CALLS):
            native.linear(x, values, scale, None, None, 32, 8, 0)

    return best_seconds([calls], 3)[0] / CALLS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, metavar="NxK,…", help="default: %(default)s")
    parser.add_argument("--formats", default=FORMATS, metavar="FORMAT[:GROUP],…", help="default: %(default)s")
    parser.add_argument("--dtype", default="bf16", choices=tuple(TORCH_DTYPES), help="of x and the scales")
    parser.add_argument("--rows", type=int, default=1, help="rows of x (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=1000, help="of copies together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    if why := native.why_not():
        print(f"error: there is no native code here: {why}", file=sys.stderr)
        return 2
    call_us = 1e6 * call_seconds()
    print(f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; a call costs {call_us:.1f} us")
    rows = []
    for N, K in map(shape, args.shapes.split(",")):
        rows += [compare(N, K, format_of(name), name, args) for name in args.formats.split(",")]
        if args.rows == 1:
            rows.append(plain(N, K, args))
    document = {
        "machine": {"name": device_name(torch.device("cpu")), "threads": torch.get_num_threads()},
        "settings": {key: getattr(args, key) for key in ("dtype", "rows", "megabytes", "repeats")},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "call_us": call_us,
        "products": rows,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
