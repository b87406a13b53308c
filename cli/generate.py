"""The command `generate`: a prompt in, text out, and a ledger of what it took. Feeds the engine and shows what comes;
imports torch only once the flags are known to be good.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.console import TextWriter, describe_build, interruptible, status, warn
from cli.options import (
    add_model_arguments,
    add_pte_argument,
    add_sampling_arguments,
    build_settings,
    sampling_params,
    whole_number,
)
from cli.prompt import add_prompt_arguments, read_prompt
from config.errors import UserError
from config.settings import BuildSettings, SamplingParams

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from cli.builder import Built, Prepared
    from cli.ledger import Figures
    from generate.engine import Engine
    from generate.sequence import Sequence

MAX_SAMPLES = 4096
MAX_BATCH = 32
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `generate`."""
    add_model_arguments(parser)
    add_pte_argument(parser)
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--num-samples",
        metavar="N",
        type=whole_number(1, MAX_SAMPLES),
        default=1,
        help="write N texts; text i, from 0, is what --seed S+i gives alone",
    )
    group.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="show text as it is made, or each text once it is whole"
    )
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    group.add_argument("--profile", metavar="FILE", type=Path, help="write a trace for chrome://tracing or Perfetto")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 130 after Ctrl-C, which leaves what there is. Raises UserError."""
    settings = dataclasses.replace(build_settings(args, os.environ), max_num_seqs=min(args.num_samples, MAX_BATCH))
    sampling_params(args, SamplingParams(), say=lambda _: None)  # a bad value is refused before anything slow
    if args.json and args.stream:
        raise UserError("--json prints one document when all is done: leave out --stream")
    if args.profile is not None:
        _check_writable(args.profile)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks to its makers
    remarks: list[str] = []
    text = read_prompt(args, remark=remarks.append)

    # Torch from here on. What was chosen is said once nothing that was asked for can be wrong any more.
    from cli.builder import build, context_length, prepare
    from cli.explain_report import show_explanation
    from cli.ledger import Figures
    from generate.engine import check_prompt

    prepared = prepare(settings)
    params = sampling_params(args, prepared.sampling)
    if args.chat and prepared.template is not None:
        params = dataclasses.replace(params, stop=(*params.stop, *prepared.template.stop))
    prompt_ids = _encode(prepared, text, chat=args.chat)
    if args.chat and prepared.template is not None and prepared.template.origin != "its own":
        remarks.append(f"chat format: {prepared.template.origin}")
    context = context_length(prepared, len(prompt_ids) + (params.max_new_tokens or 1024))
    check_prompt(prompt_ids, context, prepared.config.vocab_size)
    if args.explain:
        return show_explanation(prepared, context, settings.max_num_seqs, as_json=args.json)
    built = build(prepared, context)
    for line in (
        *remarks,
        describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan),
        *prepared.remarks(),
        _describe_sampling(params, args.num_samples),
    ):
        status(line)
    built.engine.prepare(params)

    with _profiled(args.profile, prepared), interruptible() as interrupted:
        sequences = built.engine.add_samples(prompt_ids, params, args.num_samples, new_text=args.chat or not text)
        texts = {sequence.seq_id: "" for sequence in sequences}
        shown = "" if args.chat else text
        show = None if args.json else Samples(sequences, texts, shown, stream=args.stream is not False)
        _run(built.engine, sequences, texts, show, interrupted)
    figures = Figures.take(built.ledger, prepared.device.device)
    if args.json:
        print(json.dumps(_document(built, sequences, texts, figures)))
    else:
        _say_what_was_cut(sequences, context, bool(interrupted))
        print("", *figures.lines(), sep="\n", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED if interrupted else 0


class Samples:
    """Shows texts one after the other on stdout: the current one as it is made, the others when their turn comes."""

    def __init__(self, sequences: "list[Sequence]", texts: dict[int, str], prompt: str, *, stream: bool) -> None:
        self.sequences, self.texts, self.prompt, self.stream = sequences, texts, prompt, stream
        self.writer = TextWriter()
        self.current = 0
        self.shown: int | None = None  # characters of the current text; None before its heading
        self.update()

    def update(self) -> None:
        """Show what of `texts` can be shown now."""
        while self.current < len(self.sequences):
            sequence = self.sequences[self.current]
            if sequence.finished or self.stream:
                self._show(sequence)
            if not sequence.finished:
                return
            self.writer.end_line()
            self.current, self.shown = self.current + 1, None

    def _show(self, sequence: "Sequence") -> None:
        if sequence.finish_reason == "abort" and not sequence.token_ids:
            return  # interrupted before it began
        text = self.texts[sequence.seq_id]
        if self.shown is None:
            if len(self.sequences) > 1:
                self.writer.write("\n" if self.current else "")
                status(f"sample {self.current + 1} of {len(self.sequences)}, seed {sequence.params.seed}")
            self.writer.write(self.prompt)
            self.shown = 0
        self.writer.write(text[self.shown :])
        self.shown = len(text)


def _encode(prepared: "Prepared", text: str, *, chat: bool) -> list[int]:
    """The prompt's tokens. Raises UserError when there is nothing to begin an empty text with."""
    tokenizer = prepared.tokenizer
    assert tokenizer is not None
    if chat:
        assert prepared.template is not None
        return prepared.template.render([{"role": "user", "content": text}])
    # An empty text needs something to begin with, also where texts begin without BOS.
    ids = tokenizer.encode(text, bos=tokenizer.add_bos or not text)
    if ids:
        return ids
    ends = sorted(tokenizer.eos_ids | set(prepared.config.eos_token_ids))
    if not ends:
        raise UserError(f"{prepared.name} has no token that begins a text: give a --prompt that is not empty")
    return ends[:1]  # models without a beginning are trained on texts that follow the last one's end


