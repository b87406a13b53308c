"""The C++ compiler of this machine, and the processor that it compiles for. Does not know what is compiled."""

import functools
import os
import platform
import shutil
from pathlib import Path


def cxx_compiler() -> str:
    """The C++ compiler to use: what `CXX` names, else g++, else clang++. FileNotFoundError says what is missing."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"CXX names {wanted}, which is not there" if wanted else "there is no g++ or clang++ here")


@functools.cache
def cpu_flags() -> str:
    """What the processor can do, as the system spells it: what is compiled for it may run on no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
