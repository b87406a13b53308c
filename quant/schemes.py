"""The schemes: what each key of a recipe takes, which torchao config chooses its numbers, how they are stored, and
where it runs. Tables of data and small functions. Imports torch and torchao only inside the functions that need them.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from config.errors import UserError
from quant.formats import Activation, Format, container_bits

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

MAX_GROUP = 65536

INT4 = {"zeros": False, "algorithm": "hqq_scale_only"}
"""How 4-bit weights are chosen: with zero points or not; torchao's "affine", or "hqq_scale_only" (slower, closer)."""


@dataclass(frozen=True)
class Arguments:
    """What a scheme was asked for, checked: every scheme has all three, whether a recipe may set them or not."""

    bits: int
    group_size: int
    """0: one scale for a whole row."""
    has_weight_zeros: bool = False


@dataclass(frozen=True)
class Groups:
    """Which group sizes a scheme takes: `only` these, or any multiple of 32; `whole_row` is how a recipe spells one
    scale a row (0 or -1, as people know it), None where that is not offered.
    """

    only: tuple[int, ...] = ()
    whole_row: int | None = None

    def allows(self, number: int) -> bool:
        if number == self.whole_row:
            return True
        return number in self.only if self.only else number % 32 == 0 and 32 <= number <= MAX_GROUP

    def default(self, bits: int) -> int:
        """As `Arguments` has it. One scale a row holds 8 bits well; fewer bits need small groups."""
        return 0 if bits == 8 and self.whole_row is not None else 32

    def nearest(self, number: int) -> int:
        """The nearest that is allowed; for what is not above 0, one scale a row where that is offered."""
        if number <= 0 and self.whole_row is not None:
            return self.whole_row
        if self.only:
            return min(self.only, key=lambda size: abs(size - number))
        return min(max(32, (number + 16) // 32 * 32), MAX_GROUP)

    def describe(self) -> str:
        """ "32, 64, 128 or 256", "a multiple of 32 up to 65536, or 0 for one scale a row"."""
        sizes = f"a multiple of 32 up to {MAX_GROUP}"
        if self.only:
            sizes = f"{', '.join(map(str, self.only[:-1]))} or {self.only[-1]}"
        return sizes if self.whole_row is None else f"{sizes}, or {self.whole_row} for one scale a row"


@dataclass(frozen=True)
class Scheme:
    """One key of a recipe."""

    target: Literal["linear", "embedding"]
    summary: str
    bits: tuple[int, ...]
    """What "bitwidth" may be; where there is one alone the recipe does not say it."""
    config: Callable[[Arguments], "AOBaseConfig"]
    """The torchao config that chooses the numbers. Call it through `torchao_config`."""
    default_bits: int = 0
    groups: Groups | None = None
    """What "groupsize" may be; None: always one scale a row, and the recipe does not say it."""
    has_weight_zeros: bool | None = False
    """None: the recipe says; else whether it has zero points when it has fewer than 8 bits."""
    kind: Literal["int", "fp8"] = "int"
    activation: Activation | None = None

    def format(self, args: Arguments) -> Format:
        """How the numbers of these arguments are stored: known without quantizing anything."""
        return Format(self.kind, container_bits(args.bits), args.group_size, args.has_weight_zeros, self.activation)

    def torchao_config(self, args: Arguments) -> "AOBaseConfig":
        """The config for `torchao.quantization.quantize_`. Imports torchao (seconds). Raises UserError without it."""
        with quiet_torchao():
            return self.config(args)


def _granularity(args: Arguments, whole_row: Any) -> Any:
    from torchao.quantization import PerGroup

    return PerGroup(args.group_size) if args.group_size else whole_row


# `set_inductor_config=False`: torchao would change the compiler's settings for the whole process, so that a model
# compiled after quantizing would differ from the same one loaded from a file.


def _int8(args: Arguments) -> "AOBaseConfig":
    from torchao.quantization import Int8WeightOnlyConfig, PerRow

    return Int8WeightOnlyConfig(granularity=_granularity(args, PerRow()), set_inductor_config=False)


def _intx(args: Arguments) -> "AOBaseConfig":
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{args.bits}"),
        granularity=_granularity(args, PerAxis(0)),
        mapping_type=MappingType.ASYMMETRIC if args.has_weight_zeros else MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm=_algorithm(args),
    )


def _algorithm(args: Arguments) -> str:
    """torchao's way to choose scales. Without zero points the plain one makes 3 bits and fewer far worse than they need
    be: of 1 bit nothing would be left.
    """
    if args.has_weight_zeros or args.bits > 4:
        return "affine"
    return str(INT4["algorithm"]) if args.bits == 4 else "hqq_scale_only"


def _int8_or_intx(args: Arguments) -> "AOBaseConfig":
    """The same numbers as `linear:int8` and `linear:int4` have, so that a tied table and output layer share them."""
    return _int8(args) if args.bits == 8 and not args.has_weight_zeros else _intx(args)


def _a8wxdq(args: Arguments) -> "AOBaseConfig":
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, MappingType, PerAxis

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{args.bits}"),
        weight_granularity=_granularity(args, PerAxis(0)),
        weight_mapping_type=MappingType.ASYMMETRIC if args.has_weight_zeros else MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm=_algorithm(args),
    )


