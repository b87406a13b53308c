"""A recipe means one thing, written in one way, and what cannot be meant is one line that helps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import UserError
from config.settings import Setting
from quant.recipe import MAX_BYTES, READY_MADE, Entry, read_recipe
from quant.schemes import SCHEMES, Arguments

ROOT = Path(__file__).parent.parent.parent


def read(**values):
    return read_recipe(json.dumps(values), "--quantize")


def entries(**values):
    return read(**values).entries


def only(key, **arguments):
    (entry,) = entries(**{key: arguments})
    return entry


def refusal(text):
    with pytest.raises(UserError) as error:
        read_recipe(text, "--quantize")
    line = str(error.value)
    assert line.startswith("--quantize")
    assert "\n" not in line
    assert len(line) < 300
    return line


# ---- What it means ----


@pytest.mark.parametrize(
    ("key", "arguments", "expected"),
    [
        ("linear:int8", {}, Arguments(8, 0)),
        ("linear:int8", {"groupsize": 0}, Arguments(8, 0)),
        ("linear:int8", {"groupsize": 96}, Arguments(8, 96)),
        ("linear:int4", {}, Arguments(4, 32)),
        ("linear:int4", {"groupsize": 256}, Arguments(4, 256)),
        ("linear:a8w4dq", {"groupsize": 64}, Arguments(4, 64)),
        ("linear:a8wxdq", {}, Arguments(4, 32)),
        ("linear:a8wxdq", {"bitwidth": 8}, Arguments(8, 0)),
        ("linear:a8wxdq", {"bitwidth": 3, "groupsize": -1, "has_weight_zeros": True}, Arguments(3, 0, True)),
        ("linear:a8w8dq", {}, Arguments(8, 0)),
        ("linear:fp8", {}, Arguments(8, 0)),
        ("linear:fp8dq", {}, Arguments(8, 0)),
        ("linear:afpwx", {"bitwidth": 2, "groupsize": 128}, Arguments(2, 128, True)),
        ("embedding", {}, Arguments(8, 0)),
        ("embedding", {"bitwidth": 4}, Arguments(4, 32)),
        ("embedding", {"bitwidth": 4, "groupsize": 0}, Arguments(4, 0)),
        ("embedding:wx", {"bitwidth": 1}, Arguments(1, 32, True)),
        ("embedding:wx", {"bitwidth": 8, "groupsize": 32}, Arguments(8, 32)),
    ],
)
def test_arguments_and_their_defaults(key, arguments, expected):
    assert only(key, **arguments) == Entry(key, expected)


def test_every_key_can_be_given_without_arguments():
    assert {only(key).key for key in SCHEMES} == set(SCHEMES)


def test_torchaos_spelling_is_known_too():
    assert only("linear:a8wxdq", bit_width=2, group_size=64) == only("linear:a8wxdq", bitwidth=2, groupsize=64)


def test_layers_and_skip_are_a_pattern_or_several():
    entry = only("linear:int4", layers="*.mlp.*", skip=["layers.0.*", "lm_head"])
    assert (entry.layers, entry.skip) == (("*.mlp.*",), ("layers.0.*", "lm_head"))


def test_a_key_may_have_several_objects_of_arguments():
    both = entries(**{"linear:int8": [{"layers": "lm_head"}, {"layers": "*.mlp.*", "groupsize": 32}]})
    assert [entry.args.group_size for entry in both] == [0, 32]


def test_precision_and_executor_are_settings():
    recipe = read(precision={"dtype": "fp16"}, executor={"accelerator": "cpu"})
    assert recipe.dtype == Setting("fp16", 'quantize "precision"')
    assert recipe.device == Setting("cpu", 'quantize "executor"')
    assert read(precision="fp16").dtype == recipe.dtype
    assert recipe.entries == ()


def test_an_empty_recipe_is_none():
    assert read().entries == ()
    assert read().text == "{}"


# ---- One way to write it ----

WRITTEN = [
    {},
    {"precision": "bf16", "executor": {"accelerator": "cuda"}},
    {key: [{"layers": "x"}, {"skip": ["y", "z"]}] for key in SCHEMES},
    {"linear:a8wxdq": {"bitwidth": 8, "groupsize": -1, "has_weight_zeros": True}},
    {"linear:int8": {"groupsize": 32}, "embedding:wx": {"bitwidth": 8}},
]


@pytest.mark.parametrize("values", WRITTEN, ids=str)
def test_what_is_written_out_is_read_as_the_same(values):
    recipe = read_recipe(json.dumps(values), "--quantize mine.json")
    again = read_recipe(recipe.text, recipe.name)
    assert again == recipe


def test_the_same_meaning_is_the_same_text():
    a = '{"embedding": {}, "linear:int4": {"group_size": 32, "layers": "x"}, "precision": "bf16"}'
    b = '{"precision": {"dtype": "bf16"}, "linear:int4": [{"layers": ["x"]}], "embedding": {"bitwidth": 8}}'
    assert read_recipe(a, "a").text == read_recipe(b, "b").text
    assert read_recipe(a, "a").text != read_recipe(a.replace('"x"', '"y"'), "a").text


# ---- Where it comes from ----


def test_a_file_is_read_whatever_its_beginning(tmp_path):
    (file := tmp_path / "q.json").write_text('\ufeff\n {"linear:int8": {}}')
    recipe = read_recipe(str(file), "--quantize")
    assert recipe.name == f"--quantize {file}"
    assert recipe.entries == entries(**{"linear:int8": {}})


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_recipes_are_known_by_name(name):
    recipe = read_recipe(name, "TORCHCHAT_QUANTIZE")
    assert recipe.entries
    assert recipe.name == f"TORCHCHAT_QUANTIZE {name}"


def test_these_are_ready_made():
    assert list(READY_MADE) == ["cpu", "cpu-small", "cuda", "cuda-fast", "mps"]


def test_a_name_goes_before_a_file_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").write_text("{}")
    said = []
    assert read_recipe("cpu", "--quantize", said.append).entries
    assert said == ["--quantize cpu is the recipe of that name that comes with torchchat, not the file ./cpu"]
    assert not read_recipe("./cpu", "--quantize", said.append).entries
    (tmp_path / "cpu.json").write_text("{}")
    assert not read_recipe("cpu.json", "--quantize", said.append).entries
    assert len(said) == 1


# ---- What cannot be ----


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # not a recipe
        ("[1, 2]", 'a recipe is a JSON object such as {"linear:int8": {}}, not a list'),
        ("", "is empty; give cpu, cpu-small, cuda, cuda-fast, mps, a JSON file, or the JSON itself beginning with {"),
        ("{'a': 1}", "not JSON"),
        ('{"linear:int8": NaN}', "NaN is not JSON"),
        ('{"linear:int8": ' + "[" * 100_000, "nested too deeply|not JSON"),
        ('{"linear:int8": ' + "[" * 300 + "]" * 300 + "}", "must be an object of arguments"),
        ('{"linear:int8": ' + "9" * 6000 + "}", "not JSON|must be an object of arguments"),
        ('{"a": "' + "x" * MAX_BYTES + '"}', "over 1 MB"),
        ('{"linear:int8": {}, "linear:int8": {}}', 'the key "linear:int8" is there twice: give both under one key'),
        ('{"precision": {"dtype": "bf16", "dtype": "fp16"}}', 'the key "dtype" is there twice'),
        # keys
        (
            '{"linear:in8": {}}',
            'unknown key "linear:in8", the nearest is "linear:int8"; there are linear:int8, linear:',
        ),
        ('{"int4": {}}', 'unknown key "int4", the nearest is "linear:int4"'),
        ('{"embeddings": {}}', 'the nearest is "embedding"'),
        ('{"' + "y" * 5000 + '": {}}', "unknown key"),
        ('{"linear:int8": 8}', 'must be an object of arguments, such as {} or {"groupsize": 32}, or a list'),
        ('{"linear:int8": []}', "not an empty list"),
        ('{"linear:int8": [{}, 3]}', "not 3"),
        ('{"linear:fp8": null}', "not null"),
        # arguments
        ('{"linear:int4": {"groupsise": 32}}', 'unknown argument "groupsise", the nearest is "groupsize"'),
        ('{"linear:fp8": {"groupsize": 32}}', 'unknown argument "groupsize"; there are layers, skip'),
        ('{"linear:int4": {"bitwidth": 4}}', 'unknown argument "bitwidth"; there are groupsize, layers, skip'),
        ('{"linear:int4": {"groupsize": 32, "group_size": 32}}', '"groupsize" and "group_size" are the same argument'),
        ('{"linear:int4": {"groupsize": "32"}}', 'must be 32, 64, 128 or 256, not "32"; leave out the quotes'),
        ('{"linear:int4": {"groupsize": "many"}}', 'must be 32, 64, 128 or 256, not "many"'),
        ('{"linear:int4": {"groupsize": true}}', "not true"),
        ('{"linear:int4": {"groupsize": null}}', "not null"),
        ('{"linear:int4": {"groupsize": 32.0}}', "not 32.0"),
        ('{"linear:int4": {"groupsize": 0}}', "must be 32, 64, 128 or 256, not 0; the nearest is 32"),
        ('{"linear:int4": {"groupsize": -1}}', "not -1; the nearest is 32"),
        ('{"linear:int4": {"groupsize": 7}}', "not 7; the nearest is 32"),
        ('{"linear:int4": {"groupsize": 512}}', "not 512; the nearest is 256"),
        ('{"linear:int8": {"groupsize": 7}}', "a multiple of 32 up to 65536, or 0 for one scale a row, not 7"),
        ('{"linear:int8": {"groupsize": -1}}', "not -1; the nearest is 0"),
        ('{"linear:a8w4dq": {"groupsize": 0}}', "a multiple of 32 up to 65536, not 0; the nearest is 32"),
        ('{"linear:a8wxdq": {"groupsize": 0}}', "or -1 for one scale a row, not 0; the nearest is -1"),
        ('{"linear:a8wxdq": {"groupsize": 90}}', "the nearest is 96"),
        ('{"linear:a8wxdq": {"groupsize": ' + "9" * 1000 + "}}", "the nearest is 65536"),
        ('{"linear:a8wxdq": {"bitwidth": 9}}', "a whole number from 1 to 8, not 9; the nearest is 8"),
        ('{"linear:a8wxdq": {"bitwidth": true}}', "a whole number from 1 to 8, not true"),
        ('{"linear:afpwx": {"bitwidth": 8}}', "a whole number from 1 to 7, not 8; the nearest is 7"),
        ('{"embedding": {"bitwidth": 5}}', "must be 4 or 8, not 5; the nearest is 4"),
        ('{"linear:a8wxdq": {"has_weight_zeros": 1}}', "must be true or false, not 1"),
        ('{"linear:int8": {"layers": []}}', "must be a pattern of module names"),
        ('{"linear:int8": {"layers": ["lm_head", 3]}}', "or a list of patterns, not 3"),
        ('{"linear:int8": {"skip": ""}}', 'not ""'),
        # settings
        ('{"precision": 1}', '"precision" must be {"dtype": one of fast, '),
        ('{"precision": {"type": "bf16"}}', '"precision" must be {"dtype": one of fast, '),
        ('{"precision": {"dtype": "bfloat16"}}', 'fp32, not "bfloat16"; the nearest is bf16'),
        ('{"executor": {"accelerator": "gpu"}}', 'fast, cpu, cuda, mps, not "gpu"; the nearest is cuda'),
        # two for one layer
        ('{"linear:int8": {}, "linear:int4": {}}', '"linear:int8" and "linear:int4" are both for every linear layer'),
        ('{"embedding": {}, "embedding:wx": {}}', "are both for every embedding"),
        ('{"linear:int8": [{}, {"groupsize": 32}]}', '"linear:int8" is twice for every linear layer'),
        # files
        ("no-such-file", "No such file or directory; give cpu, cpu-small, cuda, cuda-fast, mps, a JSON file"),
        ("cpu_small.json", "No such file or directory; give cpu, .* did you mean cpu-small?"),
        ("x" * 300, "File name too long"),
        (".", "Is a directory"),
        ("a\0b", "embedded null byte"),
    ],
    ids=lambda text: text[:60],
)
def test_a_bad_recipe_is_one_clear_line(text, says):
    line = refusal(text)
    assert any(re.search(".*".join(map(re.escape, one.split(".*"))), line) for one in says.split("|")), line


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1, 2]", "a recipe is a JSON object"),
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"{" + b" " * (10 * 2**20) + b"}", "over 1 MB"),
        (b'{"linear:int9": {}}', 'unknown key "linear:int9"'),
    ],
    ids=["list", "empty", "binary", "10 MB", "unknown"],
)
def test_a_bad_file_is_named(tmp_path, monkeypatch, data, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_bytes(data)
    line = refusal("r.json")
    assert line.startswith("--quantize r.json")
    assert says in line


def test_reading_recipes_imports_no_torch():
    script = "import sys, quant.recipe; sys.exit('torch' in sys.modules or 'torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=240).returncode == 0
