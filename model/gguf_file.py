"""A GGUF file's header: what it says of a model, and where its tensors are. Knows the format; not what it all means.

The header is read here, and not by the `gguf` package's reader, because the file may come from anybody: every count and
length is held against what the file can hold before anything of that size is made. Types, block sizes and alignment
are the package's.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from config.errors import UserError
from model.checkpoint import GGUF_MAGIC, first_bytes, gguf_parts, wrong_file
from model.config_fields import shown

VERSIONS = (2, 3)
# Nothing that exists comes near these.
MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_LIST = 1 << 22
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

STRING, LIST, BOOL = 8, 9, 7
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|u1", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
"""Numbers of types of values -> NumPy's names. 8 is a string, 9 a list."""
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
SPLIT_COUNT, SPLIT_NUMBER = "split.count", "split.no"


@dataclass(frozen=True)
class Strings:
    """A list of strings as it lies in a file: a vocabulary takes ten times as much memory as a list."""

    where: str
    raw: bytes
    count: int

    def decode(self) -> list[str]:
        """Raises UserError for what is not UTF-8."""
        found, at = [], 0
        for number in range(self.count):
            begin = at + 8
            at = begin + U64.unpack_from(self.raw, at)[0]
            try:
                found.append(self.raw[begin:at].decode())
            except UnicodeDecodeError:
                raise UserError(f"{self.where}: entry {number} is not UTF-8; get the file again") from None
        return found


Numbers = np.ndarray[Any, Any]
Value = str | int | float | bool | Strings | Numbers


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in a file. `shape` is ours: rows first."""

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    """In the file, in bytes."""
    nbytes: int


@dataclass(frozen=True)
class Gguf:
    """A whole model: one file, or all parts of one that was split."""

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def quantized_types(self) -> list[str]:
        """The names of the types with fewer than 16 bits, those with the most bytes first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if GGML_QUANT_SIZES[tensor.kind][0] > 1:
                sizes[tensor.kind.name] += tensor.nbytes
        return [name for name, _ in sizes.most_common()]

    @property
    def architecture(self) -> str:
        """Raises UserError where the file does not say."""
        return self.text("general.architecture")

    def get(self, key: str) -> Value | None:
        """The value under `key`, whose "{arch}" is the architecture; None where it is missing."""
        return self.values.get(key.replace("{arch}", self.architecture) if "{arch}" in key else key)

    def error(self, key: str, problem: str) -> UserError:
        """The error that `key` has `problem`, for the caller to raise."""
        name = key.replace("{arch}", self.architecture) if "{arch}" in key else key
        return UserError(f"{self.path}: {name} {problem}")

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "is missing" if value is None else f"is {shown(value)}, not a string")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        value = self.get(key)
        if not isinstance(value, Strings):
            raise self.error(key, "is missing" if value is None else f"is {shown(value)}, not a list of strings")
        return value.decode()

    def numbers(self, key: str, kinds: str, length: int) -> Numbers | None:
        """A list of so many numbers of one of NumPy's `kinds` ("iu", "f"), or None where it is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self.error(key, f"is {shown(value)}, not a list of numbers")
        if len(value) != length:
            raise self.error(key, f"has {len(value)} entries, not {length}")
        return value

    def whole_number(self, key: str) -> int | None:
        """A whole number, or None where it is missing."""
        value = self.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.error(key, f"is {shown(value)}, not a whole number")

    def flag(self, key: str, default: bool) -> bool:
        """true or false, or what it is where it is missing."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {shown(value)}, not true or false")
        return value


