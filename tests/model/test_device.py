"""What "fast" means on hardware of every kind, told from what torch and the system say about it."""

import itertools
import json
import mmap

import psutil
import pytest
import torch

import model.device as device_module
from config.errors import UserError
from config.settings import Setting
from model.device import (
    Bandwidth,
    known_bandwidth,
    measure_bandwidth,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


def pretend(monkeypatch, *, cuda=False, mps=False, flags="", capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags.split()))


@pytest.mark.parametrize(
    ("cuda", "mps", "expected", "why"),
    [
        (True, True, "cuda", "fast: there is a GPU"),
        (False, True, "mps", "fast: no cuda"),
        (False, False, "cpu", "fast: no cuda, no mps"),
    ],
)
def test_fast_is_the_first_that_is_there(monkeypatch, cuda, mps, expected, why):
    pretend(monkeypatch, cuda=cuda, mps=mps)
    choice = resolve_device(Setting("fast"))
    assert (choice.device.type, choice.why) == (expected, why)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_what_is(monkeypatch, name):
    pretend(monkeypatch)
    with pytest.raises(UserError, match=rf"{name} \(--device\) is not there: .*use one of cpu, fast"):
        resolve_device(Setting(name, "--device"))


def test_an_asked_device_is_taken_though_a_faster_one_is_there(monkeypatch):
    pretend(monkeypatch, cuda=True)
    choice = resolve_device(Setting("cpu", "TORCHCHAT_DEVICE"))
    assert (choice.device, choice.why) == (CPU, "TORCHCHAT_DEVICE")


@pytest.mark.parametrize(
    ("device", "hardware", "fast", "fast16"),
    [
        ("cuda", {"capability": (9, 0)}, "bf16", "bf16"),
        ("cuda", {"capability": (8, 0)}, "bf16", "bf16"),
        ("cuda", {"capability": (7, 5)}, "fp16", "fp16"),
        ("mps", {}, "fp16", "fp16"),
        ("cpu", {"flags": "avx2 avx512_bf16 amx_bf16"}, "bf16", "bf16"),
        ("cpu", {"flags": "avx2 avx512_bf16"}, "bf16", "bf16"),
        ("cpu", {"flags": "asimd bf16"}, "bf16", "bf16"),
        ("cpu", {"flags": "avx2 avx512f"}, "fp32", "bf16"),
        ("cpu", {"flags": ""}, "fp32", "bf16"),
    ],
)
def test_fast_dtype_is_the_one_the_hardware_runs_well(monkeypatch, device, hardware, fast, fast16):
    pretend(monkeypatch, **hardware)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for asked, expected in (("fast", fast), ("fast16", fast16)):
        choice = resolve_dtype(Setting(asked), torch.device(device))
        assert (choice.name, choice.dtype) == (expected, names[expected])
        assert choice.why.startswith(f"{asked}: ")


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_an_asked_dtype_is_taken_as_it_is(monkeypatch, name):
    pretend(monkeypatch)
    choice = resolve_dtype(Setting(name, "--dtype"), CPU)
    assert (choice.name, choice.why) == (name, "--dtype")


def test_peak_memory_counts_what_was_freed_again_until_it_is_reset():
    """Memory from the system, not from the allocator, which may hold as much that an earlier test has freed."""
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    with mmap.mmap(-1, 64 * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert peak_memory_bytes(CPU) >= before + 60 * 2**20
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < before + 60 * 2**20


def test_measured_bandwidth_is_plausible(monkeypatch):
    monkeypatch.setattr(device_module, "_cpu_buffer_bytes", lambda: 16 * 2**20)
    measured = measure_bandwidth(CPU)
    assert 0.1 < measured.read_gb_s < 10_000
    assert 0.1 < measured.copy_gb_s < 10_000


@pytest.fixture
def alone(monkeypatch):
    """Nobody else uses the processors."""
    monkeypatch.setattr(device_module, "_cpu_seconds_of_others", lambda: 0.0)


def test_time_of_others_leaves_out_what_nobody_used():
    used = psutil.cpu_times()
    assert 0 < device_module._cpu_seconds_of_others() <= sum(used) - used.idle + 1


def test_bandwidth_measured_on_a_busy_machine_is_not_kept(monkeypatch, tmp_path):
    clock = itertools.count(0.0, 1000.0)
    monkeypatch.setattr(device_module, "_cpu_seconds_of_others", lambda: next(clock))
    monkeypatch.setattr(device_module, "measure_bandwidth", lambda device: Bandwidth(1.0, 2.0))
    assert known_bandwidth(CPU, tmp_path, pytest.fail) == Bandwidth(1.0, 2.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_bandwidth_is_kept_and_a_damaged_file_is_measured_again(monkeypatch, tmp_path):
    results = iter([Bandwidth(1.0, 2.0), Bandwidth(3.0, 4.0)])
    monkeypatch.setattr(device_module, "measure_bandwidth", lambda device: next(results))
    assert (
        known_bandwidth(CPU, tmp_path, pytest.fail)
        == known_bandwidth(CPU, tmp_path, pytest.fail)
        == Bandwidth(1.0, 2.0)
    )
    (file,) = (tmp_path / "bandwidth").iterdir()
    assert json.loads(file.read_text())["read_gb_s"] == 2.0
    file.write_text("{")
    assert known_bandwidth(CPU, tmp_path, pytest.fail) == Bandwidth(3.0, 4.0)


def test_bandwidth_needs_no_cache(monkeypatch):
    monkeypatch.setattr(device_module, "measure_bandwidth", lambda device: Bandwidth(1.0, 2.0))
    assert known_bandwidth(CPU, None, pytest.fail) == Bandwidth(1.0, 2.0)


@pytest.mark.usefixtures("alone")
def test_bandwidth_that_cannot_be_kept_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "measure_bandwidth", lambda device: Bandwidth(1.0, 2.0))
    (tmp_path / "bandwidth").touch()  # a file where the directory would be
    said = []
    assert known_bandwidth(CPU, tmp_path, said.append) == Bandwidth(1.0, 2.0)
    assert len(said) == 1


@pytest.mark.gpu
def test_a_gpu_measures_itself():
    gpu = resolve_device(Setting("cuda", "--device")).device
    measured = measure_bandwidth(gpu)
    assert 10 < measured.copy_gb_s < 20_000
    assert 10 < measured.read_gb_s < 20_000
    assert peak_memory_bytes(gpu) > 0
