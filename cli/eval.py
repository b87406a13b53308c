"""The command `eval`: what a model knows, as lm-eval measures it, and how fast it was with what was customized. Checks
what was asked and runs it; imports torch and lm-eval only once the flags are known to be good.
"""

import argparse
import ast
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.console import describe_build, status, warn
from cli.options import add_model_arguments, build_settings, whole_number
from config.errors import UserError
from config.settings import MAX_COUNT, MAX_SEED, BuildSettings, shorten

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from cli.builder import Prepared
    from cli.eval_model import EngineLM
    from cli.eval_tasks import Chosen

MAX_BATCH = 1024
MAX_FEWSHOT = 1000
SEEDS = (0, 1234, 1234, 1234)
"""Of Python, numpy, torch and the choice of examples: lm-eval's own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `eval`."""
    add_model_arguments(parser)
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--tasks",
        metavar="NAME,NAME,…",
        help="tasks and groups of lm-eval by name, with * for any letters, or .yaml files; most have their data on "
        "Hugging Face (default: two tasks of children's stories that are built in)",
    )
    group.add_argument("--include-path", metavar="DIR", type=Path, help="a directory with tasks of your own")
    group.add_argument(
        "--num-fewshot",
        metavar="N",
        type=whole_number(0, MAX_FEWSHOT),
        help="examples before each question (default: the task's)",
    )
    group.add_argument(
        "--limit",
        metavar="N|SHARE",
        type=_limit,
        help="only the first N questions of a task, or below 1 a share of them",
    )
    group.add_argument(
        "--samples",
        metavar="JSON|FILE",
        type=_samples,
        help="only these questions: their numbers by task, such as '{\"stories_endings\": [0, 7]}'",
    )
    group.add_argument("--apply-chat-template", action="store_true", help="ask in the model's chat format")
    group.add_argument("--system-instruction", metavar="TEXT", help="what the model is told before each question")
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples as turns of a conversation (default: yes with --apply-chat-template, which it needs)",
    )
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--batch-size",
        metavar="N|auto",
        type=_batch_size,
        help="how many texts are read or made at a time; it changes no answer (default: auto, which is 8, on a GPU 32, "
        "if there is room)",
    )
    group.add_argument(
        "--gen-kwargs",
        metavar="NAME=VALUE,…",
        type=_gen_kwargs,
        help="how answers are generated, over what a task says: do_sample, temperature, top_k, top_p, min_p, "
        "repetition_penalty, max_gen_toks, until; also as JSON",
    )
    group.add_argument(
        "--seed",
        metavar="S",
        type=_seeds,
        default=SEEDS,
        help="of what is drawn by chance: one number, or four for Python, numpy, torch and the examples (default: "
        f"{','.join(map(str, SEEDS))})",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-path",
        metavar="DIR|FILE",
        type=Path,
        help="write lm-eval's file of results there; the time is in its name, and no other file is replaced",
    )
    group.add_argument(
        "--log-samples", action="store_true", help="write each question and answer too, beside the results"
    )
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")


