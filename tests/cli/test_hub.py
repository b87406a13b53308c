"""Downloads from a Hugging Face that fails in every way: each ends in one line, and only what is whole is loaded."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.hub import choose_files
from config.errors import UserError
from config.hub_cache import HubName
from tests.cli.fake_hub import COMMIT, FakeHub, Repository, clean_environment, serve

ROOT = Path(__file__).parent.parent.parent
ID = "somebody/a-model"
WEIGHTS = bytes(range(256)) * 12_000  # three megabytes: several chunks
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}" * 3000,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle" * 1000,
    "original/consolidated.00.pth": b"another" * 1000,
    "README.md": b"# A model",
}
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve({ID: Repository(dict(FILES))}) as it:
        yield it


@pytest.fixture
def cli(hub: FakeHub, tmp_path: Path) -> Cli:
    """The program, as a process of its own that knows no other Hugging Face."""

    def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "torchchat.py", *argv],
            cwd=tmp_path,
            env=clean_environment() | hub.environment() | {"HF_HOME": str(tmp_path / "hf")} | environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / "models--somebody--a-model"


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command ends with."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("torchchat: error: ")
    assert len(last) < 500
    return last


def test_a_download_is_what_other_tools_would_have_in_the_same_place(cli: Cli, folder: Path) -> None:
    done = cli("download", ID)
    assert done.returncode == 0, done.stderr
    snapshot = folder / "snapshots" / COMMIT
    assert done.stdout == f"{snapshot}\n"
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {name: FILES[name] for name in names}
    assert (folder / "refs" / "main").read_text() == COMMIT
    # huggingface_hub finds every file where it looks for it.
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    cache = folder.parent
    assert all(try_to_load_from_cache(ID, name, cache_dir=cache) == str(snapshot / name) for name in names)
    report = scan_cache_dir(cache)
    assert [(repo.repo_id, repo.nb_files) for repo in report.repos] == [(ID, 3)]
    assert not report.warnings
    assert cli("where", ID).stdout == f"{snapshot}\n"


def test_what_is_there_is_not_fetched_again(cli: Cli, hub: FakeHub) -> None:
    cli("download", ID)
    before = len(hub.requests)
    done = cli("download", ID)
    assert "is here already" in done.stderr
    assert [path for path, _ in hub.requests[before:]] == [f"/api/models/{ID}"]


def test_a_new_commit_brings_only_what_changed(cli: Cli, hub: FakeHub, folder: Path) -> None:
    cli("download", ID)
    other = "f" * 40
    hub.repositories[ID] = Repository({**FILES, "config.json": CONFIG + b" "}, commit=other)
    hub.requests.clear()
    assert cli("download", ID).stdout == f"{folder / 'snapshots' / other}\n"
    assert not hub.asked_for("model.safetensors")
    assert (folder / "snapshots" / COMMIT).is_dir()
    assert cli("where", ID).stdout == f"{folder / 'snapshots' / other}\n"
    assert cli("where", f"{ID}@{COMMIT}").stdout == f"{folder / 'snapshots' / COMMIT}\n"


@pytest.mark.parametrize("argv", [(f"{ID}@v1",), (ID, "--revision", "v1")])
def test_a_revision_is_kept_by_its_name(argv: tuple[str, ...], cli: Cli, folder: Path) -> None:
    assert cli("download", *argv).returncode == 0
    assert (folder / "refs" / "v1").read_text() == COMMIT
    assert cli("where", f"{ID}@v1").stdout == f"{folder / 'snapshots' / COMMIT}\n"
    assert "is not on this machine" in refused(cli("where", f"{ID}@v2"))


@pytest.mark.parametrize("fault", ["reset", "cut"])
def test_a_connection_that_breaks_goes_on_where_it_stopped(fault: str, cli: Cli, hub: FakeHub, folder: Path) -> None:
    hub.faults["model.safetensors"] = [fault, fault]
    done = cli("download", ID)
    assert done.returncode == 0, done.stderr
    ranges = [headers.get("range") for headers in hub.asked_for("model.safetensors")]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert all(asked is not None for asked in ranges[1:])
    assert (folder / "snapshots" / COMMIT / "model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_was_cut_off_is_no_model_and_goes_on_the_next_time(
    cli: Cli, hub: FakeHub, folder: Path
) -> None:
    hub.faults["model.safetensors"] = [(503, {"Retry-After": "9999"})]
    (blobs := folder / "blobs").mkdir(parents=True)
    assert "503" in refused(cli("download", ID))
    assert not (folder / "snapshots").exists()
    partial = blobs / f"{_sha256(WEIGHTS)}.incomplete"
    partial.write_bytes(WEIGHTS[:1_000_000])
    assert "is not on this machine" in refused(cli("where", ID))
    assert "cut off" in cli("list", "--here").stdout
    hub.requests.clear()
    assert cli("download", ID).returncode == 0
    assert [headers.get("range") for headers in hub.asked_for("model.safetensors")] == ["bytes=1000000-"]
    assert not partial.exists()
    assert (folder / "snapshots" / COMMIT / "model.safetensors").read_bytes() == WEIGHTS


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_server_that_knows_no_ranges_sends_it_all_again(cli: Cli, hub: FakeHub, folder: Path) -> None:
    hub.ignores_ranges = True
    hub.faults["model.safetensors"] = ["reset"]
    assert cli("download", ID).returncode == 0
    assert (folder / "snapshots" / COMMIT / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("announced", "says"),
    [
        ({"lfs": {"sha256": "0" * 64, "size": len(WEIGHTS), "pointerSize": 130}}, "is not the file"),
        ({"lfs": {"sha256": _sha256(WEIGHTS), "size": len(WEIGHTS) - 1, "pointerSize": 130}}, "is longer"),
        ({"lfs": {"sha256": _sha256(WEIGHTS), "size": len(WEIGHTS) + 1, "pointerSize": 130}}, "could be had"),
        ({"lfs": {"sha256": "../../x", "size": len(WEIGHTS), "pointerSize": 130}}, "does not say what"),
        ({"lfs": {"sha256": "0" * 64, "size": 10**18, "pointerSize": 130}}, "are free at"),
    ],
    ids=["hash", "too long", "too short", "name of the blob", "size beyond the disk"],
)
def test_what_is_not_what_was_announced_is_not_kept(
    announced: dict[str, Any], says: str, cli: Cli, hub: FakeHub, folder: Path
) -> None:
    hub.repositories[ID].announced["model.safetensors"] = announced
    assert says in refused(cli("download", ID))
    assert not (folder / "snapshots").exists()
    assert "is not on this machine" in refused(cli("where", ID))


def test_a_small_file_is_checked_too(cli: Cli, hub: FakeHub) -> None:
    hub.repositories[ID].announced["config.json"] = {"blobId": "1" * 40}
    assert "config.json: what arrived is not the file" in refused(cli("download", ID))


def test_a_full_disk_is_one_line_and_leaves_no_model(hub: FakeHub, tmp_path: Path, folder: Path) -> None:
    """A limit on the size of files stands in for it: writing fails in the middle."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000));"
        f"from cli.main import main; sys.exit(main(['download', {ID!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment() | hub.environment() | {"HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("torchchat: error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "snapshots").exists()


def test_a_busy_server_is_waited_for(cli: Cli, hub: FakeHub) -> None:
    hub.faults["a-model"] = [(429, {"Retry-After": "1"})]
    hub.faults["config.json"] = [(503, {})]
    done = cli("download", ID)
    assert done.returncode == 0, done.stderr
    assert "Hugging Face is busy (429): trying again in 1 s" in done.stderr


def test_a_server_that_wants_to_be_left_alone_is(cli: Cli, hub: FakeHub) -> None:
    hub.faults["a-model"] = [(429, {"Retry-After": "3600"})]
    assert "try again in 3600 s" in refused(cli("download", ID))


def test_access_that_must_be_asked_for_says_where_and_how(cli: Cli, hub: FakeHub, folder: Path) -> None:
    hub.repositories[ID].gated = True
    line = refused(cli("download", ID))
    assert f"{hub.url}/{ID}" in line
    assert "HF_TOKEN" in line
    assert not hub.asked_for("model.safetensors")
    assert "no access yet" in refused(cli("download", ID, HF_TOKEN="other"))
    assert cli("download", ID, "--token", "granted").returncode == 0
    # The token goes to Hugging Face, and not where the large files are.
    sent = {path.startswith("/cdn/"): headers.get("authorization") for path, headers in hub.requests[-4:]}
    assert sent[False] == "Bearer granted"
    shutil.rmtree(folder)
    assert cli("download", ID, HF_TOKEN="granted").returncode == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("somebody/no-model", "is not on Hugging Face, or it is private"),
        ("Qwen/Qwen3-0.66B", "did you mean qwen3-0.6b"),
        (f"{ID}@nowhere", "has no revision 'nowhere'"),
        (f"{ID}:Q4_K_M", "has no GGUF files"),
        ("default", "need not be downloaded"),
        ("qwen3-06b", "did you mean qwen3-0.6b"),
        (".", "need not be downloaded"),
    ],
)
def test_what_is_not_to_be_had_is_one_line(name: str, says: str, cli: Cli) -> None:
    assert says in refused(cli("download", name))


