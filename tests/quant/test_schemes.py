"""Each scheme's torchao config gives numbers of the format that the table promises, near to the weight; and where a
scheme runs is said before anything is read.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from config.errors import UserError
from quant.schemes import KERNELS, PLACES, REFUSED, SCHEMES, Arguments, check, level, place_of, quiet_torchao

ROOT = Path(__file__).parent.parent.parent

# Of a normal weight in groups of 32: the largest relative error of the whole matrix.
ERRORS = {8: 0.01, 7: 0.02, 6: 0.04, 5: 0.07, 4: 0.13, 3: 0.25, 2: 0.5, 1: 1.0}


def arguments():
    """Each scheme with each number of bits, with groups and without."""
    for key, scheme in SCHEMES.items():
        sizes = [0] if scheme.groups is None else [32] if scheme.groups.whole_row is None else [0, 32]
        for bits, size in itertools.product(scheme.bits, sizes):
            zeros = [False, True] if scheme.has_weight_zeros is None else [scheme.has_weight_zeros and bits < 8]
            for zero in zeros:
                yield pytest.param(key, Arguments(bits, size, zero), id=f"{key}-{bits}-{size}-{zero}")


def quantized(key, args, dtype=torch.bfloat16, width=96):
    """What torchao makes of a weight [40, width], and the weight."""
    config = SCHEMES[key].torchao_config(args)
    linear = nn.Linear(width, 40, bias=False, dtype=dtype)
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with quiet_torchao():
        from torchao.quantization import quantize_
    quantize_(linear, config)
    return linear.weight, weight


@pytest.mark.parametrize(("key", "args"), [*arguments()])
def test_torchao_gives_plain_numbers_of_the_promised_format(key, args):
    tensor, weight = quantized(key, args)
    stored = SCHEMES[key].format(args)
    N, K = weight.shape
    assert type(tensor).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
    assert tensor.qdata.shape == (N, K)
    assert tensor.qdata.dtype == (torch.float8_e4m3fn if stored.kind == "fp8" else torch.int8)
    assert tensor.scale.shape == (N, stored.groups(K))
    if stored.kind == "int":
        numbers, zeros = tensor.qdata.int(), tensor.zero_point.int()
        assert -(1 << (args.bits - 1)) <= numbers.min()
        assert numbers.max() <= (1 << (args.bits - 1)) - 1
        assert stored.has_zero or not zeros.any()
        # The formula of Format, with what the tensor holds.
        groups = (numbers.unflatten(1, (stored.groups(K), -1)) - zeros.view(N, -1, 1)) * tensor.scale.view(N, -1, 1)
        assert torch.allclose(groups.flatten(1).to(weight.dtype), tensor.dequantize(), rtol=0.02, atol=1e-3)
    error = (tensor.dequantize().float() - weight.float()).norm() / weight.float().norm()
    loose = 1.6 if stored.group_size == 0 and args.bits < 8 else 5 if stored.kind == "fp8" else 1
    assert error < ERRORS[args.bits] * loose


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("key", SCHEMES)
def test_every_dtype(key, dtype):
    scheme = SCHEMES[key]
    bits = scheme.default_bits or scheme.bits[0]
    tensor, weight = quantized(key, Arguments(bits, 32 if scheme.groups else 0, scheme.has_weight_zeros is True), dtype)
    assert tensor.dequantize().dtype == dtype
    assert (tensor.dequantize() - weight).norm() / weight.norm() < ERRORS[4]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_and_a_linear_layer_get_the_same_numbers(bits):
    """Else a tied pair of them could not share one copy."""
    key = {8: "linear:int8", 4: "linear:int4"}[bits]
    args = Arguments(bits, 32, SCHEMES[key].format(Arguments(bits, 32)).has_zero)
    linear, table = quantized(key, args)[0], quantized("embedding", args)[0]
    assert torch.equal(linear.qdata, table.qdata)
    assert torch.equal(linear.scale, table.scale)


def test_quantizing_leaves_the_compilers_settings_alone():
    from torch._inductor import config

    before = config.save_config_portable()
    for key in SCHEMES:
        scheme = SCHEMES[key]
        quantized(key, Arguments(scheme.default_bits or scheme.bits[0], 32 if scheme.groups else 0))
    assert config.save_config_portable() == before


def test_torchao_is_imported_in_silence_and_only_for_its_configs():
    script = """
import logging, sys, warnings
from quant.schemes import SCHEMES, Arguments
assert not {"torch", "torchao"} & set(sys.modules)
SCHEMES["linear:int8"].torchao_config(Arguments(8, 0))
assert "torchao" in sys.modules
assert logging.getLogger("torchao").level == logging.NOTSET
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=480)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_torchao_a_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"quantizing needs torchao 0\.18"):
        SCHEMES["linear:int8"].torchao_config(Arguments(8, 0))


# ---- Where they run ----


@pytest.mark.parametrize(
    ("device", "capability", "place"),
    [
        ("cpu", None, "cpu"), ("mps", None, "mps"), ("cuda", None, "cuda"), ("cuda", (9, 0), "cuda"),
        ("cuda", (8, 9), "cuda"), ("cuda", (8, 6), "cuda-sm80"), ("cuda", (7, 5), "cuda-old"),
        ("cuda", (12, 0), "cuda"),
    ],
)  # fmt: skip
def test_places(device, capability, place):
    assert place_of(device, capability) == place
    assert place in PLACES
    assert place in KERNELS


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("key", "place"), [*itertools.product(SCHEMES, PLACES)])
def test_what_is_refused_names_one_that_runs_there(key, place, compiled):
    refusal = REFUSED.get((key, place))
    if refusal is None or (refusal.compiled and not compiled):
        check(key, place, compiled, "--quantize")
        return
    with pytest.raises(UserError) as error:
        check(key, place, compiled, "--quantize")
    line = str(error.value)
    assert line.startswith(f'--quantize: "{key}" cannot run here: ')
    nearest = line.partition("nearest that can is ")[2].split('"')[1]
    assert SCHEMES[nearest].target == SCHEMES[key].target
    check(nearest, place, compiled, "--quantize")


def test_only_float8_is_refused_anywhere():
    assert {key for key, _ in REFUSED} == {"linear:fp8", "linear:fp8dq"}
    assert not any(place == "cpu" for _, place in REFUSED)


@pytest.mark.parametrize(
    ("key", "bits", "place", "expected"),
    [
        ("linear:int8", 8, "cpu", "fast"), ("linear:int4", 4, "cuda", "fast"), ("linear:a8wxdq", 2, "cpu", "fast"),
        ("linear:a8wxdq", 2, "cuda", "runs"), ("linear:fp8", 8, "cuda-sm80", "runs"), ("embedding", 8, "cpu", "runs"),
        ("linear:int8", 8, "mps", "runs"),
    ],
)  # fmt: skip
def test_which_have_a_kernel(key, bits, place, expected):
    assert level(key, SCHEMES[key].format(Arguments(bits, 0)), place) == expected
