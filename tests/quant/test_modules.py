"""A quantized layer gives what its weight, taken out of its numbers, gives: in every format, dtype and number of rows,
run or traced, with our kernels and without; and what torchao's own layer gives."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Embedding, Linear, RMSNorm
from model.tracing import tracing
from quant import activations, native
from quant.convert import Quantizer
from quant.formats import Format
from quant.modules import QuantizedEmbedding, QuantizedLinear, QuantizedRows
from quant.packed import dequantize, pack, unpack
from quant.schemes import SCHEMES, Arguments, quiet_torchao

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [
    Format("int", 8, 0, False),
    Format("int", 8, 64, True),
    Format("int", 4, 0, False),
    Format("int", 4, 32, False),
    Format("int", 4, 96, True),
    Format("int", 4, 256, False),
    Format("int", 2, 32, True),
    Format("int", 1, 64, False),
    Format("fp8", 8, 0, False),
    Format("int", 8, 0, False, "int8-symmetric"),
    Format("int", 4, 32, True, "int8"),
    Format("fp8", 8, 0, False, "fp8"),
]


def random_numbers(module: QuantizedRows) -> None:
    form = module.format
    if form.kind == "fp8":
        values = torch.randn(module.N, module.K).to(torch.float8_e4m3fn)
    else:
        half = 1 << (form.bits - 1)
        numbers = torch.randint(-half, half, (module.N, module.K), dtype=torch.int8)
        values = numbers if form.bits == 8 else pack(numbers, form.bits)
    module.values.copy_(values)
    module.scale.uniform_(0.01, 0.02)
    if module.zero is not None:
        module.zero.random_(-2, 3)


def random_layer(N: int, K: int, form: Format, dtype: torch.dtype, device: str) -> QuantizedLinear:
    torch.manual_seed(0)
    layer = QuantizedLinear(N, K, form, dtype, torch.device(device))
    layer.bias = nn.Parameter(torch.randn(N, device=device, dtype=dtype), requires_grad=False)
    random_numbers(layer)
    return layer


def plain(layer: QuantizedLinear, dtype: torch.dtype) -> Linear:
    """The layer as it would be unquantized, with the same weight."""
    form = layer.format
    result = Linear(layer.K, layer.N, bias=layer.bias is not None, device=layer.values.device, dtype=dtype)
    result.weight = nn.Parameter(
        dequantize(layer.values, layer.scale, layer.zero, layer.K, form.bits, form.group_size, dtype),
        requires_grad=False,
    )
    if layer.bias is not None:
        result.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return result


def around(N: int, K: int, gate: str | None, dtype: torch.dtype, device: str, rows: int) -> dict[str, object]:
    norm = RMSNorm(K, 1e-5, False).to(device, dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.2)
    residual = None if gate else torch.randn(rows, N, device=device, dtype=dtype)
    return {"norm": norm, "gate": gate, "residual": residual, "multiplier": 1.0 if gate else 0.5}


def doubled(given: dict[str, object]) -> dict[str, object]:
    return {key: copy.deepcopy(v).double() if isinstance(v, Tensor | nn.Module) else v for key, v in given.items()}


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("K", [1, 31, 32, 100, 256])
def test_what_is_packed_comes_out_again(bits: int, K: int) -> None:
    numbers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, K), dtype=torch.int8)
    packed = pack(numbers, bits)
    assert packed.shape == (5, -(-K // 32) * 4 * bits)
    assert torch.equal(unpack(packed, K, bits), numbers)
    words = packed.view(torch.int32).view(5, -1, bits)
    for k in range(K):  # as the layout is described
        code = words[:, k // 32, k % 32 % bits] >> (k % 32 // bits * bits) & ((1 << bits) - 1)
        assert torch.equal(code - (1 << (bits - 1)), numbers[:, k].int())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(96, 256), (50, 4128), (34, 100)])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("gate", [None, "silu"])
@torch.no_grad()
def test_a_layer_is_the_layer_of_its_weight(
    device: str, dtype: torch.dtype, form: Format, N: int, K: int, rows: int, gate: str | None
) -> None:
    layer = random_layer(N, K, form, dtype, device)
    x = torch.randn(rows, K, device=device, dtype=dtype)
    given = around(N, K, gate, dtype, device, rows)
    run = layer(x, **given)
    with tracing():
        traced = layer(x, **given)
    assert run.dtype == dtype
    exact = plain(layer, torch.float64)
    if form.activation is None:
        expected = exact(x.double(), **doubled(given))
    else:  # what the layer reads is rounded, and rounding is no smooth thing: the same inputs for both
        normed = given["norm"](x)
        numbers, scale = activations.quantize(normed, form.activation)
        expected = exact(numbers.double() * scale.double(), **(doubled(given) | {"norm": None}))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * expected.abs().max()
    assert (run - expected).abs().max() <= tolerance
    assert (traced - expected).abs().max() <= tolerance
    if device == "cpu":
        assert torch.equal(run, traced)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [form for form in FORMATS if form.activation], ids=str)
@torch.no_grad()
def test_large_sums_stay_within_float16(form: Format, device: str) -> None:
    """What comes out is in reach, the sum of products of quantized inputs before they are scaled would not be."""
    layer = random_layer(8, 2048, form, torch.float16, device)
    layer.values.copy_(layer.values[:, :1].expand_as(layer.values).clone())  # of one sign in a row
    layer.scale.fill_(0.02)
    x = torch.full((1, 2048), 0.01, device=device, dtype=torch.float16)
    expected = plain(layer, torch.float64)(x.double())
    assert expected.abs().max() > 1
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("form", FORMATS[:9], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_without_a_compiler_plain_pytorch_gives_the_same(
    form: Format, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(130, 300, form, torch.float32, "cpu")
    x = torch.randn(rows, 300)
    assert native.available(), native.why_not()
    ours = layer(x)
    monkeypatch.setattr(native, "available", lambda: False)
    torch.testing.assert_close(layer(x), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS[:9], ids=str)
@torch.no_grad()
def test_an_embedding_is_the_rows_of_its_weight(form: Format, dtype: torch.dtype) -> None:
    table = QuantizedEmbedding(20, 100, form, dtype, torch.device("cpu"))
    random_numbers(table)
    ids = torch.tensor([[3, 0], [19, 3]])
    whole = dequantize(table.values, table.scale, table.zero, 100, form.bits, form.group_size, dtype)
    assert torch.equal(table(ids), whole[ids])


ARGUMENTS = [
    *(
        (key, Arguments(scheme.default_bits or scheme.bits[0], 32 if scheme.groups else 0))
        for key, scheme in SCHEMES.items()
    ),
    ("linear:int8", Arguments(8, 0)),
    ("linear:int4", Arguments(4, 128)),
    ("linear:a8wxdq", Arguments(3, 0, True)),
    ("linear:a8wxdq", Arguments(2, 64)),
    ("linear:afpwx", Arguments(1, 32, True)),
    ("embedding:wx", Arguments(6, 0, True)),
]


def torchao_layer(weight: Tensor, key: str, args: Arguments) -> nn.Linear | nn.Embedding:
    config = SCHEMES[key].torchao_config(args)
    with quiet_torchao():
        from torchao.quantization import quantize_

        layer: nn.Linear | nn.Embedding
        if SCHEMES[key].target == "embedding":
            layer = nn.Embedding(*weight.shape, dtype=weight.dtype, _weight=weight.clone())
            quantize_(layer, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            quantize_(layer, config)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key", "args"), ARGUMENTS, ids=str)
@torch.no_grad()
def test_a_layer_gives_what_torchaos_own_gives(key: str, args: Arguments, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[key]
    if scheme.has_weight_zeros is True and args.bits < 8:
        args = replace(args, has_weight_zeros=True)
    weight = torch.randn(64, 256).to(dtype) * 0.05
    kind = QuantizedLinear if scheme.target == "linear" else QuantizedEmbedding
    ours = kind(64, 256, scheme.format(args), dtype, torch.device("cpu"))
    quantizer = Quantizer(scheme, args)
    quantizer.fill(ours, [weight[:10], weight[10:]])
    theirs = torchao_layer(weight, key, args)
    if scheme.target == "embedding":
        ids = torch.tensor([0, 5, 63])
        assert torch.equal(ours(ids), theirs.weight.dequantize()[ids])
        return
    form = ours.format
    taken_out = dequantize(ours.values, ours.scale, ours.zero, 256, form.bits, form.group_size, dtype)
    assert torch.equal(taken_out, theirs.weight.dequantize().to(dtype)) or form.kind == "fp8"
    torch.testing.assert_close(taken_out, theirs.weight.dequantize().to(dtype), rtol=5e-3, atol=0)
    if key == "linear:fp8dq":
        return  # torchao multiplies these on a GPU alone
    x = torch.randn(5, 256).to(dtype)
    tolerance = 2e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("key", SCHEMES)
def test_rows_of_zeros_stay_zeros_and_a_width_of_no_whole_groups_is_padded(key: str) -> None:
    scheme = SCHEMES[key]
    args = Arguments(scheme.default_bits or scheme.bits[0], 64 if scheme.groups else 0)
    weight = torch.randn(8, 100) * 0.05
    weight[3] = 0
    ours = QuantizedLinear(8, 100, scheme.format(args), torch.float32, torch.device("cpu"))
    Quantizer(scheme, args).fill(ours, [weight])
    assert torch.isfinite(ours.scale).all()
    taken_out = dequantize(ours.values, ours.scale, ours.zero, 100, ours.format.bits, args.group_size, torch.float32)
    assert not taken_out[3].any()
    assert F.cosine_similarity(taken_out.flatten(), weight.flatten(), dim=0) > 0.97


def test_modules_say_what_they_are() -> None:
    """The key of a compiled step has the model in words: formats that compute otherwise read otherwise."""
    texts = {repr(QuantizedLinear(4, 32, form, torch.float32, torch.device("meta"))) for form in FORMATS}
    assert len(texts) == len(FORMATS)


def test_a_table_reads_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from generate.stats import weight_bytes_per_token

    table = QuantizedEmbedding(10, 64, Format("int", 4, 32, False), torch.float32, torch.device("cpu"))
    assert weight_bytes_per_token(table) == 32 + 2 * 4
    head = QuantizedLinear(10, 64, table.format, torch.float32, torch.device("cpu"))
    head.share(table)
    assert weight_bytes_per_token(nn.ModuleList([table, head])) == 10 * (32 + 2 * 4)
    assert weight_bytes_per_token(Embedding(10, 64, dtype=torch.float32)) == 64 * 4
