"""A program of ExecuTorch's as MODEL: which settings it fixes, and its engine. `cli.exporting_pte` makes them.

Within the program lies, as the bytes that `generate.executorch` gives, a zip archive of facts.json and of the model's
small files.
"""

import io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cli import exported
from config.errors import UserError
from config.registry import PTE_ENDING
from config.settings import BuildSettings
from generate.engine import Engine
from generate.executorch import Program, no_cache

if TYPE_CHECKING:  # it imports this module
    from cli.builder import Prepared

FORMAT = 1
FACTS = "facts.json"
MAX_FILE = 256 << 20
MAX_FILES = 256


@dataclass(frozen=True)
class Facts:
    """What is known of the model in a program."""

    format: int
    model: str
    """What was exported, as somebody named it."""
    recipe: dict[str, Any] | None
    max_seq_len: int
    prefill_chunk: int
    eos_token_ids: list[int]
    weight_bytes_per_token: int
    versions: dict[str, str]
    created: str
    dtype: str = "fp32"
    device: str = "cpu"
    max_num_seqs: int = 1


_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str, "recipe": (dict, type(None)), "max_seq_len": int, "prefill_chunk": int, "eos_token_ids": list,
    "weight_bytes_per_token": int, "versions": dict, "created": str, "dtype": str, "device": str, "max_num_seqs": int,
}  # fmt: skip


@dataclass(frozen=True)
class Pte:
    """A file that is loaded."""

    path: Path
    metadata: Facts
    program: Program


def packed(facts: Facts, files: Mapping[str, bytes]) -> bytes:
    """The facts and the small files of a model, by name, as bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(FACTS, json.dumps(vars(facts), indent=2) + "\n")
        for name, data in files.items():
            archive.writestr(f"model/{name}", data)
    return out.getvalue()


@contextmanager
def contents(settings: BuildSettings, path: Path | None) -> Iterator[tuple[BuildSettings, Path | None, Pte | None]]:
    """For a model at `path`: the settings that it leaves open, where its small files are, and the program if it is one.
    The files are there for as long as this is open. Raises UserError.
    """
    if path is None or path.suffix != PTE_ENDING:
        yield settings, path, None
        return
    program = Program(path)
    files = _unpacked(path, program.metadata)
    pte = Pte(path, _facts(path, files.pop(FACTS, b"")), program)
    settings = replace(exported.fixed(settings, pte), compile=False, compile_prefill=False)
    with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
        for name, data in files.items():
            target = Path(directory) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        yield settings, Path(directory) / "model", pte


def engine_of(prepared: "Prepared", pte: Pte) -> Engine:
    """One sequence at a time, on the cache that the program has."""
    facts = pte.metadata
    prepared.ledger.weight_bytes_per_token = facts.weight_bytes_per_token
    return Engine(
        pte.program,
        no_cache(facts.max_seq_len),
        prepared.tokenizer,
        vocab_size=prepared.config.vocab_size,
        eos_ids=frozenset(facts.eos_token_ids),
        prefill_chunk=facts.prefill_chunk,
        ledger=prepared.ledger,
    )


def remarks(pte: Pte) -> list[str]:
    """What a person should know before it runs."""
    facts, name = pte.metadata, pte.path.name
    return [
        f"{name} was exported from {facts.model}, {facts.created}; ExecuTorch runs it",
        f"{name} is a program, which runs as you do: use it if you trust whoever made it",
    ]


def _unpacked(path: Path, data: bytes) -> dict[str, bytes]:
    """The files in an archive, by names that lead nowhere else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_FILE:
                raise _damaged(path)
            for entry in entries:
                parts = PurePosixPath(entry.filename).parts
                if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename or entry.is_dir():
                    raise _damaged(path)
            return {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, OSError) as error:
        raise _damaged(path) from error


def _facts(path: Path, data: bytes) -> Facts:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _damaged(path)
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: is for another version of torchchat than this; export the model again")
    right = set(values) == {"format", *_KINDS} and all(isinstance(values[key], kind) for key, kind in _KINDS.items())
    if not right or min(values["max_seq_len"], values["prefill_chunk"]) < 1:
        raise _damaged(path)
    return Facts(**values)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged: what it says of its model cannot be read; export the model again")
