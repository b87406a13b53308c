"""The hardware: which device and dtype "fast" means here and why, peak memory, memory bandwidth. Knows no model."""

import ctypes
import json
import mmap
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import psutil
import torch

from config.cache import atomic_write
from config.errors import UserError
from config.settings import Setting

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_BUFFER_BYTES = 512 * 2**20
GPU_BUFFER_BYTES = 2 * 2**30
BUSY_SHARE = 0.15
"""Of all processors' time: from there on the machine counts as used by others."""


@dataclass(frozen=True)
class DeviceChoice:
    """A device and why it was taken, in words that fit in brackets: "cpu (fast: no cuda, no mps)"."""

    device: torch.device
    why: str


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, its name as `--dtype` spells it, and why it was taken."""

    dtype: torch.dtype
    name: str
    why: str


@dataclass(frozen=True)
class Bandwidth:
    """Memory bandwidth in GB/s (1e9 bytes): a copy counts what is read and what is written, a read what is read."""

    copy_gb_s: float
    read_gb_s: float


def available_devices() -> list[str]:
    """What is there, fastest first; "cpu" always is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in there.items() if is_there]


def resolve_device(setting: Setting) -> DeviceChoice:
    """The device that was asked for, or for "fast" the first of cuda, mps, cpu. UserError if it is not there."""
    there = available_devices()
    if setting.value == "fast":
        why = {"cuda": "there is a GPU", "mps": "no cuda", "cpu": "no cuda, no mps"}[there[0]]
        return DeviceChoice(_device(there[0]), f"fast: {why}")
    if setting.value not in there:
        raise UserError(
            f"device {setting.value} ({setting.source}) is not there: {_why_missing(setting.value)}; "
            f"use one of {', '.join([*there, 'fast'])}"
        )
    return DeviceChoice(_device(setting.value), setting.source)


def _device(name: str) -> torch.device:
    # With its index, so that it equals the device of the tensors on it.
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _why_missing(name: str) -> str:
    if name == "cuda":
        built = torch.version.cuda is not None or torch.version.hip is not None
        return "torch sees no GPU" if built else f"torch {torch.__version__} is built without CUDA"
    built = torch.backends.mps.is_built()
    return "this macOS or Mac does not offer it" if built else f"torch {torch.__version__} is built without MPS"


def resolve_dtype(setting: Setting, device: torch.device, stored: str | None = None) -> DtypeChoice:
    """The dtype asked for; for "fast" the fastest that `device` runs well; for "fast16" its best 16-bit type.

    stored: the dtype that quantized weights were made for, as --dtype spells it. "fast" is then that one, and "fast16"
    if it has 16 bits, unless the device does not run it; a choice that is another says so.
    """
    if stored is not None and setting.value != stored:
        runs = stored != "bf16" or device.type == "cpu" or _bf16_hardware(device)[0]
        if runs and (setting.value == "fast" or (setting.value == "fast16" and stored != "fp32")):
            return DtypeChoice(TORCH_DTYPES[stored], stored, f"{setting.value}: as stored")
        choice = resolve_dtype(setting, device)
        return choice if choice.name == stored else replace(choice, why=f"{choice.why}; stored in {stored}")
    if setting.value not in ("fast", "fast16"):
        return DtypeChoice(TORCH_DTYPES[setting.value], setting.value, setting.source)
    has_bf16, hardware = _bf16_hardware(device)
    if has_bf16:
        name, why = "bf16", hardware
    elif device.type != "cpu":
        name, why = "fp16", hardware
    elif setting.value == "fast16":
        name, why = "bf16", f"{hardware}: slow, with the range of fp32"
    else:
        name, why = "fp32", hardware
    return DtypeChoice(TORCH_DTYPES[name], name, f"{setting.value}: {why}")


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    """Whether the device computes in bf16 at full speed, and what that is known from."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return (True, f"{name} has bf16") if major >= 8 else (False, f"{name} (sm{major}{minor}) has no bf16")
    if device.type == "mps":
        return False, "not every Mac has bf16"
    flags = _cpu_flags()
    for flag, words in (("amx_bf16", "AMX bf16"), ("avx512_bf16", "AVX-512 bf16"), ("bf16", "Arm bf16")):
        if flag in flags:
            return True, f"the CPU has {words}"
    return False, "the CPU has no bf16 instructions" if flags else "what the CPU can do is not known"


def _cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux lists them; empty elsewhere. (torch's own queries are private and change.)"""
    return frozenset(_cpu_info("flags", "Features").split())


