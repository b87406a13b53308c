"""The registry: the published shapes, names in every spelling, and models found on this machine without a network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import registry
from config.errors import UserError
from config.registry import DEFAULT_MODEL, entries, find, find_in_hub_cache, resolve
from model.config import from_hf
from model.transformer import Transformer

# The numbers of parameters that the models were published with: wrong shapes would not add up to them.
PUBLISHED = {
    "stories15m": 15_191_712,
    "stories110m": 109_529_856,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "granite3.1-2b": 2_533_531_648,
    "granite3.1-8b": 8_170_848_256,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def download(hub: Path, hub_id: str, revision: str = "abc", *, main: bool = True) -> Path:
    """What a download of weights leaves in the cache."""
    folder = hub / ("models--" + hub_id.replace("/", "--"))
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
    return snapshot


def refused(name: str, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        resolve(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_add_up_to_the_published_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(from_hf(find(name).config, name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_every_entry_is_judged_and_no_name_is_taken_twice() -> None:
    assert {entry.name for entry in entries()} == {*PUBLISHED, DEFAULT_MODEL}
    names = [n.lower() for e in entries() for n in (e.name, *e.aliases, *([e.hub_id] if e.hub_id else []))]
    assert len(names) == len(set(names))
    assert all(entry.description for entry in entries())


def test_a_model_answers_to_its_name_alias_and_hub_id_in_any_case() -> None:
    for name in ("llama3.2-1b", "LLAMA3.2-1B", "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"):
        assert find(name).name == "llama3.2-1b"


@pytest.mark.parametrize(
    ("name", "near"),
    [("lama3.2-1b", "llama3.2-1b"), ("qwen3-06b", "qwen3-0.6b"), ("stories15", "stories15m"), ("defualt", "default")],
)
def test_the_nearest_names_are_offered(name: str, near: str, hub: Path) -> None:
    assert near in refused(name)
    with pytest.raises(UserError, match="did you mean"):
        find(name)


def test_a_name_like_nothing_gets_the_whole_list(hub: Path) -> None:
    message = refused("zzzzzzzzzzzz")
    assert all(name in message for name in PUBLISHED)


def test_a_model_that_is_not_here_says_how_to_get_it(hub: Path) -> None:
    message = refused("gemma3-1b")
    assert "hf download google/gemma-3-1b-it" in message
    assert "--random-weights gemma3-1b" in message
    found = resolve("gemma3-1b", random_weights=True)
    assert (found.path, found.entry) == (None, find("gemma3-1b"))


def test_a_downloaded_model_is_found_by_name_and_by_any_hub_id(hub: Path) -> None:
    snapshot = download(hub, "google/gemma-3-1b-it")
    for name in ("gemma3-1b", "Google/Gemma-3-1b-IT"):
        assert resolve(name).path == snapshot
    other = download(hub, "somebody/some-model")
    assert resolve("somebody/some-model").path == other
    assert "hf download somebody/else" in refused("somebody/else")


def test_the_snapshot_of_main_is_taken_else_one_with_weights(hub: Path) -> None:
    main = download(hub, "a/b", "111")
    download(hub, "a/b", "222", main=False)
    assert find_in_hub_cache("a/b") == main
    (main / "model.safetensors").unlink()
    found = find_in_hub_cache("a/b")
    assert found is not None
    assert found.name == "222"
    (hub / "models--a--b" / "refs" / "main").write_text("../../elsewhere")
    assert find_in_hub_cache("a/b") == found
    (found / "model.safetensors").unlink()
    assert find_in_hub_cache("a/b") is None


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_hugging_face_keeps_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    snapshot = download(tmp_path / below.get(variable, ""), "a/b")
    assert find_in_hub_cache("a/b") == snapshot


def test_a_local_directory_or_file_is_taken_as_it_is(hub: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine"
    model.mkdir()
    assert "without weights" in refused("./mine")
    assert resolve("./mine", random_weights=True).path == Path("mine")
    weights = model / "model.safetensors"
    weights.touch()
    assert (resolve("mine").path, resolve("mine").name, resolve("mine").entry) == (Path("mine"), "mine", None)
    assert resolve(str(weights)).path == weights
    model.rename(tmp_path / "qwen3-8b")
    assert resolve("qwen3-8b").path == Path("qwen3-8b")
    snapshot = download(hub, "Qwen/Qwen3-8B")
    assert resolve("qwen3-8b").path == snapshot
    text = tmp_path / "notes.txt"
    text.touch()
    assert "not a checkpoint" in refused(str(text))


@pytest.mark.parametrize("name", ["", "x" * 300, "x" * 5000, "a\0b", "~nobody-of-that-name/x", "../x/../y", "a/b/c"])
def test_a_name_that_can_be_nothing_is_one_line(name: str, hub: Path) -> None:
    assert refused(name)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent.pt"])
def test_a_path_that_is_not_there_is_called_that(name: str, hub: Path) -> None:
    assert "no such file" in refused(name)


def test_the_embedded_model_is_the_directory_that_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = find(DEFAULT_MODEL)
    assert entry.directory == Path(registry.__file__).parent.parent / "model" / "default"
    (tmp_path / "model" / "default").mkdir(parents=True)
    monkeypatch.setattr(registry, "_PROJECT", tmp_path)
    registry._load_entries.cache_clear()
    registry._by_name.cache_clear()
    try:
        assert "incomplete" in refused(DEFAULT_MODEL)
        (tmp_path / "model" / "default" / "model.safetensors").touch()
        assert resolve(DEFAULT_MODEL).path == tmp_path / "model" / "default"
    finally:
        registry._load_entries.cache_clear()
        registry._by_name.cache_clear()


def test_the_registry_needs_no_torch_and_no_network() -> None:
    code = "import sys, config.registry as r; r.entries(); print([m for m in ('torch', 'socket') if m in sys.modules])"
    root = Path(registry.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
