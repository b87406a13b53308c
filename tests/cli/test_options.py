"""Flags, recipe and environment become settings by one rule, and nothing that was asked for is silently ignored."""

import json
import math

import pytest

from cli.options import (
    Parser,
    add_model_arguments,
    add_sampling_arguments,
    build_settings,
    normalise_flags,
    sampling_params,
    whole_number,
)
from config.errors import UserError
from config.settings import BuildSettings, SamplingParams, Setting


def parse(*argv):
    parser = Parser(prog="torchchat try")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser.parse(argv)


def settings(*argv, **environ):
    """The settings and the lines that were said."""
    said = []
    return build_settings(parse(*argv), environ, said.append), said


def recipe(**entries):
    return json.dumps(entries)


def test_without_anything_it_is_the_default_model_fast_eager_and_unquantized():
    assert settings() == (BuildSettings("default", Setting("fast"), Setting("fast")), [])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--compile_prefill"], ["--compile-prefill"]),
        (["--max_new_tokens=3"], ["--max-new-tokens=3"]),
        (["--stop=a_b", "--stop", "c_d"], ["--stop=a_b", "--stop", "c_d"]),
        (["my_model", "-x_y"], ["my_model", "-x_y"]),
        (["--top_k", "1", "--", "--not_a_flag"], ["--top-k", "1", "--", "--not_a_flag"]),
    ],
)
def test_both_spellings_of_flags_and_values_as_they_are(argv, expected):
    assert normalise_flags(argv) == expected


DTYPE_RECIPE = recipe(precision={"dtype": "fp16"})


@pytest.mark.parametrize(
    ("argv", "environ", "expected", "said"),
    [
        ([], {}, Setting("fast", "default"), []),
        ([], {"TORCHCHAT_DTYPE": "bf16"}, Setting("bf16", "TORCHCHAT_DTYPE"), []),
        ([], {"TORCHCHAT_DTYPE": ""}, Setting("fast", "default"), []),
        (["--quantize", DTYPE_RECIPE], {}, Setting("fp16", 'quantize "precision"'), []),
        (["--dtype", "fp32"], {}, Setting("fp32", "--dtype"), []),
        (
            ["--quantize", DTYPE_RECIPE],
            {"TORCHCHAT_DTYPE": "bf16"},
            Setting("fp16", 'quantize "precision"'),
            ['quantize "precision" fp16 overrides TORCHCHAT_DTYPE bf16'],
        ),
        (
            ["--dtype", "fp32", "--quantize", DTYPE_RECIPE],
            {"TORCHCHAT_DTYPE": "bf16"},
            Setting("fp32", "--dtype"),
            ['--dtype fp32 overrides quantize "precision" fp16', "--dtype fp32 overrides TORCHCHAT_DTYPE bf16"],
        ),
        (["--dtype", "bf16"], {"TORCHCHAT_DTYPE": "bf16"}, Setting("bf16", "--dtype"), []),
        (
            ["--dtype=fast"],
            {"TORCHCHAT_DTYPE": "bf16"},
            Setting("fast", "--dtype"),
            ["--dtype fast overrides TORCHCHAT_DTYPE bf16"],
        ),
    ],
)
def test_precedence_of_the_dtype(argv, environ, expected, said):
    built, lines = settings(*argv, **environ)
    assert (built.dtype, lines) == (expected, said)


def test_precedence_of_the_device():
    accelerator = recipe(executor={"accelerator": "cuda"})
    assert settings("--quantize", accelerator)[0].device == Setting("cuda", 'quantize "executor"')
    built, said = settings("--quantize", accelerator, "--device", "cpu", TORCHCHAT_DEVICE="mps")
    assert built.device == Setting("cpu", "--device")
    assert len(said) == 2


@pytest.mark.parametrize(
    ("argv", "environ", "expected", "says"),
    [
        ([], {}, False, 0),
        (["--compile"], {}, True, 0),
        ([], {"TORCHCHAT_COMPILE": "1"}, True, 0),
        ([], {"TORCHCHAT_COMPILE": "off"}, False, 0),
        (["--no-compile"], {"TORCHCHAT_COMPILE": "true"}, False, 1),
        (["--compile"], {"TORCHCHAT_COMPILE": "0"}, True, 1),
        (["--compile"], {"TORCHCHAT_COMPILE": "1"}, True, 0),
    ],
)
def test_precedence_of_a_switch(argv, environ, expected, says):
    built, said = settings(*argv, **environ)
    assert (built.compile, len(said)) == (expected, says)


def test_prefill_alone_may_be_compiled():
    built, said = settings("--compile-prefill")
    assert (built.compile, built.compile_prefill, said) == (False, True, [])


def test_the_model_and_the_length_follow_the_rule_too():
    built, said = settings("mine", "--max-seq-len", "64", TORCHCHAT_MODEL="theirs", TORCHCHAT_MAX_SEQ_LEN="32")
    assert (built.model, built.max_seq_len) == ("mine", 64)
    assert said == [
        "MODEL mine overrides TORCHCHAT_MODEL theirs",
        "--max-seq-len 64 overrides TORCHCHAT_MAX_SEQ_LEN 32",
    ]
    assert settings(TORCHCHAT_MODEL="theirs", TORCHCHAT_MAX_SEQ_LEN="32")[0] == BuildSettings("theirs", max_seq_len=32)


