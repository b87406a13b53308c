"""What an evaluation found, as lm-eval shows and writes it, with what ran and how fast. Measures nothing itself."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import handle_non_serializable, make_table

from cli.eval_model import EngineLM
from cli.ledger import Figures, rate, seconds

RESULTS = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What of lm-eval's results the JSON document has, by its names."""


@dataclass(frozen=True)
class Report:
    """lm-eval's results and the model that they are of, after it ran."""

    results: Mapping[str, Any]
    lm: EngineLM
    figures: Figures

    @classmethod
    def of(cls, results: Mapping[str, Any], lm: EngineLM) -> "Report":
        return cls(results, lm, Figures.take(lm.built.ledger, lm.engine.device))

    def lines(self) -> list[str]:
        """lm-eval's tables, then aligned lines."""
        tables = [make_table(self.results), *([make_table(self.results, "groups")] if "groups" in self.results else [])]
        rows = [*self._customization(), *self._speed()]
        return ["\n".join(tables), *(f"  {name:<10} {text}" for name, text in rows)]

    def _customization(self) -> list[tuple[str, str]]:
        prepared = self.lm.built.prepared
        settings = prepared.settings
        compiled = [part for part, on in (("decode", settings.compile), ("prefill", settings.compile_prefill)) if on]
        return [
            ("model", prepared.name),
            ("device", f"{prepared.device.device.type} ({prepared.device.why})"),
            ("dtype", f"{prepared.dtype.name} ({prepared.dtype.why})"),
            ("quantized", prepared.plan.describe() if prepared.plan is not None else "no"),
            ("compiled", f"{' and '.join(compiled)}, and scoring" if compiled else "no, eager"),
            ("context", f"{self.lm.max_length:,} tokens, {self.lm.rows} at a time{self._cut()}"),
        ]

    def _cut(self) -> str:
        cut = self.lm.work.cut
        return f"; {cut} of {self.lm.work.requests} requests were longer, and lost their beginning" if cut else ""

    def _speed(self) -> list[tuple[str, str]]:
        work, ledger = self.lm.work, self.lm.built.ledger
        compile_s = ledger.phase_s["compile"]
        requests, tokens = self._per_second(work.requests), self._per_second(work.tokens)
        return [
            *([("compile", seconds(compile_s))] if compile_s else []),
            ("requests", f"{work.requests:,} in {seconds(work.seconds)}: {requests:.4g} a second"),
            ("tokens", f"{work.tokens:,}: {rate(tokens)}; {work.read:,} were computed, the others shared"),
        ]

    def _per_second(self, count: int) -> float:
        return count / self.lm.work.seconds if self.lm.work.seconds else 0.0

    def document(self, files: Sequence[Path]) -> dict[str, Any]:
        """What --json prints; its keys are a promise."""
        work = self.lm.work
        found = {name: self.results[name] for name in RESULTS if name in self.results}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
        return {
            **plain,
            "settings": self.lm.customization(),
            "stats": {
                "requests": work.requests,
                "requests_cut": work.cut,
                "tokens": work.tokens,
                "tokens_computed": work.read,
                "seconds": work.seconds,
                "requests_s": self._per_second(work.requests),
                "tokens_s": self._per_second(work.tokens),
                "load_s": self.figures.ledger.phase_s["load"],
                "quantize_s": self.figures.ledger.phase_s["quantize"],
                "compile_s": self.figures.ledger.phase_s["compile"],
                "peak_memory_bytes": self.figures.peak_memory_bytes,
            },
            "files": [str(file) for file in files],
        }


def new_tracker(output_path: Path | None) -> EvaluationTracker:
    """What writes lm-eval's files, told where."""
    return EvaluationTracker(output_path=None if output_path is None else str(output_path))


def save(tracker: EvaluationTracker, results: Mapping[str, Any], samples: Mapping[str, Any] | None) -> list[Path]:
    """Write lm-eval's files; their paths. Raises OSError, and leaves no file that is not whole."""
    path = Path(tracker.output_path)
    folder = path.parent if path.suffix == ".json" else path / str(tracker.general_config_tracker.model_name_sanitized)
    before = set(_files(folder))
    with _failures() as failures:
        tracker.save_results_aggregated(results=dict(results), samples=samples)
        for name, of_task in (samples or {}).items():
            if not failures:
                tracker.save_results_samples(task_name=name, samples=of_task)
    written = sorted(set(_files(folder)) - before)
    if failures:
        for file in written:
            file.unlink(missing_ok=True)
        raise OSError(f"--output-path {path}: nothing was written: {failures[-1]}")
    return written


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("*.json*") if file.is_file())


@contextlib.contextmanager
def _failures() -> Iterator[list[str]]:
    """What goes wrong inside: lm-eval's tracker says it to its log alone."""
    found: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING or found:  # a warning, then its reason
                found.append(record.getMessage())

    logger = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    handler, level = Note(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
