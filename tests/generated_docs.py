"""The parts of docs/commands.md that come from the code: flags and known models. `python -m tests.generated_docs`
writes them; a test says when that is due. Knows Markdown and parsers, runs nothing.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from cli.main import COMMANDS
from cli.options import Parser, add_model_arguments
from config.registry import entries

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
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
    shared, parser = Parser(), Parser()
    add_model_arguments(shared)
    import_module(COMMANDS[command][1]).add_arguments(parser)
    return table(("flag", "meaning"), flag_rows(parser, frozenset(shared._option_string_actions)))


def models() -> str:
    rows = [
        (f"`{entry.name}`", ", ".join(f"`{alias}`" for alias in entry.aliases), entry.description, entry.hub_id or "")
        for entry in entries()
    ]
    return table(("name", "also", "what it is", "id on Hugging Face"), rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "models": models,
    "shared flags": shared_flags,
    **{f"flags of {name}": partial(own_flags, name) for name in COMMANDS},
}


def generated(page: str) -> str:
    """The page with each block as the code has it."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], page)


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text()))
