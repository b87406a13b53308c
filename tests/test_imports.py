"""Who may import whom, read from the source: config <- model <- generate <- server <- cli and
config <- model <- quant <- cli."""

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
    "quant": {"config", "model"},
    "generate": {"config", "model"},
    "server": {"config", "model", "generate"},
    "cli": {"config", "model", "quant", "generate", "server"},
}
# quant knows layers and how kernels become ops, not the Transformer that is made of them.
QUANT_MAY_IMPORT = {
    f"model.{name}" for name in ("kernels", "layers", "moe_experts", "ops", "products", "tracing", "triton_kernels")
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(source: str) -> set[str]:
    """Each module that is named: of `from a.b import c` "a.b", of `from model import c` "model.c"."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} if node.module in MAY_IMPORT else set()
            names |= inner or {node.module or ""}
    return names


def imported_packages(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(source)}


def test_the_reader_of_imports_sees_all_kinds():
    source = "import a.b, c\ndef f():\n    from d.e import g\n    from model import h, i"
    assert imported_packages(source) == {"a", "c", "d", "model"}
    assert imported_modules(source) == {"a.b", "c", "d.e", "model.h", "model.i"}
    with pytest.raises(AssertionError):
        imported_modules("from . import x")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_point_right(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(path.read_text()) & (set(MAY_IMPORT) | {"tests", "torchchat"})
    assert ours <= MAY_IMPORT[package] | {package}


def test_quant_knows_layers_and_not_the_transformer():
    for path in sorted((ROOT / "quant").rglob("*.py")):
        ours = {name for name in imported_modules(path.read_text()) if name.partition(".")[0] == "model"}
        assert ours <= QUANT_MAY_IMPORT, path.name


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
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
