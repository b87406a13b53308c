"""The command `bench`: what a model does on this machine, and what the machine could do. Decides what is measured and
shows it; `cli.measure` measures. Imports torch only once the flags are known to be good.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.console import Progress, describe_build, human_bytes, status, warn
from cli.hub import locate
from cli.options import add_model_arguments, build_settings, whole_number
from config.errors import UserError
from config.settings import MAX_COUNT, BuildSettings, shorten

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from cli.bench_report import Report
    from cli.builder import Prepared
    from generate.engine import Engine
    from model.transformer import Transformer

PREFILL_TOKENS = {"cpu": (128, 512), "mps": (128, 512, 2048), "cuda": (128, 512, 2048)}
CONTEXTS = (128, 1024, 4096)
MAX_BATCH = 1024
MAX_LENGTHS = 64
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `bench`."""
    add_model_arguments(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--random-weights",
        metavar="NAME",
        help="in place of MODEL: the shapes of a known model, or of a directory with a config.json, with random "
        "weights; nothing needs to be downloaded",
    )
    group.add_argument(
        "--prefill-tokens",
        metavar="N,N,…",
        type=counts(MAX_COUNT),
        help="lengths of the prompts that are read (default: 128,512, on a GPU also 2048)",
    )
    group.add_argument(
        "--context",
        metavar="N,N,…",
        type=counts(MAX_COUNT),
        help="how many tokens there are before those that are made (default: those of "
        f"{','.join(map(str, CONTEXTS))} that the model allows)",
    )
    group.add_argument(
        "--batch",
        metavar="N,N,…",
        type=counts(MAX_BATCH),
        default=(1,),
        help="how many sequences are decoded together (default: 1)",
    )
    group.add_argument(
        "--repeats",
        metavar="N",
        type=whole_number(1, 1000),
        default=5,
        help="each rate is the median of N runs after one that does not count (default: 5)",
    )
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print one JSON document on stdout and nothing else there"
    )


def counts(high: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers from 1 to `high` with commas between them, each once."""
    number = whole_number(1, high)

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if len(parts) > MAX_LENGTHS:
            raise argparse.ArgumentTypeError(f"takes at most {MAX_LENGTHS} numbers, not {len(parts)}")
        return tuple(dict.fromkeys(number(part) for part in parts))

    return parse


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 130 after Ctrl-C, which leaves the rows that are there. Raises UserError."""
    settings = _settings(args)
    locate(settings.model, random_weights=settings.random_weights)  # a wrong name is told at once

    # Torch from here on.
    from cli.bench_report import Report
    from cli.builder import out_of_memory, prepare
    from cli.explain_report import show_explanation
    from cli.exported import sequences_of

    prepared = prepare(settings)
    if prepared.package is not None:
        sequences_of(prepared.package, max(args.batch), "--batch")
    plan = Plan.of(args, prepared)
    if args.explain:
        return show_explanation(prepared, plan.max_seq_len, max(plan.batches), as_json=args.json)
    _check_memory(prepared, plan)
    status(describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan))
    for remark in prepared.remarks():
        status(remark)
    report = Report(prepared, plan.max_seq_len, plan.repeats, show=not args.json)
    try:
        with out_of_memory(prepared, plan.max_seq_len):
            _measure(prepared, plan, report)
    except KeyboardInterrupt:
        warn("interrupted: these are all figures there are" if report.show else "interrupted")
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(report.document()))
    return 0


def _settings(args: argparse.Namespace) -> BuildSettings:
    if args.random_weights is None:
        return build_settings(args, os.environ)
    if args.model is not None:
        raise UserError(
            f"MODEL {shorten(args.model)} and --random-weights {shorten(args.random_weights)} contradict each other: "
            "one is measured with its own weights, the other with random ones; leave one out"
        )
    named = argparse.Namespace(**{**vars(args), "model": args.random_weights})
    settings = build_settings(named, os.environ)
    sources = {**settings.sources, "model": "--random-weights"}
    return dataclasses.replace(settings, random_weights=True, sources=sources)


