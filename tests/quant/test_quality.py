"""What quantizing costs the built-in model on text that it never saw, by scheme and by bits; and that compiled steps
say what eager ones say, whatever the layers are quantized by.
"""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cli.builder import Prepared, load_model, make_engine, prepare
from cli.quantize import HELD_OUT
from config.settings import BuildSettings, SamplingParams, Setting
from generate.score import Comparison, Resident, Windows, compare, perplexity
from model.default.corpus import TINY_SOURCES, load_corpus
from model.transformer import Transformer
from quant.recipe import READY_MADE, read_recipe
from quant.schemes import SCHEMES

TOKENS = 1024


def prepared(recipe: str | None, compiled: bool = False, prefill: bool = False) -> Prepared:
    text = None if recipe is None else read_recipe(recipe, "--quantize").text
    where, dtype = Setting("cpu", "--device"), Setting("fp32", "--dtype")
    return prepare(
        BuildSettings("default", where, dtype, compiled, prefill, quantize=text, quantize_source="--quantize")
    )


@cache
def original() -> tuple[Transformer, Windows]:
    """The unquantized model, and what both read: the beginning of the text that receipts are measured on."""
    known = prepared(None)
    texts = json.loads(HELD_OUT.read_text(encoding="utf-8"))["texts"]
    assert known.tokenizer is not None
    ids = [known.tokenizer.encode(text, bos=False) for text in texts]
    return load_model(known, 512), Windows.of(ids, 512, known.tokenizer.bos_id, TOKENS)


@cache
def measured(recipe: str) -> Comparison:
    reference, windows = original()
    model = load_model(prepared(recipe), 512)
    return compare(model, Resident(), reference, Resident(), windows, torch.device("cpu"), torch.float32)


def change(recipe: str) -> float:
    """Of the perplexity: 0.01 is 1% more."""
    found = measured(recipe)
    assert found.tokens == TOKENS
    assert 1 < perplexity(found.reference_loss) < 20  # the text is one that the model can read
    return perplexity(found.loss) / perplexity(found.reference_loss) - 1


def recipe_of(key: str, **arguments: object) -> str:
    return json.dumps({key: arguments})


NOISY = "linear:fp8dq"
"""Numbers and inputs of three bits after the first stray more than the bound from one story to the next."""
EIGHT_BITS = [
    *(recipe_of(key) for key, scheme in SCHEMES.items() if scheme.bits == (8,) and key != NOISY),
    recipe_of("linear:a8wxdq", bitwidth=8),
    recipe_of("linear:a8wxdq", bitwidth=8, groupsize=-1),
    recipe_of("embedding", bitwidth=8),
    recipe_of("embedding:wx", bitwidth=8),
    *(name for name in READY_MADE if name in ("cpu", "cuda", "mps")),
]
FOUR_BITS = [
    recipe_of("linear:int4", groupsize=32),
    recipe_of("linear:a8w4dq", groupsize=32),
    recipe_of("linear:a8wxdq", bitwidth=4, groupsize=32),
    recipe_of("linear:a8wxdq", bitwidth=4, groupsize=32, has_weight_zeros=True),
    recipe_of("linear:afpwx", bitwidth=4, groupsize=32),
    recipe_of("embedding", bitwidth=4, groupsize=32),
    recipe_of("embedding:wx", bitwidth=4, groupsize=32),
    "cpu-small",
]


@pytest.mark.parametrize("recipe", EIGHT_BITS)
def test_8_bits_cost_half_a_percent_at_most(recipe: str) -> None:
    assert abs(change(recipe)) < 0.005
    assert 0 < measured(recipe).divergence < 0.005
    assert measured(recipe).agreement > 0.95