def as_written(value: float) -> float:
    """The shortest number that is the same in float32, in which files keep it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_gguf(path: Path) -> Gguf:
    """The file at `path`, or all the parts of which it is one. Raises UserError for whatever is damaged or not GGUF."""
    parts = gguf_parts(path)
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part}: missing; the model is in {len(parts)} files, of which {path.name} is one")
    states = [part.stat() for part in parts]
    return _read(parts, tuple((state.st_mtime_ns, state.st_size) for state in states))


@lru_cache(maxsize=1)
def _read(parts: tuple[Path, ...], states: tuple[tuple[int, int], ...]) -> Gguf:
    """`states`: what a file that changed has another one of."""
    whole = _read_file(parts[0])
    count = whole.whole_number(SPLIT_COUNT) or 1
    if count != len(parts):
        raise UserError(
            f"{parts[0]}: is a part of a model in {count} files, but its name does not say so; "
            "give it back the name that it was published with"
        )
    tensors = dict(whole.tensors)
    for number, part in enumerate(parts[1:], start=1):
        more = _read_file(part)
        if (more.whole_number(SPLIT_NUMBER), more.whole_number(SPLIT_COUNT)) != (number, count):
            raise UserError(f"{part}: is not part {number + 1} of {count}, as its name says; get it again")
        for name, tensor in more.tensors.items():
            if name in tensors:
                raise UserError(f"{part}: holds tensor {name!r}, which {tensors[name].file.name} holds too")
            tensors[name] = tensor
    return Gguf(parts[0], whole.values, tensors)


def _read_file(path: Path) -> Gguf:
    head = first_bytes(path)
    if not head.startswith(GGUF_MAGIC):
        if head[:4] in (b"tjgg", b"lmgg", b"fmgg", b"algg"):
            raise UserError(f"{path}: is in one of the formats before GGUF; get the model as GGUF")
        raise wrong_file(path, "a GGUF file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(path, data)
            return Gguf(path, *header.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Header:
    """Reads the header of one file from its beginning to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(GGUF_MAGIC)
        self._size = len(data)
        self._limit = min(self._size, MAX_HEADER_BYTES)

    def read(self) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
        self._check_version()
        tensors, keys = self._count("tensors", MAX_TENSORS, 24), self._count("keys", MAX_KEYS, 13)
        values: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string("a key", MAX_NAME_BYTES)
            if key in values:
                raise UserError(f"{self._path}: the key {key!r} is there twice; get it again")
            values[key] = self._value(key, self._number(U32))
        alignment = self._alignment(values)
        infos = [self._tensor_info() for _ in range(tensors)]
        return values, self._placed(infos, -(-self._at // alignment) * alignment, alignment)

    def _check_version(self) -> None:
        version = self._number(U32)
        if version in VERSIONS:
            return
        if version and version & 0xFFFF == 0:
            raise UserError(f"{self._path}: is in big-endian byte order, which is not read here; get the usual one")
        raise UserError(
            f"{self._path}: is of version {version} of GGUF; versions {VERSIONS[0]} and {VERSIONS[1]} are read here"
        )

    def _cut(self, what: str) -> UserError:
        if self._size > MAX_HEADER_BYTES:
            most = f"{MAX_HEADER_BYTES >> 20} MiB"
            return UserError(f"{self._path}: its header is damaged, or larger than {most}: {what}; get it again")
        return UserError(f"{self._path}: is cut short, or its header is damaged: {what}; get it again")

    def _take(self, size: int, what: str) -> int:
        """Where the next `size` bytes begin."""
        at = self._at
        if size > self._limit - at:
            raise self._cut(f"{what} of {size} bytes at byte {at}, and {self._size} are there")
        self._at += size
        return at

    def _number(self, form: struct.Struct) -> int:
        number: int = form.unpack_from(self._data, self._take(form.size, "a number"))[0]
        return number

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        """How many there are of something that takes `least_bytes` at least."""
        count = self._number(U64)
        if count > most or count * least_bytes > self._limit:
            raise self._cut(f"it says that there are {count} {what}")
        return count

    def _string(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        size = self._number(U64)
        if size > most:
            raise self._cut(f"{what} of {size} bytes at byte {self._at}")
        at = self._take(size, what)
        try:
            return self._data[at : at + size].decode()
        except UnicodeDecodeError:
            raise UserError(f"{self._path}: {what} at byte {at} is not UTF-8; get it again") from None

    def _value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            return self._string(f"the value of {key!r}")
        if kind != LIST:
            array = self._numbers(key, kind, 1)
            return bool(array[0]) if kind == BOOL else array[0].item()
        inner = self._number(U32)
        count = self._count(f"entries in {key!r}", MAX_LIST, 8 if inner == STRING else 1)
        if inner != STRING:
            return self._numbers(key, inner, count)
        begin, what = self._at, f"an entry of {key!r}"
        for _ in range(count):
            self._take(self._number(U64), what)
        return Strings(f"{self._path}: {key}", self._data[begin : self._at], count)

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray[Any, Any]:
        if kind not in SCALARS:
            raise UserError(f"{self._path}: the value of {key!r} is of type {kind}, which is not known here")
        dtype = np.dtype(SCALARS[kind])
        at = self._take(dtype.itemsize * count, f"the value of {key!r}")
        return np.frombuffer(self._data[at : at + dtype.itemsize * count], dtype)

    def _alignment(self, values: Mapping[str, Value]) -> int:
        alignment = values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        right = isinstance(alignment, int) and 8 <= alignment <= MAX_ALIGNMENT
        if not right or alignment & (alignment - 1):  # type: ignore[operator]
            raise UserError(
                f"{self._path}: general.alignment is {shown(alignment)}, not a power of two from 8 to {MAX_ALIGNMENT}"
            )
        assert isinstance(alignment, int)
        return alignment

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with rows first, number of the type, offset."""
        name = self._string("a tensor's name", MAX_NAME_BYTES)
        count = self._number(U32)
        if not 1 <= count <= MAX_DIMENSIONS:
            raise UserError(f"{self._path}: tensor {name!r} has {count} dimensions, not 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number(U64) for _ in range(count))[::-1]
        return name, shape, self._number(U32), self._number(U64)

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Where each tensor is; none outside the file, and no two in one place."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                raise UserError(f"{self._path}: holds tensor {name!r} twice; get it again")
            kind, nbytes = self._extent(name, shape, number)
            if offset % alignment:
                raise UserError(f"{self._path}: tensor {name!r} is not where a multiple of {alignment} bytes begins")
            if start + offset + nbytes > self._size:
                raise UserError(
                    f"{self._path}: is cut short in tensor {name!r}: {start + offset + nbytes} bytes expected, "
                    f"{self._size} are there; get it again"
                )
            tensors[name] = GgufTensor(self._path, name, kind, shape, start + offset, nbytes)
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for one, other in pairwise(in_order):
            if one.offset + one.nbytes > other.offset:
                raise UserError(f"{self._path}: tensors {one.name!r} and {other.name!r} overlap; get it again")
        return tensors

    def _extent(self, name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
        """Type and bytes of a tensor."""
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UserError(f"{self._path}: tensor {name!r} is of type {number}, which is not known here") from None
        numbers = 1
        for length in shape:
            numbers *= length
        if not numbers:
            raise UserError(f"{self._path}: tensor {name!r} has shape {list(shape)}, which is empty")
        if shape[-1] % block:
            raise UserError(
                f"{self._path}: tensor {name!r} has rows of {shape[-1]} numbers, which are no whole blocks of "
                f"{kind.name} ({block})"
            )
        return kind, numbers // block * size