def _table(args: Arguments) -> "AOBaseConfig":
    """As `_int8_or_intx`; below 8 bits with the scales of `_a8w4dq`, whose output layer may share its numbers."""
    import torch

    config: Any = _int8_or_intx(args)
    if args.bits < 8:
        config.scale_dtype = torch.bfloat16
    return cast("AOBaseConfig", config)


def _a8w4dq(args: Arguments) -> "AOBaseConfig":
    """Scales are bfloat16 numbers in every dtype, as ExecuTorch's kernels have them: the same numbers in all places."""
    import torch

    config: Any = _a8wxdq(args)
    config.weight_scale_dtype = torch.bfloat16
    return cast("AOBaseConfig", config)


def _a8w8dq(args: Arguments) -> "AOBaseConfig":
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _fp8(args: Arguments) -> "AOBaseConfig":
    """For dynamic activations too. torchao's config for those chooses the same weights, but wants bf16 and a GPU to
    choose them on, and leaves layers as they are, in silence, whose width or height 16 does not divide.
    """
    from torchao.quantization import Float8WeightOnlyConfig, PerRow

    return Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)


_ONE_TO_EIGHT = tuple(range(1, 9))

SCHEMES: dict[str, Scheme] = {
    "linear:int8": Scheme(
        "linear",
        "8-bit weights: half the size of 16 bits, next to no loss",
        (8,),
        _int8,
        groups=Groups(whole_row=0),
    ),
    "linear:int4": Scheme(
        "linear",
        "4-bit weights: little more than a quarter of the size",
        (4,),
        _intx,
        groups=Groups(only=(32, 64, 128, 256)),
        has_weight_zeros=INT4["zeros"] is True,
    ),
    "linear:a8w4dq": Scheme(
        "linear",
        "4-bit weights, inputs rounded to 8 bits for each token",
        (4,),
        _a8w4dq,
        groups=Groups(),
        activation="int8",
    ),
    "linear:a8wxdq": Scheme(
        "linear",
        "1- to 8-bit weights, inputs rounded to 8 bits for each token",
        _ONE_TO_EIGHT,
        _a8wxdq,
        default_bits=4,
        groups=Groups(whole_row=-1),
        has_weight_zeros=None,
        activation="int8",
    ),
    "linear:a8w8dq": Scheme(
        "linear",
        "8-bit weights, inputs rounded to 8 bits for each token",
        (8,),
        _a8w8dq,
        activation="int8-symmetric",
    ),
    "linear:fp8": Scheme("linear", "float8 (e4m3) weights", (8,), _fp8, kind="fp8"),
    "linear:fp8dq": Scheme(
        "linear", "float8 weights, inputs rounded to float8 for each token", (8,), _fp8, kind="fp8", activation="fp8"
    ),
    "linear:afpwx": Scheme(
        "linear",
        "1- to 7-bit weights with zero points; known from MPS",
        _ONE_TO_EIGHT[:-1],
        _intx,
        default_bits=4,
        groups=Groups(),
        has_weight_zeros=True,
    ),
    "embedding": Scheme(
        "embedding",
        "the table of token embeddings in 8 or 4 bits",
        (4, 8),
        _table,
        default_bits=8,
        groups=Groups(whole_row=0),
    ),
    "embedding:wx": Scheme(
        "embedding",
        "the table in 1 to 8 bits, below 8 with zero points",
        _ONE_TO_EIGHT,
        _int8_or_intx,
        default_bits=4,
        groups=Groups(whole_row=0),
        has_weight_zeros=True,
    ),
}


