"""The page's files: its libraries are as their authors published them, every module can be read, nothing is missing or
left over."""

import hashlib
import re

import pytest

from tests.server.page.driver import Page
from tests.server.page.stand_in import STATIC

VENDOR = STATIC / "vendor"
MODULES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.*js") if path.is_file())


def test_libraries_are_as_they_were_published():
    sums = dict(reversed(line.split("  ")) for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(VENDOR).as_posix(): path for path in VENDOR.glob("*/*")}
    assert set(sums) == set(files)
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == sums


def test_each_library_has_its_licence_and_version():
    told = (VENDOR / "README.md").read_text()
    for directory in (path for path in VENDOR.iterdir() if path.is_dir()):
        assert (directory / "LICENSE").stat().st_size > 500
        [script] = [path for path in directory.iterdir() if "js" in path.suffix]
        assert f"`{directory.name}/{script.name}`" in told
        [version] = re.findall(r"(?:v|DOMPurify )(\d+\.\d+\.\d+)", script.read_text()[:300])
        assert f"| {version} |" in told


def test_everything_is_used_and_nothing_is_missing():
    html = (STATIC / "index.html").read_text()
    named = set(re.findall(r"/static/([\w./-]+)", html))
    for path in STATIC.glob("*.js"):
        named |= set(re.findall(r"(?:from|import) \"\./([\w./-]+)\"", path.read_text()))
    files = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    told = {name for name in files if re.match(r"vendor/.*(LICENSE|SUMS|README|gitattributes)", name)}
    assert named == files - told - {"index.html"}


def test_every_drawing_and_id_is_there():
    html = (STATIC / "index.html").read_text()
    code = "".join(path.read_text() for path in STATIC.glob("*.js"))
    drawings = set(re.findall(r'id="icon-(\w+)"', html))
    used = set(re.findall(r'href="#icon-(\w+)"', html)) | set(re.findall(r'(?:icon|iconButton)\("(\w+)"', code))
    used |= set(re.findall(r'tool\("\w+", "(\w+)"', code))
    assert used == drawings
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'byId\("([\w-]+)"\)', code)) <= set(ids)
    assert set(re.findall(r'(?:aria-controls|aria-labelledby|aria-describedby|for)="([\w-]+)"', html)) <= set(ids)


@pytest.mark.parametrize(
    "path", [*STATIC.glob("*.js"), *STATIC.glob("*.css"), STATIC / "index.html"], ids=lambda path: path.name
)
def test_files_are_short_and_say_what_they_own(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= (260 if path.suffix == ".html" else 140)
    assert path.suffix == ".html" or lines[0].startswith(("// ", "/* "))


def test_every_module_loads(page: Page):
    loaded = page.module(
        "return Promise.all(given[0].map((name) => import(`/static/${name}`).then(() => name)))", MODULES
    )
    assert loaded == MODULES
    assert len(MODULES) > 15


def test_all_modules_are_fetched_at_once():
    """Else each would wait for the one that names it."""
    html = (STATIC / "index.html").read_text()
    named = re.findall(r'<link rel="modulepreload" href="/static/([\w./-]+)">', html)
    assert sorted([*named, "main.js", "theme.js"]) == MODULES
