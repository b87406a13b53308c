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
from tests.generated_docs import BLOCK, generated, own_flags, shared_flags, takes_shared_flags
from tests.generated_docs import PAGES as GENERATED

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


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_what_the_code_writes_is_as_the_code_has_it(page):
    text = page.read_text()
    assert [found[1] for found in BLOCK.findall(text)] == list(GENERATED[page])
    assert text == generated(page), "make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_the_tables_and_no_other(name):
    parser = Parser(prog=name)
    import_module(COMMANDS[name][1]).add_arguments(parser)
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")} - {"--help"}
    tables = (shared_flags() if takes_shared_flags(name) else "") + own_flags(name)
    rows = " ".join(line.split(" | ")[0] for line in tables.splitlines())
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
    for package in ("cli", "config", "model", "quant", "generate"):
        part = layout.partition(f"\n    {package}/")[2].partition("\n\n")[0]
        named = set(re.findall(r"^      ([\w.]+/?) ", part, flags=re.MULTILINE))
        inside = [path for path in (ROOT / package).iterdir() if not path.name.startswith(("_", "."))]
        files = {path.name for path in inside if path.suffix in (".py", ".json")}
        assert named == files | {f"{path.name}/" for path in inside if path.is_dir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def runnable_blocks(page: str) -> list[tuple[str, str]]:
    """A page's sh blocks with the comment above them; without those whose comment says why they are not run."""
    found = re.findall(r"(?:<!-- ([^\n]+) -->\n)?```sh\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [(comment, block) for comment, block in found if not comment.startswith("not run: ")]


def run_as_a_person(block: str, directory: Path) -> subprocess.CompletedProcess[str]:
    (program := directory / "bin" / "torchchat").parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "torchchat.py"}" "$@"\n')
    program.chmod(0o755)
    environ = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TORCHCHAT_CACHE_DIR": str(directory / "c"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=directory,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


# Slow: a process for each command, as a person starts them, a few seconds each.
needs_a_shell = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.mark.slow
@needs_a_shell
def test_the_commands_of_the_readme_run(tmp_path):
    blocks = runnable_blocks("README.md")
    assert all(any(f"torchchat {name}" in block for _, block in blocks) for name in ("generate", "quantize"))
    for _, block in blocks:
        done = run_as_a_person(block, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Once upon a time" in done.stdout
    assert len(json.loads((tmp_path / "stories.json").read_text())["samples"]) == 2


@pytest.mark.slow
@needs_a_shell
@pytest.mark.parametrize(("comment", "block"), runnable_blocks("docs/quantization.md"))
def test_the_commands_about_quantization_run(comment, block, tmp_path):
    done = run_as_a_person(block, tmp_path)
    assert "Traceback" not in done.stderr
    if comment == "fails":
        assert done.returncode == 2
        assert f"    {done.stderr}" in (ROOT / "docs/quantization.md").read_text()
    else:
        assert done.returncode == 0, done.stderr
        assert "Once upon a time" in done.stdout
        assert "· quantized" in done.stderr
