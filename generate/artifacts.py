"""What a compiled step depends on besides its own shape, as one key; and whether this machine can compile at all."""

import functools
import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from config.errors import UserError

SOURCES = ("model", "generate")


def environment_key(device: torch.device, *parts: str) -> str:
    """A key that differs wherever compiled code might: torch, our own sources, the processor, its threads, `parts`."""
    facts = [
        torch.__version__,
        str(torch.version.git_version),
        str(torch.version.cuda),
        sys.version,
        platform.machine(),
        _sources(),
        *_device(device),
        *parts,
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def native_compiler() -> str:
    """The C++ compiler that Inductor will call. Raises UserError where there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise UserError(
        "--compile needs a C++ compiler, and there is no g++ or clang++ here: install one (on Debian: g++), "
        "set CXX to it, or leave out --compile"
    )


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return ["cuda", properties.name, f"{properties.major}.{properties.minor}"]
    # The number of threads is written into the code that is made for the CPU.
    return [device.type, torch.backends.cpu.get_cpu_capability(), _cpu_flags(), str(torch.get_num_threads())]


@functools.cache
def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def _sources() -> str:
    """The hash of the code that steps are made of."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
