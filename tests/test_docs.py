"""The documentation is held against the code: flags, variables, families, links; the README's commands are run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cli.main import COMMANDS
from cli.options import ENVIRONMENT, Parser
from model import config_hf
from tests.cli.fake_hub import Repository, serve
from tests.generated_docs import BLOCK, generated, own_flags, shared_flags, takes_shared_flags
from tests.generated_docs import PAGES as GENERATED
from tests.tiny_checkpoint import write_tiny_checkpoint

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
    for package in ("cli", "config", "model", "quant", "generate", "server"):
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


def run_as_a_person(block: str, directory: Path, warm: Path) -> subprocess.CompletedProcess[str]:
    (program := directory / "bin" / "torchchat").parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "torchchat.py"}" "$@"\n')
    program.chmod(0o755)
    environ = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TORCHCHAT_CACHE_DIR": str(warm),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=directory,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


# Slow: a process for each command, as a person starts them, a few seconds each.
needs_a_shell = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.mark.slow
@needs_a_shell
def test_the_commands_of_the_readme_run(tmp_path, warm):
    blocks = runnable_blocks("README.md")
    assert all(any(f"torchchat {name}" in block for _, block in blocks) for name in ("generate", "quantize"))
    for _, block in blocks:
        done = run_as_a_person(block, tmp_path, warm)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Once upon a time" in done.stdout
    assert len(json.loads((tmp_path / "stories.json").read_text())["samples"]) == 2


@pytest.mark.slow
@needs_a_shell
def test_the_commands_about_models_run(tmp_path, monkeypatch, warm):
    """With a hub of one's own, whose models are tiny."""
    tiny = {path.name: path.read_bytes() for path in write_tiny_checkpoint(tmp_path / "tiny").iterdir()}
    repositories = {
        "Qwen/Qwen3-0.6B": Repository(tiny),
        "bartowski/Llama-3.2-1B-Instruct-GGUF": Repository({f"x-{q}.gguf": b"GGUF" for q in ("Q4_K_M", "Q8_0")}),
    }
    blocks = runnable_blocks("docs/models.md")
    assert all(any(f"torchchat {name} " in block for _, block in blocks) for name in ("list", "download", "remove"))
    with serve(repositories) as hub:
        for name, value in {**hub.environment(), "HF_HOME": str(tmp_path / "hf")}.items():
            monkeypatch.setenv(name, value)
        for _, block in blocks:
            done = run_as_a_person(block, tmp_path, warm)
            assert done.returncode == 0, done.stderr
            assert "/snapshots/" in done.stdout or "torchchat where" not in block


@pytest.mark.slow
@needs_a_shell
def test_the_commands_about_chat_run(tmp_path, warm):
    for _, block in runnable_blocks("docs/chat.md"):
        done = run_as_a_person(block, tmp_path, warm)
        assert done.returncode == 0, done.stderr
        assert "torchchat: saved: conversation.json" in done.stderr
        assert "fp32 (" in done.stderr  # or it was before: "fast" is what this machine is best at
        assert "torchchat: 4 messages are here" in done.stderr
    assert len((tmp_path / "answers.txt").read_text().splitlines()) >= 2


@pytest.mark.slow
@needs_a_shell
def test_the_commands_about_evaluation_run(tmp_path, monkeypatch, warm):
    for name, value in {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    for _, block in runnable_blocks("docs/evaluation.md"):
        done = run_as_a_person(block, tmp_path, warm)
        assert done.returncode == 0, done.stderr
        assert all(line.startswith("torchchat: ") for line in done.stderr.splitlines())
        assert "a second" in done.stdout
    assert json.loads((tmp_path / "quantized.json").read_text())["settings"]["quantize"] is not None
    assert len(list((tmp_path / "results" / "default").glob("samples_animals_*.jsonl"))) == 1


@pytest.mark.slow
@needs_a_shell
def test_the_commands_about_the_server_run(tmp_path, warm):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ((_, block),) = runnable_blocks("docs/server.md")
    assert block.count("8123") == 2
    done = run_as_a_person(block.replace("8123", port), tmp_path, warm)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 20
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@needs_a_shell
def test_the_commands_about_export_run(tmp_path, warm, monkeypatch):
    """With a tiny model, which compiles in a third of the time."""
    monkeypatch.setenv("TORCHCHAT_MODEL", str(write_tiny_checkpoint(tmp_path / "tiny")))
    monkeypatch.setenv("TORCHCHAT_DTYPE", "fp32")
    package, directory = (run_as_a_person(block, tmp_path, warm) for _, block in runnable_blocks("docs/export.md"))
    assert package.returncode == 0, package.stderr
    said, _, stories = package.stdout.partition("\n")
    assert said.startswith(f"{tmp_path / 'stories.pt2'}: ")
    half = len(stories) // 2
    assert stories[:half] == stories[half:] != ""
    assert directory.returncode == 0, directory.stderr
    assert "Once upon a time" in directory.stdout


@pytest.mark.slow
@needs_a_shell
@pytest.mark.parametrize(("comment", "block"), runnable_blocks("docs/quantization.md"))
def test_the_commands_about_quantization_run(comment, block, tmp_path, warm):
    done = run_as_a_person(block, tmp_path, warm)
    assert "Traceback" not in done.stderr
    if comment == "fails":
        assert done.returncode == 2
        assert f"    {done.stderr}" in (ROOT / "docs/quantization.md").read_text()
    else:
        assert done.returncode == 0, done.stderr
        assert "Once upon a time" in done.stdout
        assert "· quantized" in done.stderr