def test_float8_inputs_cost_half_a_percent_at_most_on_more_text() -> None:
    known = prepared(None)
    stories = [text for source in TINY_SOURCES for text in load_corpus(seed=0).held_out[source][:20]]
    assert known.tokenizer is not None
    ids = [known.tokenizer.encode("".join(part for _, part in one.messages), bos=False) for one in stories]
    windows = Windows.of(ids, 512, known.tokenizer.bos_id, 8000)
    models = load_model(prepared(recipe_of(NOISY)), 512), Resident(), original()[0], Resident()
    found = compare(*models, windows, torch.device("cpu"), torch.float32)
    assert found.tokens > 6000
    assert abs(perplexity(found.loss) / perplexity(found.reference_loss) - 1) < 0.005
    assert 0 < found.divergence < 0.01


@pytest.mark.parametrize("recipe", FOUR_BITS)
def test_4_bits_in_groups_of_32_cost_4_percent_at_most(recipe: str) -> None:
    assert -0.01 < change(recipe) < 0.04
    assert measured(recipe).divergence < 0.06
    assert measured(recipe).agreement > 0.87


def test_every_scheme_is_measured() -> None:
    named = {
        key for recipe in [*EIGHT_BITS, *FOUR_BITS, recipe_of(NOISY)] if recipe[0] == "{" for key in json.loads(recipe)
    }
    assert named == set(SCHEMES)


@pytest.mark.parametrize("key", [key for key, scheme in SCHEMES.items() if len(scheme.bits) > 2])
def test_more_bits_stray_less(key: str) -> None:
    """From 2 bits on; what 1 bit says is as wrong as it can be in one scheme and another."""
    steps = [bits for bits in (2, 3, 4, 6, 8) if bits in SCHEMES[key].bits]
    divergences = [measured(recipe_of(key, bitwidth=bits, groupsize=32)).divergence for bits in steps]
    assert all(more < 0.8 * fewer for fewer, more in pairwise(divergences))


def test_smaller_groups_stray_less() -> None:
    sizes = [recipe_of("linear:int4", groupsize=size) for size in (32, 64, 128, 256)]
    assert [measured(size).divergence for size in sizes] == sorted(measured(size).divergence for size in sizes)


# ---- Compiled ----

ONE_OF_EACH = json.dumps(
    {
        "linear:int8": {"layers": ["layers.0.*", "lm_head"]},
        "linear:a8wxdq": {"layers": "layers.1.attention.*", "bitwidth": 3, "groupsize": -1, "has_weight_zeros": True},
        "linear:int4": {"layers": "layers.1.feed_forward.*"},
        "linear:a8w4dq": {"layers": "layers.2.*"},
        "linear:fp8": {"layers": "layers.3.*"},
        "linear:a8w8dq": {"layers": "layers.4.*"},
        "linear:afpwx": {"layers": "layers.5.attention.*", "bitwidth": 4},
        "linear:fp8dq": {"layers": ["layers.5.feed_forward.*", "layers.6.*"]},
        "embedding:wx": {"bitwidth": 6},
    }
)


@pytest.mark.slow  # compiles, tens of seconds each: one recipe has every scheme for linear layers, one the shared table
@pytest.mark.parametrize("recipe", [ONE_OF_EACH, "cpu"], ids=["one of each", "cpu"])
def test_compiled_says_what_eager_says(recipe: str, tmp_path: Path) -> None:
    if recipe == ONE_OF_EACH:
        assert {key for key in json.loads(recipe) if "linear" in key} == {key for key in SCHEMES if "linear" in key}
    # Prefill of the shared table alone would take as long again, and show what the other recipe shows.
    prefill = recipe == ONE_OF_EACH
    prompts = ["Once upon a time", "Lily", "The dog and the cat were friends. One day, they"]
    params = SamplingParams(temperature=0, max_new_tokens=40)

    def said(*, compiled: bool) -> list[list[int]]:
        known = prepared(recipe, compiled, compiled and prefill)
        engine = make_engine(known, load_model(known, 256), 256, tmp_path)
        tokenizer = known.tokenizer
        assert tokenizer is not None
        results = []
        for prompt in prompts:
            sequence = engine.add(tokenizer.encode(prompt, bos=True), params)
            while not sequence.finished:
                engine.step()
            results.append(list(sequence.token_ids))
        return results

    eager = said(compiled=False)
    assert all(len(ids) > 10 for ids in eager)
    assert said(compiled=True) == eager
