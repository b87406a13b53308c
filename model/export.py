"""Write and load exported programs: one file that holds compiled code, weights and the model's small files. Knows the
file and what must be checked before any of it runs; not what the code computes.

The file is a zip archive of stored entries, a PT2 archive as torch knows it: `AOTIModelPackageLoader` and
`PyTorchStreamReader` read it from C++. Weights are one safetensors entry and inputs to every entry point, so that they
are there once; they are mapped, so that loading reads no more of them than is used. It is native code: a package is a
program, and is trusted as one.
"""

import hashlib
import io
import json
import math
import os
import secrets
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from config.errors import UserError
from config.settings import shorten
from model.checkpoint import ZIP_MAGIC, first_bytes, wrong_file
from model.saved import DTYPES, Layout

SUFFIX = ".pt2"
FORMAT = 1
"""To be raised when entries, inputs or metadata come to mean something else."""
ROOT = "model/"
PACKAGE, WEIGHTS = "extra/package.json", "extra/model/model.safetensors"
LINES, VOCABULARY = "extra/runner.txt", "extra/vocabulary.txt"
"""For programs without Python."""
FILES, NATIVE, PROGRAMS, ARTIFACTS = "extra/model/", "extra/native/", "data/aotinductor/", "extra/artifact/"
ALIGNMENT = 64
MAX_METADATA = 16 << 20
MAX_ENTRY = 512 << 20
"""Of anything that is read or unpacked; weights are not."""
MAX_ENTRIES = 4096
CHUNK = 8 << 20
_PT2 = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"6\n"}
_AGAIN = "export the model again"
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


# ---- Writing ----


class PackageWriter:
    """Entries into a package, one after the other."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self.hashes: dict[str, str] = {}
        """Of the entries that `add` wrote."""

    def add(self, name: str, data: bytes) -> None:
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        self.stream(name, len(data), [data])

    def stream(self, name: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
        """An entry of `size` bytes that begins in the file at a multiple of ALIGNMENT."""
        entry = zipfile.ZipInfo(ROOT + name, (1980, 1, 1, 0, 0, 0))
        entry.external_attr = 0o644 << 16
        zip64 = size >= 1 << 31
        assert self._file.fp is not None
        # Local header, name, the sizes of 64 bits, and the head of the padding, which is a field that nobody knows.
        begins = self._file.fp.tell() + 30 + len(entry.filename.encode()) + (20 if zip64 else 0) + 4
        entry.extra = struct.pack("<HH", 0x4246, -begins % ALIGNMENT) + bytes(-begins % ALIGNMENT)
        entry.file_size = size
        written = 0
        with self._file.open(entry, "w", force_zip64=zip64) as opened:
            for part in parts:
                opened.write(part)
                written += len(part)
        assert written == size, name

    def close(self) -> None:
        """From here on the file is a package, and on the disk."""
        opened = self._file.fp
        self._file.close()
        assert opened is not None
        opened.flush()
        os.fsync(opened.fileno())


@contextmanager
def writing(path: Path) -> Iterator[tuple[PackageWriter, Path]]:
    """A package that will be `path`, and where it is until then, a package once its writer is closed. Whatever is still
    there in the end is removed. Raises OSError.
    """
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{SUFFIX}")
    try:
        with partial.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            writer = PackageWriter(archive)
            for name, data in _PT2.items():
                writer.stream(name, len(data), [data])
            yield writer, partial
    finally:
        partial.unlink(missing_ok=True)


def program_files(package: bytes) -> dict[str, bytes]:
    """The files of the one program in a package of AOTInductor's, by their names; without its C++."""
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = [name for name in archive.namelist() if PROGRAMS in name and not name.endswith(".cpp")]
        return {name.rpartition("/")[2]: archive.read(name) for name in names}


