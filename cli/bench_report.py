"""What `bench` found, as a person and as a script see it: a table that grows as rows come, or one JSON document."""

import json
import platform
from typing import Any

import torch

from cli.builder import Prepared
from cli.console import human_bytes
from cli.ledger import rate, seconds
from cli.measure import DecodeRate, Machine, PrefillRate
from config import __version__
from generate.stats import Ledger
from model.device import device_name

LABEL, CELL = 24, 14


class Report:
    """Takes figures in the order in which they are shown. `show`: print each row as it comes."""

    def __init__(self, prepared: Prepared, max_seq_len: int, repeats: int, *, show: bool) -> None:
        self.prepared, self.max_seq_len, self.repeats, self.show = prepared, max_seq_len, repeats, show
        self.device = prepared.device.device
        self.machine: Machine | None = None
        self.load_s = self.quantize_s = 0.0
        self.compile_s: list[tuple[float, float]] = []
        self.prefill: list[PrefillRate] = []
        self.decode: list[DecodeRate] = []
        self.peak_memory_bytes = 0

    def machine_is(self, machine: Machine) -> None:
        self.machine = machine
        self._row("machine", note=_machine_name(self.device))
        self._row("memory", note=f"copies {machine.copy_gb_s:,.1f} GB/s, reads {machine.read_gb_s:,.1f} GB/s")
        self._row("matrices", note=f"{self.prepared.dtype.name}: {machine.matrix_tflop_s:,.3g} TFLOP/s")

    def loaded(self, ledger: Ledger) -> None:
        self.load_s, self.quantize_s = ledger.phase_s["load"], ledger.phase_s["quantize"]
        if self.quantize_s:
            self._row("quantize", seconds(self.quantize_s))
        self._row("load", seconds(self.load_s), note=f"{human_bytes(ledger.weight_bytes_per_token)} of weights a token")

    def compiled(self, batch: int, cold_s: float, warm_s: float) -> None:
        """The steps for a batch size were compiled in `cold_s` and, once kept, were there again in `warm_s`."""
        self.compile_s.append((cold_s, warm_s))
        self._row(f"compile, batch {batch}", seconds(cold_s), note=f"{seconds(warm_s)} once it is kept")

    def prefilled(self, row: PrefillRate) -> None:
        assert self.machine is not None
        if not self.prefill:
            self._row()
            self._row("prefill", "", "first token", "TFLOP/s", "of matrices")
        self.prefill.append(row)
        share = row.tflop_s / self.machine.matrix_tflop_s
        label, tflop_s = f"  {row.tokens:,} tokens", f"{row.tflop_s:.3g}"
        self._row(label, rate(row.tok_s), _milliseconds(row.seconds), tflop_s, f"{share:.0%}")

    def decoded(self, row: DecodeRate) -> None:
        assert self.machine is not None
        gpu = self.device.type == "cuda"
        if not self.decode:
            self._row()
            self._row("decode", "", "step", "weights", "of reading", *(["of copying"] if gpu else []))
        self.decode.append(row)
        batch = f", batch {row.batch}" if row.batch > 1 else ""
        shares = [f"{row.weight_gb_s / self.machine.read_gb_s:.0%}"]
        shares += [f"{row.weight_gb_s / self.machine.copy_gb_s:.0%}"] if gpu else []
        weights = f"{row.weight_gb_s:,.1f} GB/s"
        self._row(f"  after {row.context:,}{batch}", rate(row.tok_s), _milliseconds(row.step_s), weights, *shares)

    def ended(self, peak_memory_bytes: int) -> None:
        self.peak_memory_bytes = peak_memory_bytes
        self._row()
        self._row("peak memory", human_bytes(peak_memory_bytes))
        runs = f"medians of {self.repeats} runs" if self.repeats > 1 else "single runs"
        self._row(f"Rates are {runs} after one that does not count, greedy; GB and TFLOP are 10^9 and 10^12.")

    def document(self) -> dict[str, Any]:
        """What --json prints; the keys named in docs/commands.md are a promise."""
        assert self.machine is not None
        prepared, settings, machine = self.prepared, self.prepared.settings, self.machine
        return {
            "machine": {
                "device": self.device.type,
                "name": device_name(self.device),
                "threads": torch.get_num_threads(),
                "copy_gb_s": machine.copy_gb_s,
                "read_gb_s": machine.read_gb_s,
                "matrix_tflop_s": machine.matrix_tflop_s,
            },
            "settings": {
                "model": prepared.name,
                "random_weights": settings.random_weights,
                "device": self.device.type,
                "dtype": prepared.dtype.name,
                "quantize": None if settings.quantize is None else json.loads(settings.quantize),
                "compile": settings.compile,
                "compile_prefill": settings.compile_prefill,
                "max_seq_len": self.max_seq_len,
                "repeats": self.repeats,
            },
            "versions": {"torchchat": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "load_s": self.load_s,
            "quantize_s": self.quantize_s,
            "compile_s": sum(cold for cold, _ in self.compile_s),
            "compile_warm_s": sum(warm for _, warm in self.compile_s) if self.compile_s else None,
            "prefill": [
                {
                    "tokens": row.tokens,
                    "tok_s": row.tok_s,
                    "tflop_s": row.tflop_s,
                    "matrix_share": row.tflop_s / machine.matrix_tflop_s,
                }
                for row in self.prefill
            ],
            "decode": [
                {
                    "context": row.context,
                    "batch": row.batch,
                    "tok_s": row.tok_s,
                    "weight_gb_s": row.weight_gb_s,
                    "bandwidth_share": row.weight_gb_s / machine.read_gb_s,
                    "copy_share": row.weight_gb_s / machine.copy_gb_s,
                }
                for row in self.decode
            ],
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def _row(self, label: str = "", *cells: str, note: str = "") -> None:
        if self.show:
            text = "".join(f"{cell:>{CELL}}" for cell in cells)
            print(f"{label:<{LABEL}}{text}{'  ' if cells and note else ''}{note}".rstrip(), flush=True)


def _machine_name(device: torch.device) -> str:
    name = device_name(device)
    if device.type != "cpu":
        return name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _milliseconds(value: float) -> str:
    """Three digits: "4.52 ms", "81.3 ms", "1,230 ms"."""
    ms = value * 1000
    return f"{ms:,.0f} ms" if ms >= 999.5 else f"{ms:.3g} ms"
