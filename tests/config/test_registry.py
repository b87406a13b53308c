"""The registry: the published shapes, names in every spelling, and models found on this machine without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import registry
from config.errors import UserError
from config.hub_cache import HubName, find_in_hub_cache, match_gguf, parse_hub_name
from config.registry import DEFAULT_MODEL, ModelEntry, ModelNotHere, entries, find, resolve
from model.config import from_hf
from model.transformer import Transformer

# Totals that the publishers' own files have, where they are of more than what runs here: the parts for images, or an
# output matrix that is stored though it is the embedding. The registry's numbers must be these without those parts.
VISION_TOWER = 416_866_032
PROJECTORS = {"gemma3-4b": 1152 * 2560 + 1152, "gemma3-12b": 1152 * 3840 + 1152, "gemma3-27b": 1152 * 5376 + 1152}
WITH_IMAGES = {"gemma3-4b": 4_300_079_472, "gemma3-12b": 12_187_325_040, "gemma3-27b": 27_432_406_640}
STORED_TWICE = {"qwen3-0.6b": 751_632_384, "qwen3-1.7b": 2_031_739_904}
# The names by which the program of this name that PyTorch published knew its 35 models.
ORIGINAL = """
    meta-llama/Llama-2-7b-hf llama2-base llama2-7b
    meta-llama/Llama-2-7b-chat-hf llama2 llama2-chat llama2-7b-chat
    meta-llama/Llama-2-13b-chat-hf llama2-13b-chat
    meta-llama/Llama-2-70b-chat-hf llama2-70b-chat
    meta-llama/Meta-Llama-3-8B llama3-base
    meta-llama/Meta-Llama-3-8B-Instruct llama3 llama3-chat llama3-instruct
    meta-llama/Meta-Llama-3-70B-Instruct llama3-70b
    meta-llama/Meta-Llama-3.1-8B llama3.1-base
    meta-llama/Meta-Llama-3.1-8B-Instruct llama3.1 llama3.1-chat llama3.1-instruct
    meta-llama/Meta-Llama-3.1-70B-Instruct llama3.1-70b
    meta-llama/Meta-Llama-3.1-8B-Instruct-Tune llama3.1-tune llama3.1-chat-tune llama3.1-instruct-tune
    meta-llama/Meta-Llama-3.1-70B-Instruct-Tune llama3.1-70b-tune
    meta-llama/Meta-Llama-3.2-1B llama3.2-1b-base
    meta-llama/Meta-Llama-3.2-1B-Instruct llama3.2-1b llama3.2-1b-chat llama3.2-1b-instruct
    meta-llama/Llama-Guard-3-1B llama3-1b-guard llama3.2-1b-guard
    meta-llama/Meta-Llama-3.2-3B llama3.2-3b-base
    meta-llama/Meta-Llama-3.2-3B-Instruct llama3.2-3b llama3.2-3b-chat llama3.2-3b-instruct
    meta-llama/Llama-3.2-11B-Vision llama3.2-11B-base Llama-3.2-11B-Vision-base
    meta-llama/Llama-3.2-11B-Vision-Instruct llama3.2-11B Llama-3.2-11B-Vision Llama-3.2-mm
    meta-llama/CodeLlama-7b-Python-hf codellama codellama-7b
    meta-llama/CodeLlama-34b-Python-hf codellama-34b
    mistralai/Mistral-7B-v0.1 mistral-7b-v01-base
    mistralai/Mistral-7B-Instruct-v0.1 mistral-7b-v01-instruct
    mistralai/Mistral-7B-Instruct-v0.2 mistral mistral-7b mistral-7b-instruct
    openlm-research/open_llama_7b open-llama open-llama-7b
    stories15M
    stories42M
    stories110M
    ibm-granite/granite-3b-code-instruct-128k granite-code granite-code-3b
    ibm-granite/granite-8b-code-instruct-128k granite-code-8b
    ibm-granite/granite-3.0-2b-instruct granite3-2b granite3
    ibm-granite/granite-3.0-8b-instruct granite3-8b
    ibm-granite/granite-3.1-2b-instruct granite3.1-2b granite3.1
    ibm-granite/granite-3.1-8b-instruct granite3.1-8b
    deepseek-ai/DeepSeek-R1-Distill-Llama-8B deepseek-r1:8b
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("TORCHCHAT_MODELS_DIR", raising=False)
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


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_the_shapes_add_up_to_the_published_parameters(entry: ModelEntry) -> None:
    with torch.device("meta"):
        model = Transformer(from_hf(entry.config, entry.name))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


def test_the_numbers_are_those_of_the_published_files() -> None:
    for name, total in WITH_IMAGES.items():
        assert find(name).parameters == total - VISION_TOWER - PROJECTORS[name]
    for name, total in STORED_TWICE.items():
        config = find(name).config
        assert find(name).parameters == total - config["vocab_size"] * config["hidden_size"]
    # The text part of Llama 3.2 Vision is Llama 3.1, which was left as it was.
    assert find("llama3.2-11b").parameters == find("llama3.1-8b").parameters == 8_030_261_248


@pytest.mark.parametrize("line", ORIGINAL.strip().splitlines())
def test_the_original_s_models_have_the_names_that_they_had(line: str) -> None:
    key, *aliases = line.split()
    names = {find(name).name for name in (key, *aliases) if name != "Llama-3.2-11B-Vision"}
    assert len(names) == 1


