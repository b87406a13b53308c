"""Our ops in C++, for programs that are compiled ahead and run without Python: a library is compiled once and kept, and
goes into the package that calls its ops. Knows how one is made and loaded; not what the ops compute.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from config.cache import is_whole, keep
from config.compiler import cpu_flags, cxx_compiler
from config.errors import UserError

_FOLDER = Path(__file__).parent / "native"
ATTENTION = (_FOLDER / "attention.cpp", _FOLDER / "register.h")
PRODUCTS = (_FOLDER / "products.cpp", _FOLDER / "products.h", _FOLDER / "register.h")
EXPERTS = (_FOLDER / "experts.cpp", _FOLDER / "experts.h", *PRODUCTS[1:])
"""The first of each is compiled, and includes the others."""
FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp")
KEPT_LIBRARIES = 4
COMPILE_TIMEOUT_S = 300

_loaded: set[str] = set()


def op_library(
    sources: tuple[Path, ...],
    cache: Path | None,
    say: Callable[[str], None],
    choices: tuple[tuple[str, ...], ...] = ((),),
) -> bytes:
    """The library of `sources`, of which the first is compiled and includes the others; out of `cache` if it is kept
    there. choices: further flags, the best first: not every compiler has every one. Raises UserError.
    """
    try:
        compiler = cxx_compiler()
    except FileNotFoundError as error:
        raise UserError(f"exporting needs a C++ compiler, and {error}: install one (on Debian: g++)") from error
    facts = (torch.__version__, str(torch.version.git_version), compiler, cpu_flags(), FLAGS, choices)
    digest = hashlib.sha256(repr(facts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    kept = None if cache is None else cache / "ops" / f"{digest.hexdigest()}.so"
    if kept is not None and (found := _kept(kept)) is not None:
        return found
    say(f"compiling {sources[0].parent.parent.name}/native/{sources[0].name}, once: some seconds")
    with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
        made = Path(directory) / "ops.so"
        _compile(compiler, sources[0], made, choices)
        data = made.read_bytes()
    if kept is not None:
        try:
            keep(data, kept, KEPT_LIBRARIES)
        except OSError as error:
            say(f"what was compiled is not kept: {kept.parent}: {error.strerror}")
    return data


def _kept(path: Path) -> bytes | None:
    """None if it is missing or damaged."""
    try:
        if not is_whole(path):
            return None
        os.utime(path)
        return path.read_bytes()
    except OSError:
        return None


def _compile(compiler: str, source: Path, made: Path, choices: tuple[tuple[str, ...], ...]) -> None:
    root = Path(torch.__file__).parent
    include = root / "include"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    paths = (f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{root / 'lib'}")
    why = ""
    for choice in choices:
        command = [compiler, *FLAGS, *choice, abi, *paths, str(source), "-o", str(made), "-lc10", "-ltorch_cpu"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"exporting: {compiler} took more than {COMPILE_TIMEOUT_S} s for {source.name}") from error
        if os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0"):
            print(" ".join(command), done.stderr, sep="\n", file=sys.stderr)
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
    raise UserError(f"exporting: {compiler} failed on {source.name}: {why}; see all of it with TORCHCHAT_DEBUG=1")


def load_op_library(path: Path) -> None:
    """Register the ops of a library, once a process. Raises UserError."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in _loaded:
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"the code of the package does not load here: {error}") from error
    _loaded.add(digest)
