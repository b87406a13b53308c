"""The flags that commands share, and how they become frozen settings. Knows the precedence rule; imports no torch.

One rule for every setting: a flag, then the quantize JSON, then the environment, then the default. Where one overrides
another that says something else, a line on stderr says so.
"""

import argparse
import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from cli.console import warn
from config.errors import UserError
from config.registry import DEFAULT_MODEL, EXPORTED_ENDING, MODELS_DIR, PTE_ENDING
from config.settings import DEVICES, DTYPES, MAX_COUNT, BuildSettings, SamplingParams, Setting, one_of, shorten
from quant.recipe import READY_MADE, read_recipe

ENVIRONMENT = {
    "model": "TORCHCHAT_MODEL",
    "device": "TORCHCHAT_DEVICE",
    "dtype": "TORCHCHAT_DTYPE",
    "compile": "TORCHCHAT_COMPILE",
    "compile_prefill": "TORCHCHAT_COMPILE_PREFILL",
    "quantize": "TORCHCHAT_QUANTIZE",
    "max_seq_len": "TORCHCHAT_MAX_SEQ_LEN",
}
OTHER_VARIABLES = ("TORCHCHAT_CACHE_DIR", "TORCHCHAT_DEBUG", "TORCHCHAT_API_KEY", MODELS_DIR)

PACKAGE_FLAG, PTE_FLAG = "--aoti-package-path", "--pte-path"
YES = ("1", "true", "yes", "on")
NO = ("0", "false", "no", "off")


class Parser(argparse.ArgumentParser):
    """argparse, except that an error is a UserError: one line, with the nearest flag, instead of the usage block."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the command, whichever way its flags are spelled."""
        parsed, unknown = self.parse_known_args(normalise_flags(argv))
        flags = [text for text in unknown if text.startswith("-")]
        if flags:
            flag = flags[0].partition("=")[0]
            self.error(f"unknown option {shorten(flag)}{did_you_mean(flag, self._option_string_actions)}")
        if unknown:
            self.error(f"unexpected argument {shorten(unknown[0])!r}; text of several words needs quotes")
        _take_package(parsed)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(with_hint(shorten(message.removeprefix("argument "), 300), f"see {self.prog} --help"))


def normalise_flags(argv: Iterable[str]) -> list[str]:
    """Spell every flag with dashes (--compile_prefill, --top_k=5), leaving values and all after "--" as they are."""
    result: list[str] = []
    rest = iter(argv)
    for text in rest:
        if text == "--":
            return [*result, text, *rest]
        name, equals, value = text.partition("=")
        result.append(name.replace("_", "-") + equals + value if text.startswith("--") else text)
    return result


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'generate'?" if something known is near, else ""."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def with_hint(message: str, hint: str) -> str:
    """Both in one line, whether or not the message ends with a question."""
    return f"{message} ({hint})" if message.endswith("?") else f"{message}; {hint}"


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {shorten(text)!r}")
        return number

    return parse


MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "device": {
        "metavar": "|".join(DEVICES),
        "help": "where it runs; fast: the first of cuda, mps, cpu that is there (default: fast)",
    },
    "dtype": {
        "metavar": "|".join(DTYPES),
        "help": "precision of the weights and of computing; fast: the fastest that the device runs well, fast16: its "
        "best 16-bit type (default: fast)",
    },
    "compile": {
        "action": argparse.BooleanOptionalAction,
        "help": "compile the step that makes one token (kept between runs)",
    },
    "compile_prefill": {
        "action": argparse.BooleanOptionalAction,
        "help": "compile the reading of the prompt, with or without --compile",
    },
    "quantize": {
        "metavar": "NAME|FILE|JSON",
        "help": f"a recipe for smaller weights: {', '.join(READY_MADE)}, a JSON file, or the JSON itself, such as "
        """'{"linear:int8": {}}' (see docs/quantization.md)""",
    },
    "max_seq_len": {
        "metavar": "N",
        "type": whole_number(1, MAX_COUNT),
        "help": "room for the prompt and the answer together, in tokens (default: enough, within what the model "
        "allows)",
    },
}
"""The flags that decide how a model is built, as argparse takes them."""