def test_no_name_is_taken_twice() -> None:
    assert len(ORIGINAL.strip().splitlines()) == 35
    names = [n.lower() for e in entries() for n in (e.name, *e.aliases, *([e.hub_id] if e.hub_id else []))]
    assert len(names) == len(set(names))
    assert all(entry.description and len(entry.description) < 60 for entry in entries())
    assert all(name == name.lower() and "/" not in name for entry in entries() for name in (entry.name,))
    assert all(parse_hub_name(hub_id) for entry in entries() for hub_id in entry.hub_ids)


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


def test_a_name_like_nothing_is_told_where_the_list_is(hub: Path) -> None:
    assert "torchchat list" in refused("zzzzzzzzzzzz")


def test_a_model_that_is_not_here_says_how_to_get_it(hub: Path) -> None:
    message = refused("gemma3-1b")
    assert "`torchchat download gemma3-1b` fetches it (about 2.0 GB)" in message
    assert "https://huggingface.co/google/gemma-3-1b-it" in message
    assert "--random-weights gemma3-1b" in message
    assert "huggingface.co" not in refused("qwen3-8b")
    found = resolve("gemma3-1b", random_weights=True)
    assert (found.path, found.entry) == (None, find("gemma3-1b"))


def test_what_could_be_downloaded_says_what_that_is(hub: Path) -> None:
    for name, wanted in (
        ("llama3.1", HubName("meta-llama/Llama-3.1-8B-Instruct")),
        ("somebody/a.model", HubName("somebody/a.model")),
        ("somebody/model@v1.0", HubName("somebody/model", "v1.0")),
        ("somebody/model-GGUF:Q4_K_M", HubName("somebody/model-GGUF", None, "Q4_K_M")),
        ("somebody/model@refs/pr/1:a b.gguf", HubName("somebody/model", "refs/pr/1", "a b.gguf")),
    ):
        with pytest.raises(ModelNotHere) as caught:
            resolve(name)
        assert caught.value.wanted == wanted
        assert (caught.value.hub_id, caught.value.filename) == (wanted.hub_id, wanted.file)


def test_a_downloaded_model_is_found_by_name_and_by_any_hub_id(hub: Path) -> None:
    snapshot = download(hub, "google/gemma-3-1b-it")
    for name in ("gemma3-1b", "Google/Gemma-3-1b-IT"):
        assert resolve(name).path == snapshot
    other = download(hub, "somebody/some-model")
    assert resolve("somebody/some-model").path == other
    assert "torchchat download somebody/else" in refused("somebody/else")
    # Under the name that the repository had before.
    earlier = download(hub, "meta-llama/Meta-Llama-3.1-8B-Instruct")
    assert resolve("llama3.1").path == earlier


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


def test_a_revision_is_that_one_and_no_other(hub: Path) -> None:
    download(hub, "a/b", "111")
    other = download(hub, "a/b", "222", main=False)
    (hub / "models--a--b" / "refs" / "v2").write_text("222")
    for name in ("a/b@v2", "a/b@222"):
        assert resolve(name).path == other
    for name in ("a/b@v3", "a/b@22"):
        assert "is not on this machine" in refused(name)


def test_a_snapshot_without_all_its_shards_is_not_there(hub: Path) -> None:
    snapshot = download(hub, "a/b")
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_in_hub_cache("a/b") is None
    (snapshot / "model-2.safetensors").touch()
    assert find_in_hub_cache("a/b") == snapshot
    # A link to what was deleted is no file.
    (snapshot / "model-2.safetensors").unlink()
    (snapshot / "model-2.safetensors").symlink_to("nothing")
    assert find_in_hub_cache("a/b") is None


def test_one_gguf_file_is_a_model_and_several_are_listed(hub: Path, tmp_path: Path) -> None:
    (models := tmp_path / "mine").mkdir()
    (models / "a-Q8_0.gguf").touch()
    (models / "mmproj-a.gguf").touch()
    assert resolve("mine").path == Path("mine/a-Q8_0.gguf")
    assert resolve("mine/a-Q8_0.gguf").path == Path("mine/a-Q8_0.gguf")
    (models / "a-Q4_0.gguf").touch()
    line = refused("mine")
    assert "a-Q4_0.gguf, a-Q8_0.gguf" in line
    assert "mmproj" not in line
    (models / "model.safetensors").touch()
    assert resolve("mine").path == Path("mine")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["sub/m.Q8_0.gguf"]),
        ("m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("Q4_K", []),
        ("m", ["m-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "m-Q4_K_S.gguf", "sub/m.Q8_0.gguf"]),
    ],
)
def test_a_quantization_is_found_as_it_is_written(wanted: str, found: list[str]) -> None:
    names = ["m-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "m-Q4_K_S.gguf", "sub/m.Q8_0.gguf", "mmproj-Q4_K_M.gguf", "README.md"]
    assert match_gguf(wanted, names) == found


def test_a_directory_of_models_gives_them_their_names(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "my-model"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    with pytest.raises(UserError):
        resolve("my-model")
    monkeypatch.setenv("TORCHCHAT_MODELS_DIR", str(tmp_path / "models"))
    assert resolve("my-model").path == model
    assert refused("../models-of-others")
    monkeypatch.setenv("TORCHCHAT_MODELS_DIR", str(tmp_path / "absent"))
    assert refused("my-model")


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "a//b", "../a", "a/b@", "a/b:", "a/..", "a/b@../x", "a/b:../x.gguf", "a--b/c", "/a/b", "a/b\n", "é/x"],
)
def test_what_could_lead_out_of_the_cache_is_no_hub_name(name: str) -> None:
    assert parse_hub_name(name) is None


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