def weight_parts(layout: Layout, tensors: Mapping[str, Tensor], advance: Callable[[int], None]) -> Iterator[Any]:
    """A safetensors file of `layout`, from its first byte to its last."""
    yield layout.header
    for name in layout.offsets:
        flat = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), CHUNK):
            yield flat[start : start + CHUNK]
            advance(min(CHUNK, len(flat) - start))


# ---- Loading ----


@dataclass(frozen=True)
class Metadata:
    """What package.json says. `None` stands where something does not matter to this form or device."""

    format: int
    form: str
    """How the entry points are compiled: "aotinductor", or "artifact", which runs under Python alone."""
    torch: str
    python: str | None
    cuda: str | None
    platform: str
    device: str
    instructions: list[str]
    """Of a processor, as the system spells them: what the code may use."""
    capability: str | None
    """Of a GPU, such as "9.0"."""
    dtype: str
    recipe: dict[str, Any] | None
    max_seq_len: int
    max_num_seqs: int
    prefill_chunk: int
    eos_token_ids: list[int]
    model: str
    """What was exported, as somebody named it."""
    source: str
    """The hash of our own code that the entry points were made of."""
    versions: dict[str, str]
    created: str
    code: dict[str, str]
    """The entries that run, and their hashes."""

    def document(self) -> dict[str, Any]:
        return dict(vars(self))