def add_model_arguments(parser: argparse.ArgumentParser, flags: Sequence[str] = tuple(MODEL_FLAGS)) -> None:
    """MODEL and the flags that decide how it is built; `build_settings` reads them. flags: those of MODEL_FLAGS that
    make sense for the command.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a name that torchchat knows, or a directory or file of weights (default: a small model that is built in)",
    )
    if "compile" in flags:  # those that run a model
        parser.add_argument(
            PACKAGE_FLAG, metavar=f"FILE{EXPORTED_ENDING}", help="in place of MODEL: one that `torchchat export` wrote"
        )
    group = parser.add_argument_group("customization")
    for name in flags:
        group.add_argument(_flag(name), **MODEL_FLAGS[name])
    group.add_argument(
        "--explain",
        action="store_true",
        help="load and run nothing: print what would be built, and from which settings; the layers by scheme, memory, "
        "and the speed that reading them allows",
    )
    variables = ", ".join(variable for name, variable in ENVIRONMENT.items() if name == "model" or name in flags)
    spelling = " Flags may be spelled with underscores too (--compile_prefill)." if "compile_prefill" in flags else ""
    parser.epilog = (
        f"Defaults may be set in the environment: {variables}. A flag overrides the quantize recipe, which overrides "
        f"the environment.{spelling}"
    )


def add_pte_argument(parser: argparse.ArgumentParser) -> None:
    """For commands that run one sequence at a time."""
    parser.add_argument(
        PTE_FLAG,
        metavar=f"FILE{PTE_ENDING}",
        help="in place of MODEL: one that `torchchat export` wrote for ExecuTorch, which runs it",
    )


def _take_package(args: argparse.Namespace) -> None:
    """What the package flags name is the MODEL."""
    given = {
        flag: value
        for flag, name in ((PACKAGE_FLAG, "aoti_package_path"), (PTE_FLAG, "pte_path"))
        if (value := vars(args).get(name)) is not None
    }
    named = [*([f"MODEL {shorten(args.model)}"] if given and args.model is not None else []),
             *(f"{flag} {shorten(value)}" for flag, value in given.items())]  # fmt: skip
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} both name a model: leave one out")
    for flag, value in given.items():
        ending, kind = (EXPORTED_ENDING, "package") if flag == PACKAGE_FLAG else (PTE_ENDING, "program of ExecuTorch's")
        if not value.endswith(ending):
            raise UserError(f"{flag} {shorten(value)}: is no {kind}, whose name ends in {ending}; name others as MODEL")
        args.model = value


def _check_pte(model: Setting, args: argparse.Namespace) -> None:
    """Raises UserError where a command has no use for a program of ExecuTorch's."""
    if not model.value.endswith(PTE_ENDING):
        return
    if "pte_path" not in args:
        raise UserError(f"{model.source} {shorten(model.value)}: generate and chat alone run a program of ExecuTorch's")
    if "explain" in args and args.explain:
        raise UserError(f"--explain: {shorten(model.value)} is built already; name the model that it was exported from")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that decide how tokens are chosen; `sampling_params` reads them."""
    ours = SamplingParams()
    group = parser.add_argument_group("sampling", "defaults: the model's generation_config.json, then those named here")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="make at most N tokens (default: until the end)")
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help=f"higher is more surprising; 0: always the likeliest (default: {ours.temperature})",
    )
    group.add_argument("--top-k", metavar="K", type=int, help="keep the K likeliest tokens; 0: off")
    group.add_argument("--top-p", metavar="P", type=float, help="keep the likeliest tokens that make up P; 1: off")
    group.add_argument(
        "--min-p", metavar="P", type=float, help="keep tokens at least P times as likely as the likeliest; 0: off"
    )
    group.add_argument(
        "--repetition-penalty", metavar="R", type=float, help="over 1: tokens seen become less likely; 1: off"
    )
    group.add_argument("--stop", metavar="TEXT", action="append", help="end before this text; may be given again")
    group.add_argument("--seed", metavar="S", type=int, help="the same seed gives the same text (default: a new one)")


def build_settings(
    args: argparse.Namespace, environ: Mapping[str, str], say: Callable[[str], None] = warn
) -> BuildSettings:
    """The settings that the flags of `add_model_arguments`, the recipe and the environment add up to; what the command
    has no flag for stays at its default.

    `say` gets one line for each override and for each variable that looks like ours but is not. Raises UserError.
    """
    _check_variables(environ, say)
    quantize = _pick("quantize", args, environ, say)
    recipe = read_recipe(quantize.value, quantize.source, say) if quantize else None
    if recipe and not (recipe.entries or recipe.dtype or recipe.device):
        say(f"{recipe.name}: the recipe is empty: nothing is quantized")
    device = _pick("device", args, environ, say, recipe.device if recipe else None, DEVICES) or Setting("fast")
    dtype = _pick("dtype", args, environ, say, recipe.dtype if recipe else None, DTYPES) or Setting("fast")
    model = _pick("model", args, environ, say) or Setting(DEFAULT_MODEL)
    _check_pte(model, args)
    max_seq_len = _pick("max_seq_len", args, environ, say) if "max_seq_len" in args else None
    switches = {
        name: _switch(name, args, environ, say) if name in args else Setting("no")
        for name in ("compile", "compile_prefill")
    }
    given = {"model": model, "quantize": quantize, "max_seq_len": max_seq_len, **switches}
    return BuildSettings(
        model=model.value,
        device=device,
        dtype=dtype,
        compile=switches["compile"].value in YES,
        compile_prefill=switches["compile_prefill"].value in YES,
        quantize=recipe.text if recipe and recipe.entries else None,
        quantize_source=recipe.name if recipe and recipe.entries else None,
        max_seq_len=_count(max_seq_len) if max_seq_len else None,
        sources={name: setting.source for name, setting in given.items() if setting is not None},
    )


def sampling_params(
    args: argparse.Namespace, defaults: SamplingParams, say: Callable[[str], None] = warn
) -> SamplingParams:
    """`defaults` (the model's, see `SamplingParams.from_generation_config`) with every flag given in its place.

    Without --seed a new one is drawn, so that it can be shown and given again. Raises UserError.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    stop = tuple(args.stop) if args.stop else defaults.stop
    params = dataclasses.replace(defaults, **({"seed": secrets.randbits(32)} | given), stop=stop)
    idle = [_flag(name) for name in ("top_k", "top_p", "min_p", "seed") if name in given]
    if params.temperature == 0 and idle:
        say(f"{', '.join(idle)} without effect: temperature 0 takes the likeliest token each time")
    if "max_seq_len" in args and args.max_seq_len is not None and given.get("max_new_tokens", 0) >= args.max_seq_len:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} does not fit in --max-seq-len {args.max_seq_len}, which holds the "
            "prompt too; make one smaller or the other larger"
        )
    return params


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pick(
    name: str,
    args: argparse.Namespace,
    environ: Mapping[str, str],
    say: Callable[[str], None],
    recipe: Setting | None = None,
    allowed: tuple[str, ...] = (),
) -> Setting | None:
    """The precedence rule: flag, recipe, environment. None if nobody said anything; every value given is checked."""
    flag, variable = vars(args)[name], ENVIRONMENT[name]
    candidates = [] if flag is None else [Setting(str(flag), "MODEL" if name == "model" else _flag(name))]
    if recipe:
        candidates.append(recipe)
    if environ.get(variable):  # an empty variable is as good as none
        candidates.append(Setting(environ[variable], variable))
    for candidate in candidates:
        if allowed:
            one_of(candidate.source, candidate.value, allowed)
    if not candidates:
        return None
    winner = candidates[0]
    for other in candidates[1:]:
        if other.value != winner.value:
            say(f"{winner.source} {shorten(winner.value)} overrides {other.source} {shorten(other.value)}")
    return winner


def _switch(name: str, args: argparse.Namespace, environ: Mapping[str, str], say: Callable[[str], None]) -> Setting:
    """As `_pick`, of a flag that is there or not; its value is one of YES or of NO."""
    flag, variable = vars(args)[name], ENVIRONMENT[name]
    text = environ.get(variable, "").lower()
    if text and text not in YES + NO:
        raise UserError(f"{variable} must be one of {', '.join(YES + NO)}, not {shorten(text)!r}")
    if flag is None:
        return Setting(text, variable) if text else Setting("no")
    spelled = _flag(name) if flag else f"--no-{_flag(name)[2:]}"
    if text and flag != (text in YES):
        say(f"{spelled} overrides {variable} {text}")
    return Setting("yes" if flag else "no", spelled)


def _count(setting: Setting) -> int:
    try:
        return whole_number(1, MAX_COUNT)(setting.value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{setting.source} {error}") from error


def _check_variables(environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    known = [*ENVIRONMENT.values(), *OTHER_VARIABLES]
    for name in sorted(environ):
        if name.startswith("TORCHCHAT_") and name not in known:
            say(f"the variable {shorten(name)} is unknown and changes nothing{did_you_mean(name, known)}")