def test_a_variable_with_a_typing_mistake_is_told():
    assert settings(TORCHCHAT_DYTPE="bf16")[1] == [
        "the variable TORCHCHAT_DYTPE is unknown and changes nothing; did you mean 'TORCHCHAT_DTYPE'?"
    ]


@pytest.mark.parametrize(
    ("argv", "environ", "names"),
    [
        (["--dtype", "float32"], {}, "--dtype must be one of fast, fast16, bf16, fp16, fp32"),
        (["--device", "gpu"], {}, "--device must be one of fast, cpu, cuda, mps"),
        ([], {"TORCHCHAT_DTYPE": "int8"}, "TORCHCHAT_DTYPE must be one of"),
        (["--dtype", "bf16"], {"TORCHCHAT_DTYPE": "int8"}, "TORCHCHAT_DTYPE must be one of"),
        ([], {"TORCHCHAT_COMPILE": "perhaps"}, "TORCHCHAT_COMPILE must be one of"),
        ([], {"TORCHCHAT_MAX_SEQ_LEN": "0"}, "TORCHCHAT_MAX_SEQ_LEN must be a whole number"),
        (["--max-seq-len", "-4"], {}, "--max-seq-len: must be a whole number"),
        ([], {"TORCHCHAT_QUANTIZE": '{"a": 1}'}, 'TORCHCHAT_QUANTIZE: unknown key "a"'),
        ([], {"TORCHCHAT_QUANTIZE": "cpus"}, "TORCHCHAT_QUANTIZE cpus: No such file"),
        (["--quantize", ""], {}, "--quantize is empty; give cpu, "),
    ],
)
def test_wrong_values_are_refused_by_who_gave_them(argv, environ, names):
    with pytest.raises(UserError, match=names.replace("(", r"\(")):
        settings(*argv, **environ)


def test_a_recipe_becomes_settings():
    built, said = settings("--quantize", recipe(**{"linear:int4": {}, "executor": "cpu"}))
    expected = {"executor": {"accelerator": "cpu"}, "linear:int4": {"groupsize": 32}}
    assert json.loads(built.quantize) == expected
    assert (built.quantize_source, built.device, said) == ("--quantize", Setting("cpu", 'quantize "executor"'), [])


def test_a_recipe_has_precedence_too():
    built, said = settings("--quantize", "cpu", TORCHCHAT_QUANTIZE="cpu-small")
    assert built.quantize == settings("--quantize", '{"linear:int8": {}, "embedding": {}}')[0].quantize
    assert built.quantize_source == "--quantize cpu"
    assert said == ["--quantize cpu overrides TORCHCHAT_QUANTIZE cpu-small"]
    assert settings(TORCHCHAT_QUANTIZE="cpu")[0].quantize_source == "TORCHCHAT_QUANTIZE cpu"


def test_a_recipe_without_schemes_quantizes_nothing():
    built, said = settings("--quantize", DTYPE_RECIPE)
    assert (built.quantize, built.quantize_source, said) == (None, None, [])
    assert settings("--quantize", "{}") == (
        BuildSettings("default"),
        ["--quantize: the recipe is empty: nothing is quantized"],
    )


OURS = SamplingParams()


def sampled(*argv, defaults=OURS):
    said = []
    return sampling_params(parse(*argv), defaults, said.append), said


def test_a_flag_overrides_what_the_model_recommends_and_nothing_else():
    model = SamplingParams(temperature=0.6, top_p=0.9, stop=("END",))
    params, said = sampled("--temperature", "1.5", "--seed", "0", defaults=model)
    assert params == SamplingParams(temperature=1.5, top_p=0.9, stop=("END",), seed=0)
    assert said == []
    assert sampled("--stop", "a", "--stop", "b", defaults=model)[0].stop == ("a", "b")


def test_without_a_seed_each_run_has_its_own():
    assert len({sampled()[0].seed for _ in range(4)}) > 1


def test_what_has_no_effect_is_told():
    assert sampled("--temperature", "0", "--top-k", "5", "--seed", "1")[1] == [
        "--top-k, --seed without effect: temperature 0 takes the likeliest token each time"
    ]
    assert sampled("--temperature", "0", "--repetition-penalty", "1.2")[1] == []


@pytest.mark.parametrize(
    "argv",
    [
        ["--temperature", "-1"],
        ["--temperature=nan"],
        ["--temperature=-inf"],
        ["--top-p", "0"],
        ["--top-k", "-3"],
        ["--min-p", "2"],
        ["--repetition-penalty", "0"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
        ["--stop", ""],
        ["--max-seq-len", "10", "--max-new-tokens", "10"],
    ],
)
def test_values_out_of_range_are_refused(argv):
    with pytest.raises(UserError):
        sampled(*argv)


def test_whole_numbers_for_other_flags():
    parser = Parser(prog="torchchat try")
    parser.add_argument("--num-samples", type=whole_number(1, 9))
    assert parser.parse(["--num_samples", "9"]).num_samples == 9
    for bad in ("0", "10", "1.5", "many", str(math.inf)):
        with pytest.raises(UserError, match="--num-samples: must be a whole number from 1 to 9, not"):
            parser.parse(["--num-samples", bad])
