"""The parts of the documentation that come from the code: flags, known models, schemes of quantization. `python -m
tests.generated_docs` writes them; a test says when that is due. Knows Markdown and parsers, runs nothing.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from cli import chat_commands as chat
from cli.console import human_bytes
from cli.export import PACKAGED
from cli.list import short_context, short_count
from cli.main import COMMANDS
from cli.options import Parser, add_model_arguments
from config.registry import entries
from quant.portable import SCHEMES as PORTABLE
from quant.recipe import READY_MADE, read_recipe
from quant.schemes import PLACES, REFUSED, SCHEMES, Arguments, Scheme, level

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(<!-- from the code: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def flag_rows(parser: argparse.ArgumentParser, leave_out: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """Each option of a parser but --help: how it is spelled, and its help."""
    rows = []
    for action in parser._actions:
        spellings = [option for option in action.option_strings if option not in leave_out | {"-h", "--help"}]
        if spellings:
            value = f" {action.metavar}" if action.metavar else ""
            rows.append((", ".join(f"`{option}{value}`" for option in spellings), action.help or ""))
    return rows


def shared_flags() -> str:
    parser = Parser()
    add_model_arguments(parser)
    return table(("flag", "meaning"), flag_rows(parser))


def own_flags(command: str) -> str:
    """Those beside the shared ones; all, of a command that has not all of those."""
    shared, parser = Parser(), Parser()
    add_model_arguments(shared)
    import_module(COMMANDS[command][1]).add_arguments(parser)
    those = frozenset(shared._option_string_actions)
    return table(("flag", "meaning"), flag_rows(parser, those if takes_shared_flags(command) else frozenset()))


def takes_shared_flags(command: str) -> bool:
    shared, parser = Parser(), Parser()
    add_model_arguments(shared)
    import_module(COMMANDS[command][1]).add_arguments(parser)
    return set(shared._option_string_actions) <= set(parser._option_string_actions)


def models() -> str:
    rows = [
        (
            f"`{entry.name}`",
            ", ".join(f"`{alias}`" for alias in entry.short_aliases),
            short_count(entry.parameters),
            short_context(entry.context),
            human_bytes(2 * entry.parameters),
            entry.description,
            (entry.hub_id or "") + (" (asks)" if entry.gated else ""),
        )
        for entry in entries()
    ]
    return table(("name", "also", "parameters", "context", "size", "what for", "on Hugging Face"), rows)


def recipes() -> str:
    rows = [(f"`{name}`", f"`{json.dumps(json.loads(file.read_text()))}`") for name, file in READY_MADE.items()]
    return table(("name", "recipe"), rows)


def schemes() -> str:
    rows = [(f"`{key}`", _arguments(scheme), _bits(key, scheme), scheme.summary) for key, scheme in SCHEMES.items()]
    return table(("key", "arguments (default)", "bits a weight", "what it is"), rows)


def _arguments(scheme: Scheme) -> str:
    parts = []
    bits = scheme.default_bits or scheme.bits[0]
    if len(scheme.bits) > 1:
        between = " to " if len(scheme.bits) > 2 else " or "
        parts.append(f"`bitwidth` {scheme.bits[0]}{between}{scheme.bits[-1]} ({bits})")
    if scheme.groups is not None:
        default = scheme.groups.default(bits) or scheme.groups.whole_row
        parts.append(f"`groupsize` {scheme.groups.describe()} ({default})")
    if scheme.has_weight_zeros is None:
        parts.append("`has_weight_zeros` true or false (false)")
    return "; ".join(parts)


def _bits(key: str, scheme: Scheme) -> str:
    """Of a weight with long rows and 16-bit scales, with the default arguments."""
    (entry,) = read_recipe(json.dumps({key: {}}), "").entries
    return f"{scheme.format(entry.args).nbytes(1, 2**20, 2) * 8 / 2**20:.4g}"


def support() -> str:
    rows = [(f"`{key}`", *(_support(key, scheme, place) for place in PLACES)) for key, scheme in SCHEMES.items()]
    return table(("key", *PLACES.values()), rows)


def _support(key: str, scheme: Scheme, place: str) -> str:
    refusal = REFUSED.get((key, place))
    if refusal is not None and not refusal.compiled:
        return f"no: `{refusal.nearest}` is the nearest"
    fast = [bits for bits in scheme.bits if level(key, scheme.format(Arguments(bits, 0)), place) == "fast"]
    eager = ", not compiled" if refusal is not None else ""
    if not fast:
        return f"PyTorch{eager}"
    few = "" if fast == list(scheme.bits) else f" for {fast[0]} to {fast[-1]} bits, else PyTorch"
    return f"kernel{few}{eager}"


def exports() -> str:
    """What may be written with what: a package is compiled, a directory is only read."""
    rows = [("unquantized", *("yes" for _ in PACKAGED), "kernel", "yes")]
    for key, scheme in SCHEMES.items():
        portable = ("kernel" if scheme.target == "linear" else "operator") if key in PORTABLE else "no"
        rows.append((f"`{key}`", *(_exports(key, scheme, place) for place in PACKAGED), portable, "yes"))
    return table(("", *(f"package for {place}" for place in PACKAGED), "ExecuTorch", "directory"), rows)


def _exports(key: str, scheme: Scheme, place: str) -> str:
    others = [PLACES[other] for other in PLACES if other.startswith(place) and (key, other) in REFUSED]
    return _support(key, scheme, place) + (f"; not on {' nor '.join(others)}" if others else "")


def chat_commands() -> str:
    rows = []
    for name, command in chat.COMMANDS.items():
        also = ", ".join(f"`/{alias}`" for alias, meant in chat.ALIASES.items() if meant == name)
        rows.append((f"`/{name} {command.words}".rstrip() + "`", command.help + (f" (also {also})" if also else "")))
    return table(("command", "what it does"), rows)


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    DOCS / "commands.md": {
        "shared flags": shared_flags,
        **{f"flags of {name}": partial(own_flags, name) for name in COMMANDS},
    },
    DOCS / "models.md": {"models": models},
    DOCS / "chat.md": {"commands of a conversation": chat_commands},
    DOCS / "export.md": {"exports": exports},
    DOCS / "quantization.md": {"recipes": recipes, "schemes": schemes, "support": support},
}
"""Each page that has such parts, and what writes them, in their order."""


def generated(page: Path) -> str:
    """The page with each block as the code has it."""
    blocks = PAGES[page]
    return BLOCK.sub(lambda found: found[1] + blocks[found[2]]() + found[3], page.read_text())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(generated(page))
