"""Who may import whom, read from the source: config <- model <- generate <- server <- cli, config <- quant <- cli."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "config": set(),
    "model": {"config"},
    "quant": {"config"},
    "generate": {"config", "model"},
    "server": {"config", "model", "generate"},
    "cli": {"config", "model", "quant", "generate", "server"},
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_the_reader_of_imports_sees_all_kinds():
    assert imported_packages("import a.b, c\ndef f():\n    from d.e import g") == {"a", "c", "d"}
    with pytest.raises(AssertionError):
        imported_packages("from . import x")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_point_right(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(path.read_text()) & (set(MAY_IMPORT) | {"tests", "torchchat"})
    assert ours <= MAY_IMPORT[package] | {package}


def test_config_imports_no_torch():
    for path in sorted((ROOT / "config").glob("*.py")):
        assert "torch" not in imported_packages(path.read_text()), path.name


def test_every_module_begins_with_what_it_owns():
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in MODULES}
    assert [name for name, source in sources.items() if source and not ast.get_docstring(ast.parse(source))] == []


def test_every_command_has_its_module():
    assert [name for name, (_, module) in COMMANDS.items() if find_spec(module) is None] == []


def test_help_imports_no_torch():
    """Of the program and of each command: it would take seconds. One fresh interpreter for all."""
    asks = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    script = f"""
import sys
from cli.main import main
for ask in {asks!r}:
    assert main(ask) == 0, ask
    slow = [name for name in ("torch", "numpy", "transformers", "tokenizers", "jinja2") if name in sys.modules]
    assert not slow, (ask, slow)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
