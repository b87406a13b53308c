"""Settings refuse, in one line, every value that would be silently ignored or would fail later."""

import math

import pytest

from config.errors import UserError
from config.settings import BuildSettings, SamplingParams, Setting, shorten


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x" * 5000,)),
        ("stop", tuple("x" * 65)),
        ("stop", (7,)),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("min_new_tokens", -1),
        ("top_logprobs", 21),
        ("top_logprobs", True),
        ("logit_bias", ((5, 101.0),)),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
        ("stop_token_ids", tuple(range(65))),
    ],
)
def test_sampling_refuses_by_name_on_one_line(field, bad):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: bad})
    assert str(error.value).startswith(field)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0},
        {"top_k": 0},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"min_p": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"max_new_tokens": 1},
        {"max_new_tokens": None},
        {"repetition_penalty": 0.5},
        {"stop": ("\n", "END")},
    ],
)
def test_the_ends_of_each_range_are_inside(good):
    params = SamplingParams(**good)
    assert {name: getattr(params, name) for name in good} == good


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"device": Setting("tpu", "--device")}, "fast, cpu, cuda, mps"),
        ({"dtype": Setting("float32", "--dtype")}, "fast, fast16, bf16, fp16, fp32"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
    ],
)
def test_build_settings_say_what_is_allowed(bad, named):
    with pytest.raises(UserError, match=named):
        BuildSettings(model="default", **bad)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]}, SamplingParams(temperature=0.6)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
        ({"top_k": None, "max_new_tokens": 7}, SamplingParams(max_new_tokens=7)),
    ],
)
def test_a_model_recommends_its_sampling(entries, expected):
    assert SamplingParams.from_generation_config(entries, "generation_config.json") == expected


def test_a_wrong_recommendation_names_its_file():
    with pytest.raises(UserError, match=r"^m/generation_config\.json: top_p must be"):
        SamplingParams.from_generation_config({"top_p": 7}, "m/generation_config.json")


def test_shorten_keeps_one_line():
    assert shorten("a\nb") == "a b"
    assert len(shorten("x" * 500)) == 80
