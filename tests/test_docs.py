"""The documentation is held against the code: flags, variables, families, links; the README's commands are run."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cli.main import COMMANDS
from cli.options import ENVIRONMENT, Parser
from model import config_hf
from tests.generated_docs import BLOCK, BLOCKS, PAGE, generated, own_flags, shared_flags

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def table_cells(text: str, column: int) -> list[str]:
    """The cells of one column of every table."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [row[column] for row in rows if len(row) > column]


def section(page: str, title: str) -> str:
    return re.split(r"^## ", page, flags=re.MULTILINE)[
        1 + re.findall(r"^## (.*)$", page, flags=re.MULTILINE).index(title)
    ]


def test_the_commands_are_as_the_code_has_them():
    page = PAGE.read_text()
    assert [found[1] for found in BLOCK.findall(page)] == list(BLOCKS)
    assert page == generated(page), "make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_the_tables_and_no_other(name):
    parser = Parser(prog=name)
    import_module(COMMANDS[name][1]).add_arguments(parser)
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")} - {"--help"}
    rows = " ".join(line.split(" | ")[0] for line in (shared_flags() + own_flags(name)).splitlines())
    assert set(re.findall(r"`(--[a-z-]+)", rows)) == flags


def test_every_variable_is_in_the_table():
    page = (ROOT / "docs/model_customization.md").read_text()
    cells = " ".join(table_cells(section(page, "Which setting wins"), 1))
    assert set(re.findall(r"`(TORCHCHAT_\w+)`", cells)) == set(ENVIRONMENT.values())


def test_every_family_is_in_the_table():
    cells = " ".join(table_cells(section((ROOT / "README.md").read_text(), "Models"), 1))
    ours = {family.architecture for family in config_hf._FAMILIES.values()}
    assert set(re.findall(r"`(\w+ForCausalLM)`", cells)) == ours


def test_the_layout_names_every_file_and_no_other():
    layout = section((ROOT / "CONTRIBUTING.md").read_text(), "Layout")
    for package in ("cli", "config", "model", "generate"):
        part = layout.partition(f"\n    {package}/")[2].partition("\n\n")[0]
        named = set(re.findall(r"^      ([\w.]+/?) ", part, flags=re.MULTILINE))
        there = {path.name for path in (ROOT / package).iterdir() if path.suffix in (".py", ".json")} - {"__init__.py"}
        assert named - {"default/"} == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def runnable_blocks() -> list[str]:
    """The README's sh blocks, but for those under a comment that says why not."""
    found = re.findall(r"(<!-- not run: .+? -->\n)?```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [block for excused, block in found if not excused]


@pytest.mark.slow  # a process for each command, as a person starts them: a few seconds each
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_commands_of_the_readme_run(tmp_path):
    (program := tmp_path / "bin" / "torchchat").parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "torchchat.py"}" "$@"\n')
    program.chmod(0o755)
    environ = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TORCHCHAT_CACHE_DIR": str(tmp_path / "c"),
    }
    blocks = runnable_blocks()
    assert any("generate" in block for block in blocks)
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.startswith("Once upon a time, a fox")
    assert len(json.loads((tmp_path / "stories.json").read_text())["samples"]) == 2