def _cpu_info(*keys: str) -> str:
    """The value of the first of `keys` (x86 and Arm name them differently) in /proc/cpuinfo, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((value.strip() for key, _, value in (x.partition(":") for x in lines) if key.strip() in keys), "")


def device_name(device: torch.device) -> str:
    """The hardware's own name: "NVIDIA H200", "Intel(R) Xeon(R) Processor", "arm"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info("model name") or platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used since `reset_peak_memory`, in bytes: of a GPU what torch allocated on it, of a CPU the
    process's resident memory. Where a peak cannot be reset (macOS) it is that of the whole process; MPS keeps no peak,
    so there it is what is allocated now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # unlike ru_maxrss, reset by clear_refs
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew from what is used now, where the platform can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
        except OSError:
            return  # a hardened container forbids it: the peak then covers the whole process, never less


def give_back_freed_memory() -> None:
    """Return to the system what the CPU's allocator holds of memory that is free; nothing where it cannot be asked.

    Large tensors that stay, made between many that go, leave it in pieces: after quantizing 0.6 billion weights to
    int8, 70 to 105 MB beside 597 MB of weights (glibc 2.36).
    """
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def known_bandwidth(device: torch.device, directory: Path | None, say: Callable[[str], None]) -> Bandwidth:
    """This machine's bandwidth as kept in `directory` (the cache directory), measured and kept if it is not there yet.

    `say` is told if it cannot be kept. What was measured while others used the processors is not kept, so that one busy
    moment does not spoil every later figure. Measuring takes memory: read `peak_memory_bytes` before.
    """
    key = f"{device_name(device)}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}"
    file = directory and directory / "bandwidth" / f"{device.type}-{sha256(key.encode()).hexdigest()[:16]}.json"
    if file is None:
        return measure_bandwidth(device)
    try:
        kept = json.loads(file.read_text())
        if kept["key"] == key and min(kept["copy_gb_s"], kept["read_gb_s"]) > 0:
            return Bandwidth(copy_gb_s=float(kept["copy_gb_s"]), read_gb_s=float(kept["read_gb_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measured anew below
    began, others_began_s = time.monotonic(), _cpu_seconds_of_others()
    measured = measure_bandwidth(device)
    processor_s = (time.monotonic() - began) * (os.cpu_count() or 1)
    if _cpu_seconds_of_others() - others_began_s > BUSY_SHARE * processor_s:
        return measured
    try:
        atomic_write(file, json.dumps({"key": key, **asdict(measured)}, indent=1).encode())
    except OSError as error:  # a full disk costs the next run half a second, nothing else
        say(f"the measured bandwidth is not kept: {error}")
    return measured


def _cpu_seconds_of_others() -> float:
    """Processor time that other processes, and other guests of the same host, have used since the system started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in "user" too
    ours = os.times()
    return float(sum(spent for name, spent in times.items() if name not in idle)) - ours.user - ours.system


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Measure reading and copying over buffers well beyond the last cache: the best of several, by several kernels.

    Takes about half a second on a CPU. No single kernel is the fastest reader everywhere, and a slow one would make
    the share of the bandwidth that a model reaches look better than it is.
    """
    if device.type == "cpu":
        buffer = _cpu_buffer(_cpu_buffer_bytes())
        source, target = buffer.chunk(2)
    else:
        size = GPU_BUFFER_BYTES
        if device.type == "cuda":
            size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
        size = max(size & ~0xFFFF, 0x10000)
        buffer = source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
    matrix_MN = buffer.view(torch.float32).view(-1, 4096)
    vector_N = torch.ones(4096, dtype=torch.float32, device=device)
    words = buffer.view(torch.int32)
    readers: list[Callable[[], object]] = [lambda: torch.mv(matrix_MN, vector_N), words.amax, matrix_MN.sum]
    fastest = min(readers, key=lambda read: _seconds(read, device, repeats=2))
    read_s = _seconds(fastest, device, repeats=4)
    copy_s = _seconds(lambda: target.copy_(source), device, repeats=4)
    return Bandwidth(copy_gb_s=2 * source.nbytes / copy_s / 1e9, read_gb_s=buffer.nbytes / read_s / 1e9)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest time of `repeats` runs of `work`; on CUDA by its own clock, which leaves out the launch."""
    if device.type == "cuda":
        best = float("inf")
        for _ in range(repeats + 1):  # one more: the first loads the kernel
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return best
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _cpu_buffer(size: int) -> torch.Tensor:
    """`size` bytes that are really there (written once), on huge pages where the system has them: 4x faster to get."""
    memory = mmap.mmap(-1, size)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def _cpu_buffer_bytes() -> int:
    """Twice all last-level caches together, at least 512 MB, at most a quarter of the memory that is free."""
    size = max(CPU_BUFFER_BYTES, 2 * _last_level_cache_bytes())
    return max(min(size, int(psutil.virtual_memory().available) // 4), 2**20) & ~0xFFFF


def _last_level_cache_bytes() -> int:
    """The sum of the distinct level-3 caches, in bytes; 0 where the system does not say."""
    caches = {}
    for entry in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (entry / "size").read_text().strip()
            caches[(entry / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(caches.values())
