"""A plan has every weight of the model once, gives each layer the one entry that is for it, and counts bytes."""

import json

import pytest
import torch
from torch import nn

from config.errors import UserError
from config.registry import entries as registry
from config.registry import find
from model.config import from_hf
from model.layers import Embedding, Linear
from model.transformer import Transformer
from quant.patterns import spellings
from quant.plan import NEVER, Left, make_plan
from quant.recipe import READY_MADE, read_recipe


def meta(name="default", **changes):
    with torch.device("meta"):
        return Transformer(from_hf(dict(find(name).config) | changes, name))


TIED, UNTIED, EXPERTS = meta(), meta(tie_word_embeddings=False), meta("olmoe")
NARROW = meta(hidden_size=20, head_dim=10, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40)


def plan(model=TIED, text=None, device="cpu", dtype="bf16", **values):
    recipe = read_recipe(text or json.dumps(values), "--quantize")
    return make_plan(model, recipe, device_type=device, dtype_name=dtype)


def keys(made):
    """Layer -> scheme, the layers of a block without their number where all have the same."""
    return {assignment.name.split(".", 2)[-1]: assignment.key for assignment in made.assignments}


def refusal(**values):
    with pytest.raises(UserError) as error:
        plan(**values)
    line = str(error.value)
    assert line.startswith("--quantize")
    assert "\n" not in line
    assert len(line) < 300
    return line


# ---- Every weight once ----

RECIPES = [
    *READY_MADE,
    "{}",
    '{"linear:int4": {}}',
    '{"embedding": {}}',
    '{"linear:int8": {"layers": "lm_head"}, "embedding": {"bitwidth": 4}}',
    '{"linear:a8wxdq": {"bitwidth": 1, "skip": "lm_head"}, "embedding:wx": {"bitwidth": 3}}',
]


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("model", [TIED, UNTIED, NARROW, EXPERTS], ids=["tied", "untied", "narrow", "experts"])
def test_every_weight_is_in_one_of_the_lists(model, text):
    made = plan(model, text)
    assigned = {assignment.name for assignment in made.assignments}
    left = [one.name for one in made.left]
    named = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted([*assigned, *left]) == sorted(named)
    assert made.nbytes == sum(one.nbytes for one in (*made.assignments, *made.left))
    assert made.original_nbytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert [a.name for a in made.assignments] == [n for n, _ in model.named_modules() if n in assigned]


@pytest.mark.parametrize("entry", registry(), ids=lambda entry: entry.name)
def test_ready_made_recipes_make_every_known_model_smaller(entry):
    model = meta(entry.name)
    for text in READY_MADE:
        made = plan(model, text)
        small = text in ("cpu-small", "cuda-fast")
        assert made.nbytes < made.original_nbytes * (0.45 if small else 0.52), (text, made.nbytes, made.original_nbytes)
        assert {one.reason for one in made.left} <= {"a bias", *NEVER.values()}


def test_nothing_asked_for_is_the_model_as_it_is():
    made = plan()
    assert made.assignments == ()
    assert made.nbytes == made.original_nbytes
    assert made.left[-1] == Left("lm_head", (4096, 256), "no scheme for linear layers; one copy with embed_tokens", 0)


# ---- Which entry ----


def test_layers_have_precedence_over_none():
    made = keys(plan(**{"linear:int4": {}, "linear:int8": {"layers": "lm_head"}}))
    assert made.pop("lm_head") == "linear:int8"
    assert set(made.values()) == {"linear:int4"}


def test_what_an_entry_skips_is_for_another():
    made = keys(
        plan(**{"linear:int4": {"skip": "*.down_proj"}, "linear:a8w8dq": {"layers": ["*.mlp.*"], "skip": "*.gate_up*"}})
    )
    assert made == {
        "attention.qkv_proj": "linear:int4", "attention.o_proj": "linear:int4", "lm_head": "linear:int4",
        "feed_forward.gate_up_proj": "linear:int4", "feed_forward.down_proj": "linear:a8w8dq",
    }  # fmt: skip