_KINDS: dict[str, type | tuple[type, ...]] = {
    "form": str, "torch": str, "python": (str, type(None)), "cuda": (str, type(None)), "platform": str, "device": str,
    "instructions": list, "capability": (str, type(None)), "dtype": str, "recipe": (dict, type(None)),
    "max_seq_len": int, "max_num_seqs": int, "prefill_chunk": int, "eos_token_ids": list, "model": str, "source": str,
    "versions": dict, "created": str, "code": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package whose names, sizes and metadata were checked, and none of whose code has run yet."""

    path: Path
    metadata: Metadata
    digest: str
    """Of the metadata, which hold the hashes of all code."""
    _entries: Mapping[str, zipfile.ZipInfo]

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def names(self, folder: str) -> list[str]:
        """The entries in a folder."""
        return [name for name in self._entries if name.startswith(folder)]

    def read(self, name: str) -> bytes:
        """An entry whole, its hash checked if it is code. Raises UserError."""
        entry = self._entries[name]
        if entry.file_size > MAX_ENTRY:
            raise _damaged(self.path, f"{name} is larger than anything that is read whole")
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(entry)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _damaged(self.path, f"{name}: {error}") from error
        expected = self.metadata.code.get(name)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise _damaged(self.path, f"{name} is not what was exported")
        return data

    @contextmanager
    def unpacked(self, folder: str) -> Iterator[Path]:
        """A directory of this user's alone that holds the small files of a folder for as long as this is open."""
        with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
            for name in self.names(folder):
                if name != WEIGHTS:
                    target = Path(directory) / name.removeprefix(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(self.read(name))
            yield Path(directory)

    def check_code(self) -> None:
        """Raises UserError unless all code is what was exported."""
        for name in self.metadata.code:
            self.read(name)

    def weights(self) -> dict[str, Tensor]:
        """All weights by our own names, mapped: nothing is read before it is used, and nothing written to the file.
        Raises UserError.
        """
        begin, size = self._place(WEIGHTS)
        with self.path.open("rb") as file:
            file.seek(begin)
            (length,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (size,)
            if length > min(MAX_METADATA, size - 8):
                raise _damaged(self.path, "its weights are cut short")
            header = _json(file.read(length))
        if header is None:
            raise _damaged(self.path, "what says where the weights are cannot be read")
        mapped = torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)
        data = mapped[begin + 8 + length : begin + size]
        return {name: self._weight(name, entry, data) for name, entry in header.items() if name != "__metadata__"}

    def _weight(self, name: str, entry: Any, data: Tensor) -> Tensor:
        try:
            dtype, shape = _TYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
            start, stop = (int(n) for n in entry["data_offsets"])
            right = min(shape, default=1) > 0 and 0 <= start <= stop <= len(data)
            if not right or math.prod(shape) * dtype.itemsize != stop - start:
                raise ValueError
            weight = data[start:stop].view(dtype).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, f"weight {shorten(repr(name))} is not where it should be") from error
        # Code made for the processor's widest registers reads fastest from where their size divides.
        return weight if weight.data_ptr() % ALIGNMENT == 0 else weight.clone()

    def _place(self, name: str) -> tuple[int, int]:
        """Where in the file the data of an entry begins, and its size."""
        entry = self._entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise _damaged(self.path, f"{name} is not where it should be")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        begin = entry.header_offset + 30 + name_length + extra_length
        if begin + entry.file_size > self.nbytes:
            raise _damaged(self.path, f"{name} is cut short")
        return begin, entry.file_size


def open_package(path: Path) -> Package:
    """The package at `path`. Raises UserError for one that is damaged, of another format, or not ours."""
    head = first_bytes(path)
    if not head.startswith(ZIP_MAGIC):
        raise wrong_file(path, "a package that torchchat exported")
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error, NotImplementedError) as error:
        raise UserError(f"{path}: is cut short or damaged: {error}; {_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    names = [entry.filename for entry in found]
    if ROOT + PACKAGE not in names:
        raise UserError(f"{path}: was not exported by torchchat: it has no {ROOT}{PACKAGE}; {_AGAIN}")
    if len(found) > MAX_ENTRIES or len(set(names)) < len(names):
        raise _damaged(path, "it names more entries than it can have")
    for entry in found:
        _check_entry(path, entry)
    entries = {entry.filename.removeprefix(ROOT): entry for entry in found}
    if entries[PACKAGE].file_size > MAX_METADATA:
        raise _damaged(path, f"{PACKAGE} is too large")
    # Without metadata nothing is code yet, so that nothing of it is compared.
    data = Package(path, _NOTHING, "", entries).read(PACKAGE)
    metadata = _metadata(path, _json(data))
    for name in (*metadata.code, WEIGHTS, "extra/model/config.json"):
        if name not in entries:
            raise _damaged(path, f"{name} is missing")
    return Package(path, metadata, hashlib.sha256(data).hexdigest(), entries)


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = PurePosixPath(name).parts
    safe = name.startswith(ROOT) and ".." not in parts and not name.endswith("/") and "//" not in name
    if not safe or any(ord(character) < 32 or character in '\\:"' for character in name):
        raise UserError(f"{path}: has an entry named {shorten(repr(name))}, which leads out of it; {_AGAIN}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise UserError(f"{path}: {shorten(name)} is compressed, which no package of torchchat is; {_AGAIN}")
    if entry.header_offset + entry.file_size > path.stat().st_size:
        raise _damaged(path, f"{shorten(name)} is cut short")


def _metadata(path: Path, values: dict[str, Any] | None) -> Metadata:
    if values is None:
        raise _damaged(path, f"{PACKAGE} is not JSON")
    if values.get("format") != FORMAT:
        raise UserError(
            f'{path}: "format" is {shorten(json.dumps(values.get("format")), 20)}, and this torchchat reads {FORMAT}: '
            "use the version that exported it, or export the model again"
        )
    for key in sorted({"format", *_KINDS} ^ set(values)):
        raise _damaged(path, f'"{shorten(key, 40)}" is {"unknown" if key in values else "missing"} in {PACKAGE}')
    for key, kind in _KINDS.items():
        if not isinstance(values[key], kind) or (kind is int and (isinstance(values[key], bool) or values[key] < 1)):
            raise _damaged(path, f'"{key}" in {PACKAGE} is not what torchchat writes there')
    return Metadata(**values)


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: is damaged: {what}; {_AGAIN}")


_NOTHING = Metadata(0, "", "", None, None, "", "", [], None, "", None, 0, 0, 0, [], "", "", {}, "", {})