def test_two_revisions_are_one_too_many(cli: Cli) -> None:
    assert "two revisions" in refused(cli("download", f"{ID}@v1", "--revision", "main"))
    assert "not the name of a branch" in refused(cli("download", ID, "--revision", "../x"))


def test_without_a_network_one_line_says_so(cli: Cli, folder: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in refused(cli("download", ID, HF_HUB_OFFLINE="1"))
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot be reached" in refused(cli("download", ID, **nobody))
    cli("download", ID)
    for environ in ({"HF_HUB_OFFLINE": "1"}, nobody):
        done = cli("download", ID, **environ)
        assert (done.returncode, done.stdout) == (0, f"{folder / 'snapshots' / COMMIT}\n")
        assert "could not be found out" in done.stderr


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd", "a\\..\\b", "x/../../y", "a\x1b[2J"])
def test_names_that_lead_outside_are_refused(name: str, cli: Cli, hub: FakeHub, folder: Path) -> None:
    hub.repositories[ID].files[name] = b"evil" * 2000
    assert "leads elsewhere" in refused(cli("download", ID))
    assert not folder.exists()


def test_one_gguf_file_by_its_name_or_quantization(cli: Cli, hub: FakeHub, folder: Path) -> None:
    files = {f"a-model-{q}.gguf": q.encode() * 3000 for q in ("Q4_K_M", "Q8_0", "IQ4_K_M")}
    hub.repositories[ID] = Repository({**files, "mmproj-F16.gguf": b"eyes", "config.json": b"{}"})
    snapshot = folder / "snapshots" / COMMIT
    line = refused(cli("download", ID))
    assert "several GGUF files" in line
    assert "a-model-Q8_0.gguf" in line
    assert "mmproj" not in line
    assert "is not on this machine" in refused(cli("where", f"{ID}:q4_k_m"))
    assert cli("download", f"{ID}:q4_k_m").stdout == f"{snapshot / 'a-model-Q4_K_M.gguf'}\n"
    assert [path.name for path in snapshot.iterdir()] == ["a-model-Q4_K_M.gguf"]
    assert cli("where", f"{ID}:Q4_K_M").stdout == cli("where", ID).stdout == f"{snapshot / 'a-model-Q4_K_M.gguf'}\n"
    assert cli("download", f"{ID}:a-model-Q8_0.gguf").returncode == 0
    assert "several GGUF files" in refused(cli("where", ID))
    assert "is none of its GGUF files" in refused(cli("download", f"{ID}:Q5_0"))
    here = cli("list", "--here").stdout
    assert f"{ID}:a-model-Q4_K_M.gguf" in here
    assert f"{ID}:a-model-Q8_0.gguf" in here
    assert cli("remove", f"{ID}:Q8_0", "--yes").returncode == 0
    assert [path.name for path in snapshot.iterdir()] == ["a-model-Q4_K_M.gguf"]
    assert len(list((folder / "blobs").iterdir())) == 1


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ("config.json model.safetensors pytorch_model.bin", "config.json model.safetensors"),
        ("model.safetensors consolidated.safetensors", "model.safetensors"),
        ("consolidated.safetensors params.json", "params.json consolidated.safetensors"),
        ("params.json consolidated.00.pth tokenizer.model", "params.json tokenizer.model consolidated.00.pth"),
        ("pytorch_model.bin training_args.bin optimizer.pt", "pytorch_model.bin"),
        ("model.safetensors adapter_model.safetensors", "model.safetensors"),
        ("model.safetensors.index.json model-1.safetensors a.md", "model.safetensors.index.json model-1.safetensors"),
        ("model.safetensors chat_template.jinja merges.txt x/model.onnx", "chat_template.jinja merges.txt "
         "model.safetensors"),
        ("additional_chat_templates/rag.jinja additional_chat_templates/x/y.jinja x/z.jinja model.safetensors",
         "additional_chat_templates/rag.jinja model.safetensors"),
        ("model-Q8_0.gguf README.md", "model-Q8_0.gguf"),
    ],
)  # fmt: skip
def test_the_files_that_make_a_model(there: str, chosen: str) -> None:
    assert choose_files(there.split(), HubName(ID)) == chosen.split()


def test_a_repository_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="no weights"):
        choose_files(["README.md", "model.onnx", "training_args.bin"], HubName(ID))


def test_two_downloads_at_once_are_one(cli: Cli, hub: FakeHub, tmp_path: Path, folder: Path) -> None:
    environ = clean_environment() | hub.environment() | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "torchchat.py"), "download", ID]
    both = [subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(400) for process in both] == [0, 0]
    for process in both:
        process.communicate()
    assert len(hub.asked_for("model.safetensors")) == 1
    assert not list((folder / "blobs").glob("*.incomplete"))


def test_nothing_of_this_imports_torch(hub: FakeHub, tmp_path: Path) -> None:
    asks = [["download", ID], ["where", ID], ["list"], ["list", "--json"], ["remove", ID, "--yes"]]
    script = f"""
import sys
from cli.main import main
for ask in {asks!r}:
    assert main(ask) == 0, ask
    assert "torch" not in sys.modules, ask
    assert ask[0] == "download" or "huggingface_hub" in sys.modules
"""
    environ = clean_environment() | hub.environment() | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lists = "import sys; from cli.main import main; main(['list']); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", lists], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
