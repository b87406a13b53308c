"""What code that was compiled ahead needs of the machine that runs it, and whether this one has it. Knows torch, the
processor and the GPU; not what the code does.
"""

import platform
import re
import sys
from dataclasses import dataclass

import torch

from config.compiler import cpu_flags

USED = re.compile(r"(sse|ssse|avx|fma|f16c|bmi|popcnt|movbe|abm|aes|vaes|pclmul|vpclmul|gfni|sha_|amx).*")
"""Flags of x86 processors for what a compiler may make use of by itself."""


@dataclass(frozen=True)
class Environment:
    """None: does not matter."""

    torch_version: str
    python: str | None
    cuda: str | None
    platform: str
    instructions: tuple[str, ...]
    capability: str | None

    @classmethod
    def here(cls, device: torch.device, needs_python: bool) -> "Environment":
        """What code needs that is compiled here for `device`."""
        on_gpu = device.type == "cuda"
        return cls(
            torch_version=torch.__version__.partition("+")[0],
            python=f"{sys.version_info.major}.{sys.version_info.minor}" if needs_python else None,
            cuda=torch.version.cuda if on_gpu else None,
            platform=f"{sys.platform} {platform.machine()}",
            instructions=() if on_gpu else instructions(),
            capability=".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else None,
        )

    def missing(self, here: "Environment") -> str | None:
        """Why code that needs this does not run `here`, in words that follow "it was exported"; None if it does."""
        for name, wanted, found in (
            ("torch", self.torch_version, here.torch_version),
            ("Python", self.python, here.python),
            ("CUDA", self.cuda, here.cuda),
            ("", self.platform, here.platform),
            ("a GPU of compute capability", self.capability, here.capability),
        ):
            if wanted is not None and wanted != found:
                how = "with" if name in ("torch", "Python", "CUDA") else "for"
                return f"{how} {name} {wanted}".replace("  ", " ") + f", and here is {found or 'none'}"
        lacking = [flag for flag in self.instructions if flag not in here.instructions]
        if lacking:
            others = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
            return f"for a processor with {', '.join(lacking[:4])}{others}, which this one does not have"
        return None


def instructions() -> tuple[str, ...]:
    """The instruction sets of this processor, as the system spells them."""
    flags = cpu_flags().partition(":")[2].split() or cpu_flags().split()
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags = [flag for flag in flags if USED.fullmatch(flag)]
    return tuple(sorted(set(flags)))