@dataclass(frozen=True)
class Asked:
    """What is evaluated and how, checked as far as that can be known without the tasks. None: what the task says, or
    nothing.
    """

    tasks: tuple[str, ...] | None
    include_path: Path | None
    num_fewshot: int | None
    limit: float | None
    samples: Mapping[str, list[int]] | None
    apply_chat_template: bool
    system_instruction: str | None
    fewshot_as_multiturn: bool
    batch_size: int | None
    gen_kwargs: Mapping[str, Any] | None
    seeds: tuple[int | None, ...]
    output_path: Path | None
    log_samples: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Asked":
        """Raises UserError for flags that contradict each other, and paths that are none."""
        if args.limit is not None and args.samples is not None:
            raise UserError("--limit and --samples both choose questions: leave one out")
        if args.log_samples and args.output_path is None:
            raise UserError("--log-samples writes files: say where with --output-path")
        if args.fewshot_as_multiturn and not args.apply_chat_template:
            raise UserError("--fewshot-as-multiturn makes turns of a conversation: it needs --apply-chat-template")
        if args.include_path is not None and not args.include_path.is_dir():
            raise UserError(f"--include-path {args.include_path}: is not a directory")
        if args.output_path is not None:
            _check_writable(args.output_path)
        tasks = None
        if args.tasks is not None:
            tasks = tuple(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
            if not tasks:
                raise UserError("--tasks names no task")
        multiturn = args.apply_chat_template if args.fewshot_as_multiturn is None else args.fewshot_as_multiturn
        given = {field.name: vars(args)[field.name] for field in dataclasses.fields(cls) if field.name in args}
        given |= {"tasks": tasks, "fewshot_as_multiturn": multiturn, "seeds": args.seed}
        given["batch_size"] = args.batch_size or None
        return cls(**given)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code. Raises UserError."""
    settings = build_settings(args, os.environ)
    asked = Asked.of(args)
    debug = os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0")
    if not debug:
        os.environ.setdefault("TQDM_DISABLE", "1")  # before whoever imports tqdm: their bars are not our lines

    # Torch from here on.
    from cli.builder import out_of_memory
    from cli.explain_report import show_explanation

    prepared, room = _prepare(settings, asked)
    length = prepared.settings.max_seq_len
    assert length is not None
    if args.explain:
        return show_explanation(prepared, length, prepared.settings.max_num_seqs, as_json=args.json)

    # And lm-eval with all that it brings along.
    from cli.eval_report import Report, new_tracker, save
    from cli.eval_tasks import choose, evaluate, quiet

    with quiet(debug):
        chosen = choose(asked)
        lm = _build(prepared, room, asked, chosen)
        tracker = new_tracker(asked.output_path)
        with out_of_memory(prepared, length):
            results, samples = evaluate(lm, chosen, asked, tracker)
        files = save(tracker, results, samples) if asked.output_path is not None else []
    report = Report.of(results, lm)
    print(json.dumps(report.document(files)) if args.json else "\n".join(report.lines()))
    for file in files:
        status(f"written: {file}")
    return 0


def _prepare(settings: BuildSettings, asked: Asked) -> "tuple[Prepared, str]":
    """What is known before the weights are read, with room for as many rows as there can be; why so many."""
    from cli.builder import prepare
    from cli.room import room_for

    prepared = prepare(settings)
    room = room_for(prepared, asked.batch_size, settings.max_seq_len, flag="--batch-size")
    settings = dataclasses.replace(prepared.settings, max_num_seqs=room.num_seqs, max_seq_len=room.max_seq_len)
    rows = f"{room.num_seqs} rows" if room.num_seqs > 1 else "one row"
    told = f"{rows} at a time, of {room.max_seq_len} tokens at most: {room.why}"
    return dataclasses.replace(prepared, settings=settings), told


def _build(prepared: "Prepared", room: str, asked: Asked, chosen: "Chosen") -> "EngineLM":
    """The model behind lm-eval's interface."""
    from cli.builder import build
    from cli.eval_model import EngineLM

    for remark in chosen.remarks:
        warn(remark)
    built = build(prepared)
    lines = [describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan), *prepared.remarks()]
    lines.append(room)
    if asked.apply_chat_template and prepared.template is not None and prepared.template.origin != "its own":
        lines.append(f"chat format: {prepared.template.origin}")
    for line in lines:
        status(line)
    seed = asked.seeds[2]  # torch's
    return EngineLM(built, seed=0 if seed is None else seed)


# ---- Types of argparse ----


def _limit(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= MAX_COUNT or (number >= 1 and number != int(number)):
        raise argparse.ArgumentTypeError(
            f"must be a whole number of questions, or a share between 0 and 1, not {shorten(repr(text))}"
        )
    return number


def _batch_size(text: str) -> int:
    """0 for auto."""
    return 0 if text == "auto" else whole_number(1, MAX_BATCH)(text)


def _seeds(text: str) -> tuple[int | None, ...]:
    parts = text.split(",")
    if len(parts) not in (1, len(SEEDS)):
        raise argparse.ArgumentTypeError(f"takes one number or {len(SEEDS)}, not {len(parts)}")
    most = min(MAX_SEED, 2**32 - 1)  # numpy's
    number: Callable[[str], int] = whole_number(0, most)
    seeds = tuple(None if part.strip().lower() == "none" else number(part) for part in parts)
    return seeds * len(SEEDS) if len(seeds) == 1 else seeds


def _samples(text: str) -> dict[str, list[int]]:
    written = text
    if not text.lstrip().startswith("{"):
        try:
            written = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{shorten(text)}: neither a JSON object nor a file of one") from error
    try:
        samples = json.loads(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)}: is not JSON: {error}") from error
    if not isinstance(samples, dict) or not samples:
        raise argparse.ArgumentTypeError(f"{shorten(text)}: must be an object, numbers of questions by task")
    for name, numbers in samples.items():
        fine = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        if not fine or not numbers or len(set(numbers)) < len(numbers):
            raise argparse.ArgumentTypeError(f"{shorten(name)}: must be a list of different numbers from 0 on")
    return samples


def _gen_kwargs(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shorten(text)}: is not JSON: {error}") from error
        return dict(entries)
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]
    if any(not equals or not name.strip() for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{shorten(text)}: takes NAME=VALUE, with commas between them")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    """A number, a list or a text, as Python or JSON write it."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_writable(path: Path) -> None:
    """Raises UserError where no results can be written to `path`: a directory, there or not, or a .json file in one."""
    if path.exists() and (path.suffix == ".json") == path.is_dir():
        raise UserError(f"--output-path {path}: name a directory, or a file that ends in .json")
    there = path.parent if path.suffix == ".json" else path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--output-path {path}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output-path {path}: the directory {there} is not writable")