def test_the_same_scheme_twice():
    made = plan(**{"linear:int8": [{"layers": "lm_head"}, {"layers": "layers.[01].*", "groupsize": 64}]})
    assert {a.name.split(".")[0]: a.args.group_size for a in made.assignments} == {"layers": 64, "lm_head": 0}
    assert len(made.assignments) == 1 + 2 * 4


def test_what_is_skipped_says_by_whom():
    made = plan(**{"linear:int4": {"skip": "lm_head"}, "embedding": {}})
    (left,) = [one for one in made.left if one.name == "lm_head"]
    assert left.reason == '"skip" of linear:int4; tied to embed_tokens, whose quantized copy does not serve it'
    assert left.nbytes == 4096 * 256 * 2


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("*", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}),
        ("*.self_attn.*", {"qkv_proj", "o_proj"}),
        ("model.layers.0.mlp.*", {"gate_up_proj", "down_proj"}),
        ("*.[gu]*_proj", {"gate_up_proj"}),
        ("layers.?.attention.w*", {"qkv_proj", "o_proj"}),
        ("*.feed_forward.w2", {"down_proj"}),
        ("output", {"lm_head"}),
        ("*.qkv_proj", {"qkv_proj"}),
    ],
)
def test_layers_by_anyones_names(pattern, layers):
    made = plan(**{"linear:int8": {"layers": pattern}})
    assert {assignment.name.rpartition(".")[2] for assignment in made.assignments} == layers


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("*", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}),
        ("*.experts.*", {"gate_up_proj", "down_proj"}),
        ("model.layers.*.mlp.experts.down_proj", {"down_proj"}),
        ("model.layers.*.mlp.experts.*.down_proj", {"down_proj"}),
        ("*.block_sparse_moe.experts.*.w[13]", {"gate_up_proj"}),
    ],
)
def test_experts_by_anyones_names(pattern, layers):
    made = plan(EXPERTS, **{"linear:int8": {"layers": pattern}})
    assert {assignment.name.rpartition(".")[2] for assignment in made.assignments} == layers
    assert not any(assignment.name.endswith("router") for assignment in made.assignments)


