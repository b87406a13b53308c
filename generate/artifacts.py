"""Compiled steps as files: the key that one is kept under, keeping and finding it, and the compiler that makes it. Does
not know how a step is compiled or loaded.
"""

import functools
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

from config.cache import keep
from config.compiler import cpu_flags, cxx_compiler
from config.errors import UserError

STEP_SOURCES = (
    "generate/artifacts.py",
    "generate/backends.py",
    "generate/compilation.py",
    "generate/exported.py",
    "generate/sampling.py",
    "generate/step.py",
    "model/attention.py",
    "model/config_types.py",
    "model/kernels.py",
    "model/kv_cache.py",
    "model/layers.py",
    "model/moe.py",
    "model/moe_experts.py",
    "model/moe_kernels.py",
    "model/moe_triton.py",
    "model/ops.py",
    "model/portable.py",
    "model/products.py",
    "model/rope.py",
    "model/tracing.py",
    "model/transformer.py",
    "model/triton_kernels.py",
    "quant/activations.py",
    "quant/experts.py",
    "quant/formats.py",
    "quant/kernels.py",
    "quant/matmul.py",
    "quant/modules.py",
    "quant/ops.py",
    "quant/packed.py",
    "quant/triton_experts.py",
    "quant/triton_kernels.py",
    "quant/triton_matmul.py",
)
"""Our own code that decides what a compiled step computes. What reads a configuration is not in it: the configuration
that came of it is in the key. Nor are the products in C++: a step calls their op by name, which runs what is there
then.
"""

KEPT_PACKAGES = 64
"""How many compiled steps a directory keeps; the ones unused for longest go first."""
ROOM_BYTES = 4 * 2**20
"""What the compilers write for one step beside what is kept, roughly."""


def environment_key(device: torch.device, *parts: str) -> str:
    """A key that differs wherever compiled code might: torch, our own sources, the processor, its threads, `parts`."""
    facts = [
        torch.__version__,
        str(torch.version.git_version),
        str(torch.version.cuda),
        sys.version,
        platform.machine(),
        step_sources(),
        *_device(device),
        *parts,
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def native_compiler() -> str:
    """The C++ compiler to use. Raises UserError where there is none."""
    try:
        return cxx_compiler()
    except FileNotFoundError as error:
        raise UserError(
            f"compiling needs a C++ compiler, and {error}: install one (on Debian: g++), set CXX to one, or leave out "
            "--compile and --compile-prefill"
        ) from error


def check_can_compile(cache_dir: Path | None) -> None:
    """Raises UserError where compiled steps cannot be had: no compiler, and nothing that one made was kept."""
    if cache_dir is None or not any(kept_in(cache_dir).glob("*.pt2")):
        native_compiler()


def kept_in(cache_dir: Path) -> Path:
    return cache_dir / "compiled"


def keep_package(made: Path, path: Path) -> None:
    """Keep a copy of the file `made` as `path`, and of its neighbours those used last. Raises OSError."""
    keep(made.read_bytes(), path, KEPT_PACKAGES)


def let_compilers_keep(cache_dir: Path | None) -> None:
    """Says to the compilers where to keep what is theirs (checks of this machine, CUDA kernels), unless the person has:
    in the cache directory, or where nothing can be written there, for as long as this process lives, in a directory of
    its own. Their default has a name in the shared temporary directory that anybody can guess and take.
    """
    variables = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    if all(name in os.environ for name in variables):
        return
    root = cache_dir if cache_dir is not None and _has_room(cache_dir) else Path(_private_directory().name)
    for name, folder in variables.items():
        os.environ.setdefault(name, str(root / folder))


def _has_room(cache_dir: Path) -> bool:
    try:
        for folder in ("inductor", "triton"):
            (cache_dir / folder).mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache_dir / folder) as file:
                file.write(bytes(ROOM_BYTES))  # a quota shows itself in no other way
    except OSError:
        return False
    return True


@functools.cache
def _private_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True)


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return ["cuda", properties.name, f"{properties.major}.{properties.minor}"]
    # The number of threads is written into the code that is made for the CPU.
    return [device.type, torch.backends.cpu.get_cpu_capability(), cpu_flags(), str(torch.get_num_threads())]


@functools.cache
def step_sources() -> str:
    """The hash of the code that steps are made of."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in STEP_SOURCES:
        digest.update(name.encode())
        digest.update((root / name).read_bytes())
    return digest.hexdigest()