def _run(
    engine: "Engine", sequences: "list[Sequence]", texts: dict[int, str], show: Samples | None, interrupted: list[int]
) -> None:
    """Step until all is done, or until Ctrl-C (`interrupted` fills) ends the sequences as they are."""
    while engine.has_unfinished and not interrupted:
        for output in engine.step():
            texts[output.seq_id] += output.text
        if show is not None:
            show.update()
    for sequence in sequences:
        last = engine.cancel(sequence)
        texts[sequence.seq_id] += last.text if last is not None else ""
    if show is not None:
        show.update()


@contextmanager
def _profiled(path: Path | None, prepared: "Prepared") -> Iterator[None]:
    """Profiles what is inside and writes the trace to `path`, whole or not at all."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if prepared.device.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        profiler.export_chrome_trace(temporary)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
    status(f"the trace is in {path}")


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--profile {path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--profile {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--profile {path}: the directory {path.parent} is not writable")


def _describe_sampling(params: SamplingParams, num_samples: int) -> str:
    """What decides which text comes out, on one line: what differs from "off"."""
    parts = ["greedy (temperature 0)" if params.temperature == 0 else f"temperature {params.temperature:g}"]
    if params.temperature:
        parts += [f"top-k {params.top_k}"] if params.top_k else []
        parts += [f"top-p {params.top_p:g}"] if params.top_p < 1 else []
        parts += [f"min-p {params.min_p:g}"] if params.min_p else []
    parts += [f"repetition penalty {params.repetition_penalty:g}"] if params.repetition_penalty != 1 else []
    parts += [f"seed {params.seed}"] if params.temperature else []
    if params.temperature == 0 and num_samples > 1:
        parts.append(f"all {num_samples} samples will be the same")
    return " · ".join(parts)


def _say_what_was_cut(sequences: "list[Sequence]", context: int, interrupted: bool) -> None:
    if interrupted:
        warn("interrupted: this is what there was")
    full = [s for s in sequences if s.finish_reason == "length" and s.max_new_tokens != s.params.max_new_tokens]
    if full:
        which = "the text ends" if len(sequences) == 1 else f"{len(full)} of {len(sequences)} texts end"
        warn(f"{which} where the context of {context} tokens was full")


def _document(
    built: "Built", sequences: "list[Sequence]", texts: dict[int, str], figures: "Figures"
) -> dict[str, object]:
    """What --json prints; its keys are a promise."""
    settings: BuildSettings = built.prepared.settings
    return {
        "samples": [
            {
                "text": texts[sequence.seq_id],
                "token_ids": sequence.token_ids,
                "prompt_token_ids": list(sequence.prompt_ids),
                "finish_reason": sequence.finish_reason,
            }
            for sequence in sequences
        ],
        "settings": {
            "model": built.prepared.name,
            "device": built.prepared.device.device.type,
            "dtype": built.prepared.dtype.name,
            "quantize": None if settings.quantize is None else json.loads(settings.quantize),
            "compile": settings.compile,
            "compile_prefill": settings.compile_prefill,
        },
        "stats": figures.document(),
    }