@dataclass(frozen=True)
class Plan:
    """What will be measured: lengths in tokens, all of which fit in `max_seq_len`."""

    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    max_seq_len: int

    @classmethod
    def of(cls, args: argparse.Namespace, prepared: "Prepared") -> "Plan":
        """Lengths that were asked for must fit; of the defaults those that do are taken. Raises UserError."""
        from cli.builder import context_length
        from cli.measure import LEAST_ROOM, ROOM

        prefill = args.prefill_tokens or PREFILL_TOKENS[prepared.device.device.type]
        contexts = args.context or CONTEXTS
        length = context_length(prepared, max(*(n + 1 for n in prefill), *(n + ROOM for n in contexts)))
        if length < 2 * LEAST_ROOM:
            raise UserError(f"a context of {length} tokens is too short to measure: {2 * LEAST_ROOM} are needed")
        if args.prefill_tokens is None:
            prefill = tuple(n for n in prefill if n < length) or (length // 2,)
        if args.context is None:
            contexts = tuple(n for n in contexts if n + ROOM <= length) or (length // 2,)
        for flag, longest, room in (("--prefill-tokens", max(prefill), 1), ("--context", max(contexts), LEAST_ROOM)):
            if longest + room > length:
                limit = prepared.config.max_position_embeddings
                mend = f"at most {length - room} fit" + (", or raise --max-seq-len" if length < limit else "")
                raise UserError(
                    f"{flag} {longest}: {prepared.name} runs with a context of {length} here, and the measurement "
                    f"needs {room} more after that: {mend}"
                )
        return cls(tuple(prefill), tuple(contexts), tuple(args.batch), args.repeats, length)


def _check_memory(prepared: "Prepared", plan: Plan) -> None:
    """Random weights would be written into memory that is not there, until the system ends the process."""
    from cli.needs import needs_of

    if not prepared.settings.random_weights:
        return
    needs = needs_of(prepared, plan.max_seq_len, max(plan.batches))
    if needs.weights + needs.cache > needs.free:
        raise UserError(
            f"{prepared.name} in {prepared.dtype.name} needs {human_bytes(needs.weights)} for its weights and "
            f"{human_bytes(needs.cache)} for a context of {plan.max_seq_len}; the {prepared.device.device.type} device "
            f"has {human_bytes(needs.free)} free: try a smaller --max-seq-len, a 16-bit --dtype, or another --device"
        )


def _measure(prepared: "Prepared", plan: Plan, report: "Report") -> None:
    """Everything, in the order in which it is shown."""
    from cli.builder import load_model
    from cli.measure import fill_cache, measure_decode, measure_machine, measure_prefill, prefill_flops
    from model.device import peak_memory_bytes, reset_peak_memory

    device = prepared.device.device
    status("measuring the machine's memory and matrix products")
    report.machine_is(measure_machine(device, prepared.dtype.dtype))
    reset_peak_memory(device)
    model = load_model(prepared, plan.max_seq_len)
    report.loaded(prepared.ledger)
    with _empty_cache() as cache:
        for batch in plan.batches:
            engine = _engine(prepared, model, plan, batch, cache, report)
            for tokens in plan.prefill if batch == plan.batches[0] else ():
                with Progress(f"reading {tokens} tokens", plan.repeats + 1) as progress:
                    flops = prefill_flops(model, tokens)
                    prefill = measure_prefill(engine, tokens, flops, plan.repeats, progress.advance)
                report.prefilled(prefill)
            fill_cache(engine.cache)
            for context in plan.contexts:
                with Progress(f"tokens after {context}, batch {batch}", plan.repeats + 1) as progress:
                    decode = measure_decode(engine, context, batch, plan.repeats, progress.advance)
                report.decoded(decode)
            del engine  # its cache is freed before the next one is made
    report.ended(peak_memory_bytes(device))


def _engine(
    prepared: "Prepared", model: "Transformer", plan: Plan, batch: int, cache: Path, report: "Report"
) -> "Engine":
    """An engine for `batch` sequences. What it compiles is compiled twice: into the empty `cache`, and out of it."""
    from cli.builder import make_engine
    from cli.measure import GREEDY
    from generate.stats import Ledger

    settings = dataclasses.replace(
        prepared.settings,
        max_num_seqs=batch,
        compile_prefill=prepared.settings.compile_prefill and batch == plan.batches[0],
    )
    compiles = (settings.compile or settings.compile_prefill) and prepared.package is None
    seconds = []
    for _ in range(2 if compiles else 1):
        ledger = Ledger(weight_bytes_per_token=prepared.ledger.weight_bytes_per_token)
        mine = dataclasses.replace(prepared, settings=settings, ledger=ledger)
        engine = None  # its cache is freed before the next one is made
        engine = make_engine(mine, model, plan.max_seq_len, cache)
        engine.prepare(GREEDY)
        seconds.append(ledger.phase_s["compile"])
    if compiles:
        report.compiled(batch, *seconds)
    assert engine is not None
    return engine


@contextmanager
def _empty_cache() -> Iterator[Path]:
    """A directory for all that is compiled, by us and by the compilers themselves, so that nothing is there yet."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="torchchat-bench-", ignore_cleanup_errors=True) as directory:
        os.environ.update({name: os.path.join(directory, folder) for name, folder in names.items()})
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
