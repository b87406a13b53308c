"""GGUF files that are damaged, or made to do harm: each is one line, and nothing of their size is allocated."""

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from config.errors import UserError
from model.checkpoint import find_checkpoint, find_gguf
from model.config import load_config
from model.gguf_file import read_gguf
from model.loader import load_weights
from model.transformer import Transformer
from tests.model.gguf_files import f32, gguf_state, write
from tests.model.tiny import CASES

ROOT = Path(__file__).parents[2]
HUGE = 2**63


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


def padded(data: bytes, more: int = 0) -> bytes:
    return data + bytes(-len(data) % 32 + more)


U32, F32, STRING, LIST = 4, 6, 8, 9
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic alone": (b"GGUF", "is cut short"),
    "half a header": (header()[:14], "is cut short"),
    "wrong magic": (header(magic=b"GGUE"), "is not a GGUF file; it begins with b'GGUE"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "web page": (b"<!DOCTYPE html>", "web page"),
    "older": (b"tjgg" + bytes(60), "one of the formats before GGUF"),
    "version 1": (header(version=1), "is of version 1 of GGUF"),
    "version 4": (header(version=4), "is of version 4 of GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is in big-endian byte order"),
    "many keys": (header(keys=HUGE), f"there are {HUGE} keys"),
    "more keys than fit": (header(keys=1000), "there are 1000 keys"),
    "many tensors": (header(tensors=HUGE), f"there are {HUGE} tensors"),
    "a long key": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(40), f"a key of {HUGE} bytes"),
    "a long value": (
        header(keys=1) + text("a") + struct.pack("<IQ", STRING, HUGE) + bytes(40), f"the value of 'a' of {HUGE} bytes"
    ),
    "a long list": (
        header(keys=1) + key("a", LIST, struct.pack("<IQ", U32, HUGE)) + bytes(40), f"there are {HUGE} entries in 'a'"
    ),
    "a list longer than the file": (
        header(keys=1) + key("a", LIST, struct.pack("<IQ", U32, 60)) + bytes(40), "the value of 'a' of 240 bytes"
    ),
    "a long entry": (
        header(keys=1) + key("a", LIST, struct.pack("<IQQ", STRING, 1, HUGE)) + bytes(40), "an entry of 'a' of"
    ),
    "a list of lists": (header(keys=1) + key("a", LIST, struct.pack("<IQ", LIST, 1)) + bytes(40), "is of type 9"),
    "an unknown type": (header(keys=1) + key("a", 77, bytes(40)), "is of type 77, which is not known"),
    "a key twice": (header(keys=2) + 2 * key("a", U32, bytes(4)), "the key 'a' is there twice"),
    "no UTF-8": (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40), "is not UTF-8"),
    "alignment 0": (header(keys=1) + key("general.alignment", U32, bytes(4)), "general.alignment is 0"),
    "alignment 48": (header(keys=1) + key("general.alignment", U32, struct.pack("<I", 48)), "general.alignment is 48"),
    "alignment of text": (header(keys=1) + key("general.alignment", STRING, text("x")), "general.alignment is 'x'"),
    "no dimensions": (padded(header(1) + info("t", ())), "tensor 't' has 0 dimensions"),
    "many dimensions": (padded(header(1) + text("t") + struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
    "nothing in it": (padded(header(1) + info("t", (4, 0))), "has shape [0, 4], which is empty"),
    "too many numbers": (padded(header(1) + info("t", (HUGE, HUGE, 4))), "is cut short in tensor 't'"),
    "an unknown tensor type": (padded(header(1) + info("t", (4,), 999)), "is of type 999, which is not known"),
    "a removed tensor type": (padded(header(1) + info("t", (32,), 4)), "is of type 4, which is not known"),
    "half blocks": (padded(header(1) + info("t", (40, 2), 8)), "rows of 40 numbers, which are no whole blocks of Q8_0"),
    "outside": (padded(header(1) + info("t", (4,), 0, HUGE)), "is cut short in tensor 't'"),
    "not aligned": (padded(header(1) + info("t", (4,), 0, 4), 64), "is not where a multiple of 32 bytes begins"),
    "cut short": (padded(header(1) + info("t", (4,), 0, 0), 12), "is cut short in tensor 't'"),
    "overlapping": (
        padded(header(2) + info("a", (16,), 0, 0) + info("b", (4,), 0, 32), 128), "tensors 'a' and 'b' overlap"
    ),
    "a tensor twice": (padded(header(2) + 2 * info("a", (4,)), 128), "holds tensor 'a' twice"),
    "nothing at all": (padded(header(), 64), "general.architecture is missing"),
    "architecture": (
        padded(header(keys=1) + key("general.architecture", STRING, text("rwkv")), 64),
        "its architecture 'rwkv' cannot be run here from GGUF; llama, granite, qwen2",
    ),
    "architecture of numbers": (
        padded(header(keys=1) + key("general.architecture", U32, bytes(4)), 64), "is 0, not a string"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name: str, tmp_path: Path) -> None:
    data, says = BROKEN[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        load_config(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < 4_000_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a tiny model."""
    case = CASES["llama2"]
    model = case.model()
    config = model.config.to_dict()
    return config, gguf_state(model.state_dict(), config)


def load(file: Path) -> None:
    with torch.device("meta"):
        model = Transformer(load_config(file))
    load_weights(model, file, torch.device("cpu"), torch.float32)


def refused(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_cut_anywhere_is_one_line(whole: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "m.gguf", *whole).read_bytes()
    for keep in [*range(0, 3000, 61), *range(3000, len(data), 4999), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:keep])
        assert "cut.gguf" in refused(tmp_path / "cut.gguf"), keep


@pytest.mark.parametrize("seed", range(60))
def test_a_file_with_some_bytes_changed_is_one_line_or_a_model(seed: int, whole: Any, tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "m.gguf", *whole).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        at, value = (int(torch.randint(0, most, (1,), generator=generator)) for most in (2600, 256))
        data[at] = value
    (tmp_path / "m.gguf").write_bytes(data)
    said = ""
    try:
        load(tmp_path / "m.gguf")
    except UserError as error:
        said = str(error)
    assert "\n" not in said


def test_missing_extra_and_misshapen_tensors_are_named(whole: Any, tmp_path: Path) -> None:
    config, tensors = whole
    name = "blk.1.attn_k.weight"
    changes: tuple[tuple[Mapping[str, torch.Tensor], str], ...] = (
        ({k: v for k, v in tensors.items() if k != name}, f"tensor '{name}' is missing"),
        ({k: v for k, v in tensors.items() if k != "token_embd.weight"}, "'token_embd.weight' is missing"),
        ({**tensors, name: tensors[name][:5]}, f"'{name}' has shape [5, 32], where the configuration asks for"),
        ({**tensors, "blk.9.x": torch.zeros(3)}, "tensor 'blk.9.x' is no part of the model"),
        ({**tensors, "blk.0.attn_q_norm.weight": torch.zeros(8)}, "'blk.0.attn_q_norm.weight' is no part of"),
    )
    for i, (changed, says) in enumerate(changes):
        assert says in refused(write(tmp_path / f"{i}.gguf", config, changed))


def test_types_that_nobody_decodes_are_named(whole: Any, tmp_path: Path) -> None:
    config, tensors = whole
    file = write(tmp_path / "m.gguf", config, tensors)
    kinds = {tensor.name: tensor.kind for tensor in read_gguf(file).tensors.values()}
    assert set(kinds.values()) == {GGMLQuantizationType.F32}
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", GGMLQuantizationType.I32)
    file.write_bytes(data)
    assert "tensor 'blk.0.attn_q.weight' is of type I32" in refused(file)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("llama.attention.head_count", 0, "num_attention_heads is 0"),
        ("llama.attention.head_count_kv", 3, "num_key_value_heads is 3"),
        ("llama.attention.head_count", "x", "llama.attention.head_count is 'x', not a whole number"),
        ("llama.attention.head_count", [4, 2], "llama.attention.head_count differs from layer to layer"),
        ("llama.attention.value_length", 9, "llama.attention.value_length is not key_length"),
        ("llama.block_count", 2**31, "num_hidden_layers is 2147483648"),
        ("llama.expert_count", 8, "llama.expert_used_count is missing"),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count is 4, where heads have 8"),
        ("llama.rope.scaling.type", "yearn", "llama.rope.scaling.type is 'yearn'"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "is 'x', not a number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan, not a number"),
        ("llama.context_length", -5, "max_position_embeddings is -5"),
    ],
)
def test_wrong_values_are_named(name: str, value: Any, says: str, whole: Any, tmp_path: Path) -> None:
    def set_value(writer: gguf.GGUFWriter) -> None:
        for values in writer.kv_data:
            values.pop(name, None)
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_int64(name, value)
        if name == "llama.rope.scaling.type":
            writer.add_float32("llama.rope.scaling.factor", 2.0)

    file = write(tmp_path / "m.gguf", *whole, extra=set_value)
    assert says in refused(file)


# Models in parts.


def test_a_model_in_parts_is_the_model(whole: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", *whole, split_max_tensors=9)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    one = write(tmp_path.with_name(f"{tmp_path.name}.gguf"), *whole)
    assert find_gguf(tmp_path) == parts[0]
    for path in (tmp_path, *parts):
        assert load_config(path) == load_config(one)
        assert load_all(path).keys() == load_all(one).keys()
        assert all(torch.equal(tensor, load_all(one)[name]) for name, tensor in load_all(path).items())


def load_all(path: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Transformer(load_config(path))
    load_weights(model, path, torch.device("cpu"), torch.float32)
    return dict(model.named_parameters())


def test_parts_that_do_not_belong_together_are_named(whole: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", *whole, split_max_tensors=9)
    first, second, third = sorted(tmp_path.iterdir())
    data = second.read_bytes()
    second.unlink()
    assert "m-00002-of-00003.gguf: missing; the model is in 3 files" in refused(third)
    second.write_bytes(third.read_bytes())
    assert "is not part 2 of 3, as its name says" in refused(first)
    second.write_bytes(data)
    renamed = first.with_name("other.gguf")
    renamed.write_bytes(first.read_bytes())
    assert "is a part of a model in 3 files, but its name does not say so" in refused(renamed)


# Which file.


def test_a_directory_with_one_gguf_file_is_that_file(whole: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", *whole)
    (tmp_path / "mmproj-m.gguf").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as some publish beside it, with no shapes
    assert find_checkpoint(tmp_path).files == (file,)
    assert load_config(tmp_path) == load_config(file)
    (tmp_path / "n.gguf").write_bytes(file.read_bytes())
    assert "several GGUF files are here (m.gguf, n.gguf); name the one that you mean" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert find_gguf(tmp_path) is None


def test_a_gguf_file_by_another_name_is_told_for_what_it_is(whole: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", *whole).rename(tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"is a GGUF file; give it a name that ends in \.gguf"):
        find_checkpoint(file)


@pytest.mark.parametrize("name", ["big-endian", "a long list", "cut short", "architecture"])
def test_the_command_ends_with_one_line_and_2(name: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(BROKEN[name][0])
    command = [sys.executable, "torchchat.py", "generate", str(file), "--prompt", "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert BROKEN[name][1] in done.stderr


def test_every_tensor_is_read_as_the_package_reads_it(whole: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", *whole, f32)
    ours = read_gguf(file)
    theirs = gguf.GGUFReader(file)
    assert [(t.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()
    ]
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.get(name) == field.contents(), name
