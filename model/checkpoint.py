"""Which files hold a model's weights, and in which format: known from names and first bytes, not by trying.

Reads directories, indexes and headers; does not know torch, nor what a tensor is for.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config.errors import UserError
from model.config import read_llama2c_header

Format = Literal["safetensors", "torch", "meta", "llama2c", "gguf"]

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

MAX_INDEX_BYTES = 64 << 20
MAX_PARTS = 1000
ZIP_MAGIC = b"PK\x03\x04"
GGUF_MAGIC = b"GGUF"
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
GIT_LFS = b"version https://git-lfs"
LLAMA2C_VERSIONED = b"24ka"  # 0x616B3432, little-endian: llama2.c's later, versioned exports
LLAMA2C_ARGUMENTS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that hold the weights; for a checkpoint with an index, which of them each tensor is in."""

    format: Format
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, Path] | None = None


def find_checkpoint(path: Path) -> CheckpointFiles:
    """The weights in a directory, or in a file. Safetensors come first where several formats lie together.

    Raises UserError when there is nothing, a file that an index names is missing, or a file is something else.
    """
    if (gguf := find_gguf(path)) is not None:
        return CheckpointFiles("gguf", (gguf,))
    if path.is_dir():
        return _in_directory(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    return CheckpointFiles(_format_of_file(path), (path,))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is the model at `path`, by its name: that file, or the only one in a directory without other
    weights. Of a model in parts it is the first. It says all of the model, whatever else lies there.

    Raises UserError for a directory with several.
    """
    if not path.is_dir():
        return gguf_parts(path)[0] if path.suffix == ".gguf" and path.exists() else None
    names = [file.name for file in path.iterdir()]
    # Beside a model that also sees there is a part of its own for pictures.
    files = {gguf_parts(path / name)[0] for name in names if name.endswith(".gguf") and "mmproj" not in name}
    if not files or any(name.endswith((".safetensors", ".pth", ".pt")) or _is_torch_bin(name) for name in names):
        return None
    if len(files) > 1:
        listed = ", ".join(sorted(file.name for file in files))
        raise UserError(f"{path}: several GGUF files are here ({listed}); name the one that you mean")
    return files.pop()


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """All files of the model of which `path` is one: itself, or NAME-00001-of-00003.gguf and those after it."""
    part = GGUF_PART.fullmatch(path.name)
    if part is None or not 1 <= int(part[2]) <= int(part[3]) <= MAX_PARTS:
        return (path,)
    return tuple(path.with_name(f"{part[1]}-{i:05d}-of-{part[3]}.gguf") for i in range(1, int(part[3]) + 1))


def _is_torch_bin(name: str) -> bool:
    return name.endswith(".bin") and name != "tokenizer.bin"


def _in_directory(path: Path) -> CheckpointFiles:
    for single, index, kind in ((SAFETENSORS, SAFETENSORS_INDEX, "safetensors"), (TORCH, TORCH_INDEX, "torch")):
        if (path / single).exists():
            return CheckpointFiles(_expect(path / single, kind), (path / single,))
        if (path / index).exists():
            return _indexed(path / index, kind)
    if shards := sorted(path.glob("consolidated.*.pth")):
        return CheckpointFiles("meta", _all_shards(shards))
    if candidates := sorted(p for p in path.iterdir() if p.suffix == ".pt" or _is_torch_bin(p.name)):
        if len(candidates) > 1:
            names = ", ".join(p.name for p in candidates)
            raise UserError(f"{path}: several files could be the weights ({names}); name the one that you mean")
        return CheckpointFiles(_format_of_file(candidates[0]), (candidates[0],))
    raise UserError(
        f"{path}: no weights here; looked for {SAFETENSORS}, {TORCH} (or their index), consolidated.*.pth, "
        "llama2.c's *.bin or *.pt, and *.gguf"
    )


def _indexed(index: Path, kind: str) -> CheckpointFiles:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no 'weight_map'; it is not the index of a sharded checkpoint")
    files: dict[str, Path] = {}
    for name, shard in weight_map.items():
        # A shard is a file beside its index and nothing else: the name comes from whoever made the checkpoint.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.-]*", shard):
            raise UserError(f"{index}: says that {name!r} is in {shard!r}, which is not the name of a file beside it")
        if shard not in files:
            files[shard] = index.parent / shard
            if not files[shard].is_file():
                raise UserError(f"{files[shard]}: missing, though {index.name} says that it holds {name!r}")
            _expect(files[shard], kind)
    found: Format = "safetensors" if kind == "safetensors" else "torch"
    return CheckpointFiles(found, tuple(files.values()), index, {n: files[s] for n, s in weight_map.items()})


def _all_shards(shards: list[Path]) -> tuple[Path, ...]:
    """Meta's pieces, numbered from 00 without a hole."""
    for number, shard in enumerate(shards):
        expected = shard.parent / f"consolidated.{number:02d}.pth"
        if shard != expected:
            raise UserError(f"{expected}: missing, though {shards[-1].name} is there")
        _expect(shard, "torch")
    return tuple(shards)


def _format_of_file(path: Path) -> Format:
    if re.fullmatch(r"consolidated\.\d+\.pth", path.name):
        _expect(path, "torch")
        return "meta"
    if path.name.endswith(".index.json"):
        raise UserError(f"{path}: is the index of a checkpoint; give the directory that it is in")
    head = first_bytes(path)
    if head.startswith(ZIP_MAGIC):
        return "torch"
    if head.startswith(GGUF_MAGIC):
        raise UserError(f"{path}: is a GGUF file; give it a name that ends in .gguf")
    if path.suffix == ".bin":
        llama2c_layout(path)
        return "llama2c"
    if path.suffix == ".safetensors":
        return _expect(path, "safetensors")
    raise wrong_file(path, "weights in a format that is known here (safetensors, PyTorch, llama2.c, GGUF)")


def _expect(path: Path, kind: str) -> Format:
    """The format of `path`, which its name says is `kind`."""
    head = first_bytes(path)
    if kind == "safetensors":
        # Eight bytes of length, then a JSON object. What is too short is told apart by the reader, as truncated.
        if len(head) > 8 and head[8:9] != b"{":
            raise wrong_file(path, "a safetensors file")
        return "safetensors"
    if not head.startswith(ZIP_MAGIC):
        if head.startswith(b"\x80"):
            raise UserError(f"{path}: is in PyTorch's old format, from before 1.6; save it again, best as safetensors")
        raise wrong_file(path, "a PyTorch checkpoint")
    return "torch"


def first_bytes(path: Path, count: int = 64) -> bytes:
    """The first bytes of a file. Raises UserError when it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not head:
        raise UserError(f"{path}: is empty; get it again")
    return head


def wrong_file(path: Path, wanted: str) -> UserError:
    """The error for a file that is not what its name says, with a guess at what it is."""
    head = first_bytes(path).lstrip()
    if head.startswith(GIT_LFS):
        return UserError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` there or get it again")
    if head[:1] == b"<":
        return UserError(f"{path}: is a web page, not {wanted}; get the file itself")
    return UserError(f"{path}: is not {wanted}; it begins with {head[:8]!r}")


def read_json(path: Path, limit: int = MAX_INDEX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises UserError when it is missing or anything else."""
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: is larger than {limit >> 20} MiB, too large for what it should be")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        if first_bytes(path).lstrip()[:1] != b"{":
            raise wrong_file(path, "JSON") from None
        raise UserError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds JSON, but not an object")
    return value


def llama2c_layout(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where each tensor of a llama2.c `.bin` is: Meta's name -> (offset in bytes, shape); "" is the end of the file.

    The orders are those of llama2.c's exports of version 0, which has two tables of the rotary embedding that nobody
    needs before its output, and 1. Raises UserError when the file does not begin with plausible dimensions.
    """
    if (head := first_bytes(path).lstrip()).startswith((GIT_LFS, b"<")) or not head.strip(b"\0"):
        raise wrong_file(path, "a llama2.c model")
    args = read_llama2c_header(path)
    dim, hidden, layers, heads, kv_heads, vocab, length = (int(str(args[name])) for name in LLAMA2C_ARGUMENTS)
    positive = min(dim, hidden, layers, heads, kv_heads, vocab, length) > 0
    if not positive or max(dim, hidden, vocab, length) >= 1 << 24 or layers >= 1 << 14 or dim % heads:
        raise wrong_file(path, "a llama2.c model")
    kv_dim = kv_heads * (dim // heads)
    norms: list[tuple[str, tuple[int, ...]]] = [("attention_norm", (dim,)), ("ffn_norm", (dim,))]
    attention = [(f"attention.w{x}", (rows, dim)) for x, rows in (("q", dim), ("k", kv_dim), ("v", kv_dim), ("o", dim))]
    ffn = [(f"feed_forward.w{i}", (dim, hidden) if i == 2 else (hidden, dim)) for i in (1, 2, 3)]

    def of_each_layer(kinds: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"layers.{i}.{kind}", shape) for kind, shape in kinds for i in range(layers)]

    embeddings, norm, rope_tables = ("tok_embeddings", (vocab, dim)), ("norm", (dim,)), ("", (length, dim // heads))
    if first_bytes(path).startswith(LLAMA2C_VERSIONED):
        at = 256
        order = [*of_each_layer(norms), norm, embeddings, *of_each_layer([*attention, *ffn])]
    else:
        at = 28
        order = [embeddings, *of_each_layer([norms[0], *attention, norms[1], *ffn]), norm, rope_tables]
    if not args["tie_word_embeddings"]:
        order.append(("output", (vocab, dim)))
    layout: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, shape in order:
        layout[f"{name}.weight"] = (at, shape)
        at += 4 * math.prod(shape)
    layout.pop(".weight", None)
    return {**layout, "": (at, ())}