# ---- Where they run ----

Level = Literal["fast", "runs"]
"""Runs through a kernel of ours, or in plain PyTorch."""

PLACES = {"cpu": "CPU", "cuda": "CUDA, sm89 and newer", "cuda-sm80": "CUDA, sm80 to sm87", "cuda-old": "CUDA, older",
          "mps": "MPS"}  # fmt: skip
"""Devices as far as they differ here -> how people call them."""

KERNELS: dict[str, frozenset[tuple[str, int]]] = {
    "cpu": frozenset({("int", 8), ("int", 4), ("int", 2), ("int", 1), ("fp8", 8)}),
    "cuda": frozenset({("int", 8), ("int", 4), ("fp8", 8)}),
    "cuda-sm80": frozenset({("int", 8), ("int", 4)}),
    "cuda-old": frozenset(),
    "mps": frozenset(),
}
"""Of which stored numbers (kind, bits) a place has a kernel for the product of linear layers: bf16, fp16 and fp32,
eager and compiled. All else runs in plain PyTorch, as looking up embeddings always does."""


@dataclass(frozen=True)
class Refusal:
    """Why a scheme cannot run in a place, and the nearest that can. `compiled`: it can, but not in compiled steps."""

    reason: str
    nearest: str
    compiled: bool = False


_NO_TYPE = "torch has no float8 on MPS"
_NO_FLOAT8 = "the GPU has no float8 arithmetic, which came with sm89"
_NO_COMPILED = "the compiler has no float8 for GPUs before sm89"

REFUSED: dict[tuple[str, str], Refusal] = {
    ("linear:fp8", "mps"): Refusal(_NO_TYPE, "linear:int8"),
    ("linear:fp8dq", "mps"): Refusal(_NO_TYPE, "linear:a8w8dq"),
    ("linear:fp8", "cuda-sm80"): Refusal(_NO_COMPILED, "linear:int8", compiled=True),
    ("linear:fp8", "cuda-old"): Refusal(_NO_COMPILED, "linear:int8", compiled=True),
    ("linear:fp8dq", "cuda-sm80"): Refusal(_NO_FLOAT8, "linear:fp8"),
    ("linear:fp8dq", "cuda-old"): Refusal(_NO_FLOAT8, "linear:fp8"),
}
"""(scheme, place) -> what is refused there. Every other scheme runs in every place, in bf16, fp16 and fp32."""


def place_of(device_type: str, compute_capability: tuple[int, int] | None = None) -> str:
    """The key of PLACES. `compute_capability` is a GPU's, such as (9, 0); None: a current one."""
    if device_type != "cuda" or compute_capability is None or compute_capability >= (8, 9):
        return device_type
    return "cuda-sm80" if compute_capability >= (8, 0) else "cuda-old"


def check(key: str, place: str, compiled: bool, where: str) -> None:
    """Raise UserError, which begins with `where`, if the scheme cannot run there."""
    refusal = REFUSED.get((key, place))
    if refusal is None or (refusal.compiled and not compiled):
        return
    nearest = refusal.nearest
    other = REFUSED.get((nearest, place))
    if other is not None and (compiled or not other.compiled):
        nearest = other.nearest
    hint = ", or leave out --compile and --compile-prefill" if refusal.compiled else ""
    raise UserError(f'{where}: "{key}" cannot run here: {refusal.reason}; the nearest that can is "{nearest}"{hint}')


def level(key: str, stored: Format, place: str) -> Level:
    """How a layer of that scheme and format is computed in a place that does not refuse it."""
    has_kernel = SCHEMES[key].target == "linear" and (stored.kind, stored.bits) in KERNELS[place]
    return "fast" if has_kernel else "runs"


# ---- torchao itself ----


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Import torchao without what it says meanwhile: kernels of other machines that it could not load, and
    deprecations among its own parts. Raises UserError if it is not there.
    """
    loggers: Mapping[logging.Logger, int] = {
        logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        except ImportError as error:
            raise UserError(f"quantizing needs torchao 0.18, which cannot be imported: {error}") from error
        finally:
            for logger, before in loggers.items():
                logger.setLevel(before)