def test_spellings_lead_with_ours():
    names = ["layers.3.feed_forward.down_proj", "layers.3.mlp.down_proj", "layers.3.feed_forward.w2"]
    assert spellings(names[0]) == [(name,) for name in (*names, *(f"model.{name}" for name in names))]
    assert spellings("anything.else") == [("anything.else",), ("model.anything.else",)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"linear:int8": {"layers": "*.mpl.*"}}, '"layers": "*.mpl.*" is no linear layer; the nearest is "*.mlp.*"'),
        ({"linear:int8": {"layers": "down_proj"}}, 'the nearest is "*.down_proj"'),
        ({"linear:int8": {"layers": "lmhead"}}, 'the nearest is "lm_head"'),
        ({"linear:int8": {"skip": "embed_tokens"}}, '"skip": "embed_tokens" is no linear layer'),
        ({"embedding": {"layers": "lm_head"}}, '"lm_head" is no embedding; the nearest is "embed_tokens"'),
        ({"linear:int8": {"layers": "q_proj"}}, 'q_proj, k_proj and v_proj are one here, "*.qkv_proj"'),
        ({"linear:int8": {"layers": "*v_proj"}}, "for a part of a matrix: q_proj, k_proj and v_proj are one here"),
        ({"linear:int8": {"layers": "*.mlp.up_proj"}}, 'gate_proj and up_proj are one here, "*.gate_up_proj"'),
        ({"linear:int8": {"layers": "*.w[q1]"}}, 'wq, wk and wv are one here, "*.qkv_proj"'),
        ({"linear:int8": {"layers": "x" * 5000}}, "is no linear layer"),
        (
            {"linear:int8": {"layers": "*.mlp.*"}, "linear:int4": {"layers": "layers.0.*"}},
            'and "linear:int4" are for the layer "layers.0.feed_forward.gate_up_proj"; narrow the "layers"',
        ),
        (
            {"linear:int8": {"skip": "lm_head"}, "linear:int4": {"skip": "layers.0.*"}},
            'are for the layer "layers.1.attention.qkv_proj"; give one of them "layers"',
        ),
        ({"linear:int8": [{"layers": "lm_head"}, {"layers": "output"}]}, '"linear:int8" is there twice'),
        ({"linear:int8": {"skip": "*"}}, "no linear layer is left for it; leave it out"),
        ({"linear:int8": {}, "linear:int4": {"layers": "*"}}, '"linear:int8": no linear layer is left for it: all it'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_is_one_line(values, says):
    assert says in refusal(**values)


def test_a_scheme_that_the_device_cannot_run_is_refused_before_anything_else():
    assert 'nearest that can is "linear:a8w8dq"' in refusal(device="mps", **{"linear:fp8dq": {"layers": "no such"}})


# ---- How it is stored ----


def test_bytes_are_those_of_the_format():
    made = plan(UNTIED, dtype="fp32", **{"linear:int4": {"layers": "lm_head"}})
    assert made.assignment("lm_head").nbytes == 4096 * (256 // 2 + 256 // 32 * 4)
    assert made.nbytes == made.original_nbytes - 4096 * 256 * 4 + 4096 * (128 + 32)
    assert made.assignment("embed_tokens") is None


def test_a_group_that_does_not_divide_is_said():
    made = plan(NARROW, **{"linear:int4": {}})
    assert made.assignment("lm_head").note == (
        "groupsize 32 does not divide its width 20: the last group of a row has 20 of 32; "
        "tied to embed_tokens, which stays as it is: a copy of its own"
    )
    assert made.assignment("layers.0.feed_forward.down_proj").note == (
        "groupsize 32 does not divide its width 40: the last group of a row has 8 of 32"
    )
    assert made.assignment("layers.0.feed_forward.down_proj").format.groups(40) == 2
    assert len(made.assignments) == 8 * 4 + 1
    said = made.remarks()
    assert len(said) == 3
    assert said[0].startswith("layers.0.attention.qkv_proj and 23 more: groupsize 32 does not divide its width 20:")
    assert said[2].startswith("lm_head: ")
    assert plan(**{"linear:a8w8dq": {}, "embedding": {}}).remarks() == []


def test_tied_and_stored_alike_is_one_copy():
    made = plan(**{"linear:a8w8dq": {}, "embedding": {}})
    head = made.assignment("lm_head")
    assert (head.shares, head.nbytes, head.note) == ("embed_tokens", 0, "one copy with embed_tokens")
    assert made.assignment("embed_tokens").nbytes == 4096 * (256 + 2)
    assert plan(UNTIED, **{"linear:a8w8dq": {}, "embedding": {}}).assignment("lm_head").shares is None


@pytest.mark.parametrize(
    "values",
    [
        {"linear:int4": {}, "embedding": {}},
        {"linear:int8": {"groupsize": 32}, "embedding": {}},
        {"linear:fp8": {}, "embedding": {}},
        {"linear:a8wxdq": {"bitwidth": 3}, "embedding": {"bitwidth": 4}},
    ],
    ids=str,
)
def test_tied_and_stored_otherwise_is_two(values):
    made = plan(**values)
    assert made.assignment("lm_head").shares is None
    assert made.assignment("lm_head").note == "tied to embed_tokens, which is stored otherwise: a copy of its own"


def test_in_a_line():
    assert plan(text="cpu-small").describe() == "embedding (1 layer), linear:int4 (32 layers), linear:int8 (1 layer)"


def test_biases_stay():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = Embedding(8, 4), Linear(4, 6)

    with torch.device("meta"):
        made = plan(Tiny(), **{"linear:int8": {}, "embedding": {}})
    assert made.left == (Left("out.bias", (6,), "a bias", 12),)
    assert made.assignment("out").shares is None
