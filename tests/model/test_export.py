"""The file that holds an exported program: what is written comes back, and whatever else such a file may be is refused
before any of it runs. Nothing is compiled here: the code in these packages is a few bytes.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from model.environment import Environment, instructions
from model.export import (
    ALIGNMENT,
    FILES,
    NATIVE,
    PACKAGE,
    PROGRAMS,
    ROOT,
    WEIGHTS,
    Metadata,
    open_package,
    weight_parts,
    writing,
)
from model.saved import Layout

CODE = {f"{PROGRAMS}decode/x.so": b"\x7fELF" + bytes(range(256)) * 5, f"{NATIVE}attention.so": b"\x7fELFops"}
TENSORS = {
    "embed_tokens.weight": torch.arange(40, dtype=torch.float32).view(5, 8),
    "lm_head.values": torch.arange(-5, 10, dtype=torch.int8).view(3, 5),
    "norm.weight": torch.arange(7, dtype=torch.bfloat16),
}
FACTS = Metadata(
    1, "aotinductor", "2.13.0", None, None, "linux x86_64", "cpu", ["avx2"], None, "fp32", None, 16, 1, 8, [2],
    "a test", "0" * 64, {"torch": "2.13.0"}, "today", {},
)  # fmt: skip


def write(path: Path, facts: dict[str, Any] | None = None, extra: dict[str, bytes] | None = None) -> Path:
    """A package. facts: of its metadata, in the place of those that are right; None leaves out."""
    with writing(path) as (writer, partial):
        for name, data in CODE.items():
            writer.add(name, data)
        document = FACTS.document() | {"code": dict(writer.hashes)} | (facts or {})
        document = {key: value for key, value in document.items() if value is not ...}
        writer.add(PACKAGE, json.dumps(document).encode())
        writer.add(f"{FILES}config.json", b"{}")
        for name, data in (extra or {}).items():
            writer.add(name, data)
        layout = Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}, {})
        writer.stream(WEIGHTS, layout.nbytes, weight_parts(layout, TENSORS, lambda count: None))
        writer.close()
        partial.replace(path)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write(tmp_path / "model.pt2")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_comes_back(package: Path) -> None:
    opened = open_package(package)
    assert {name: opened.read(name) for name in opened.metadata.code} == CODE
    opened.check_code()
    weights = opened.weights()
    assert list(weights) == list(TENSORS) or set(weights) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].dtype == tensor.dtype
        assert weights[name].data_ptr() % ALIGNMENT == 0
    with opened.unpacked(FILES) as directory:
        assert [path.name for path in directory.iterdir()] == ["config.json"]
        kept = directory
    assert not kept.exists()
    assert [path.name for path in package.parent.iterdir()] == ["model.pt2"]


def test_what_is_written_in_memory_is_not_in_the_file(package: Path) -> None:
    before = package.read_bytes()
    open_package(package).weights()["embed_tokens.weight"].fill_(7)
    assert package.read_bytes() == before


def test_torchs_own_reader_finds_the_same(package: Path) -> None:
    """That is what a program in C++ reads it with."""
    reader = torch._C.PyTorchFileReader(str(package))
    assert set(CODE) < set(reader.get_all_records())
    assert reader.get_record(PACKAGE) == open_package(package).read(PACKAGE)
    at = reader.get_record_offset(WEIGHTS)
    assert at % ALIGNMENT == 0
    assert package.read_bytes()[at : at + 200] == open_package(package).read(WEIGHTS)[:200]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_one_that_failed(error: type[BaseException], tmp_path: Path) -> None:
    (path := tmp_path / "model.pt2").write_bytes(b"as it was")

    def fail() -> None:
        with writing(path) as (writer, _):
            writer.add(PACKAGE, b"{}")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"as it was"]


# ---- Other files ----


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x7fELF something else", "is not a package that torchchat exported"),
    ],
)
def test_files_that_are_no_package(data: bytes, says: str, tmp_path: Path) -> None:
    (path := tmp_path / "model.pt2").write_bytes(data)
    assert says in refusal(lambda: open_package(path))


def test_packages_of_others(tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/model/x.so", b"code")
    assert "was not exported by torchchat" in refusal(lambda: open_package(path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_package_that_is_cut_short(share: float, package: Path) -> None:
    data = package.read_bytes()
    package.write_bytes(data[: int(len(data) * share)])
    assert "is cut short or damaged" in refusal(lambda: open_package(package))


def test_code_that_was_changed(package: Path) -> None:
    data = bytearray(package.read_bytes())
    data[data.index(b"\x7fELFops") + 5] ^= 1
    package.write_bytes(bytes(data))
    assert "is damaged: extra/native/attention.so" in refusal(lambda: open_package(package).check_code())


def test_code_of_which_another_hash_is_known(tmp_path: Path) -> None:
    code = {f"{NATIVE}attention.so": "0" * 64}
    path = write(tmp_path / "model.pt2", {"code": code})
    assert "attention.so is not what was exported" in refusal(lambda: open_package(path).check_code())


def test_metadata_that_were_changed_in_place(package: Path) -> None:
    data = package.read_bytes()
    package.write_bytes(data.replace(b'"device": "cpu"', b'"device": "gpu"'))
    assert "is damaged" in refusal(lambda: open_package(package))


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil", "a\nb", "folder/"])
def test_entries_that_lead_out(name: str, package: Path) -> None:
    with zipfile.ZipFile(package, "a") as archive:
        archive.writestr(name if name.startswith("/") else ROOT + name, b"")
    assert "which leads out of it" in refusal(lambda: open_package(package))


def test_entries_that_are_compressed(package: Path) -> None:
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ROOT + "extra/bomb", bytes(10**6))
    assert "is compressed" in refusal(lambda: open_package(package))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"format": 2}, '"format" is 2, and this torchchat reads 1'),
        ({"format": ...}, '"format" is null'),
        ({"device": ...}, '"device" is missing'),
        ({"surprise": 1}, '"surprise" is unknown'),
        ({"max_seq_len": "16"}, '"max_seq_len" in extra/package.json is not what torchchat writes'),
        ({"max_num_seqs": 0}, '"max_num_seqs" in extra/package.json is not'),
        ({"prefill_chunk": True}, '"prefill_chunk" in extra/package.json is not'),
        ({"code": {"extra/native/gone.so": "0" * 64}}, "extra/native/gone.so is missing"),
    ],
)
def test_metadata_that_are_not_ours(facts: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in refusal(lambda: open_package(write(tmp_path / "model.pt2", facts)))


@pytest.mark.parametrize(
    "header",
    [
        {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 999999]},
        {"dtype": "F32", "shape": [5, 9], "data_offsets": [0, 160]},
        {"dtype": "F32", "shape": [-5, -8], "data_offsets": [0, 160]},
        {"dtype": "F99", "shape": [5, 8], "data_offsets": [0, 160]},
        {"dtype": "F32", "shape": [5, 8], "data_offsets": [1, 161]},
        {"dtype": "F32", "shape": "58", "data_offsets": [0]},
        [],
    ],
)
def test_weights_that_are_not_where_they_should_be(header: object, tmp_path: Path) -> None:
    text = json.dumps({"embed_tokens.weight": header}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(200)
    path = write_other_weights(tmp_path / "model.pt2", data)
    assert "weight 'embed_tokens.weight' is not where it should be" in refusal(open_package(path).weights)


@pytest.mark.parametrize("data", [b"", b"1234", (10**15).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"[1]!"])
def test_weights_that_are_none(data: bytes, tmp_path: Path) -> None:
    path = write_other_weights(tmp_path / "model.pt2", data)
    assert "is damaged" in refusal(open_package(path).weights)


def write_other_weights(path: Path, data: bytes) -> Path:
    with writing(path) as (writer, partial):
        writer.add(PACKAGE, json.dumps(FACTS.document()).encode())
        writer.add(f"{FILES}config.json", b"{}")
        writer.add(WEIGHTS, data)
        writer.close()
        partial.replace(path)
    return path


# ---- The machine ----

HERE = Environment("2.13.0", None, None, "linux x86_64", ("avx2", "fma"), None)


@pytest.mark.parametrize(
    ("needed", "says"),
    [
        (Environment("2.12.1", None, None, "linux x86_64", (), None), "with torch 2.12.1, and here is 2.13.0"),
        (Environment("2.13.0", "3.9", None, "linux x86_64", (), None), "with Python 3.9, and here is none"),
        (Environment("2.13.0", None, "13.0", "linux x86_64", (), None), "with CUDA 13.0, and here is none"),
        (Environment("2.13.0", None, None, "darwin arm64", (), None), "for darwin arm64, and here is linux x86_64"),
        (Environment("2.13.0", None, None, "linux x86_64", (), "9.0"), "for a GPU of compute capability 9.0, and here"),
        (
            Environment("2.13.0", None, None, "linux x86_64", ("amx_tile", "avx2", "avx512f"), None),
            "for a processor with amx_tile, avx512f, which this one does not have",
        ),
    ],
)
def test_what_a_machine_lacks(needed: Environment, says: str) -> None:
    missing = needed.missing(HERE)
    assert missing is not None
    assert says in missing


def test_code_of_this_machine_runs_here_and_on_one_that_can_do_more() -> None:
    here = Environment.here(torch.device("cpu"), needs_python=False)
    assert here.missing(here) is None
    more = Environment("2.13.0", None, None, "linux x86_64", ("avx2", "avx512f", "fma"), None)
    assert HERE.missing(more) is None
    assert set(instructions()) == set(here.instructions)
