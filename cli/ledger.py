"""The ledger as a person and as a script see it: aligned lines, or the `stats` of the JSON document. Measures nothing
but the machine's bandwidth, once, to set the figures against."""

from dataclasses import dataclass

import torch

from cli.console import cache_dir_or_say, human_bytes, warn
from generate.stats import Ledger
from model.device import known_bandwidth, peak_memory_bytes


@dataclass(frozen=True)
class Figures:
    """A ledger, with what is measured around it. `read_bytes_s`: the machine's read bandwidth; None if unknown."""

    ledger: Ledger
    peak_memory_bytes: int
    read_bytes_s: float | None

    @classmethod
    def take(cls, ledger: Ledger, device: torch.device) -> "Figures":
        """The figures as they stand now. The first time on a machine this measures its bandwidth: half a second."""
        peak = peak_memory_bytes(device)  # first: measuring takes memory
        if ledger.decode_tok_s is None:
            return cls(ledger, peak, None)
        try:
            return cls(ledger, peak, known_bandwidth(device, cache_dir_or_say(), warn).read_gb_s * 1e9)
        except (torch.OutOfMemoryError, KeyboardInterrupt):  # no room beside the model, or no time: then without
            return cls(ledger, peak, None)

    def document(self) -> dict[str, float | int | None]:
        """`stats` of the JSON document; null for what did not happen."""
        ledger = self.ledger
        return {
            "load_s": ledger.phase_s["load"],
            "quantize_s": ledger.phase_s["quantize"],
            "compile_s": ledger.phase_s["compile"],
            "ttft_s": ledger.ttft_s,
            "prefill_tok_s": ledger.prefill_tok_s,
            "decode_tok_s": ledger.decode_tok_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "weight_bytes_per_token": ledger.weight_bytes_per_token,
            "bandwidth_share": ledger.bandwidth_share(self.read_bytes_s),
        }

    def lines(self) -> list[str]:
        """One aligned line a figure; phases that took no time are left out."""
        ledger = self.ledger
        phases = ledger.phase_s.items()
        rows: list[tuple[str, str, str]] = [(name, seconds(spent), "") for name, spent in phases if spent]
        if ledger.ttft_s is not None:
            rows.append(("first token", seconds(ledger.ttft_s), "after the prompt was given"))
        if ledger.prefill_tok_s is not None:
            rows.append(("prefill", rate(ledger.prefill_tok_s), _counted(ledger.prefill_tokens, ledger.prefill_s)))
        if ledger.decode_tok_s is not None:
            rows.append(("decode", rate(ledger.decode_tok_s), _counted(ledger.decode_tokens, ledger.decode_s)))
        rows.append(("memory", human_bytes(self.peak_memory_bytes), "at its peak"))
        rows.append(("weights", human_bytes(ledger.weight_bytes_per_token), f"a token{self._bandwidth()}"))
        return [f"  {name:<12} {value:>12}  {note}".rstrip() for name, value, note in rows]

    def _bandwidth(self) -> str:
        weight_bytes_s, share = self.ledger.weight_bytes_s, self.ledger.bandwidth_share(self.read_bytes_s)
        if weight_bytes_s is None or share is None or self.read_bytes_s is None:
            return ""
        return f": {human_bytes(weight_bytes_s)}/s, {share:.0%} of this machine's {human_bytes(self.read_bytes_s)}/s"


def seconds(value: float) -> str:
    """ "850 ms", "4.20 s", "85 s"."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def rate(tok_s: float) -> str:
    """ "12.3 tok/s", "1,234 tok/s"."""
    return f"{tok_s:,.0f} tok/s" if tok_s >= 100 else f"{tok_s:.1f} tok/s"


def _counted(tokens: int, spent: float) -> str:
    return f"{tokens:,} token{'s' if tokens != 1 else ''} in {seconds(spent)}"
