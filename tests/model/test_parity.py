"""Transformers is the judge: on the same random weights, our logits are its logits, for every family and feature.

The laws: float32 logits within 1e-4; the same greedy tokens; a prompt read whole, in pieces or token by token alike,
past the sliding window; a batch equals its members one by one; both spellings of config.json are one model; bf16 is as
near to float32 as Transformers' bf16 is. And so that each can fail: every feature, taken away, changes the logits.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from model.config import ModelConfig, RopeConfig, load_config
from model.kv_cache import KVCache
from model.loader import load_weights
from model.transformer import Transformer
from tests.model.tiny import CASES, VOCAB, Case

TOLERANCE = 1e-4
every_case = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Pair:
    """One tiny model twice: Transformers' and ours, from the same directory."""

    case: Case
    directory: Path
    theirs: nn.Module
    ours: Transformer

    @property
    def device(self) -> torch.device:
        return self.ours.embed_tokens.weight.device

    def cache(self, slots: int = 1) -> KVCache:
        weight = self.ours.embed_tokens.weight
        return KVCache.create(self.ours.config, slots, self.case.max_seq_len, weight.device, weight.dtype)

    def tokens(self, length: int, seed: int = 0) -> Tensor:
        """Random ids [1, length]."""
        ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
        return ids.to(self.device)

    def reference(self, tokens: Tensor) -> Tensor:
        """Transformers' logits of a whole text, float32 [1, T, V]."""
        with torch.inference_mode():
            logits: Tensor = self.theirs(tokens, use_cache=False).logits
        return logits.float()

    def read(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        """Our logits of a text that is read in pieces of these sizes; float32 [1, T, V]."""
        return read(self.ours, self.cache(), tokens, sizes)


def read(model: Transformer, cache: KVCache, tokens: Tensor, sizes: list[int]) -> Tensor:
    assert sum(sizes) == tokens.shape[1]
    start, logits = 0, []
    slots = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    with torch.inference_mode():
        for size in sizes:
            piece = tokens[:, start : start + size]
            logits.append(model(piece, torch.full_like(slots, start), cache, slots, start + size))
            start += size
    return torch.cat(logits, dim=1)


def load(directory: Path, device: str, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(load_config(directory))
    load_weights(model, directory, torch.device(device), dtype)
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of that name in float32 on the CPU, made once."""

    @cache
    def make(name: str) -> Pair:
        directory = tmp_path_factory.mktemp(name)
        theirs = CASES[name].save(directory)
        return Pair(CASES[name], directory, theirs, load(directory, "cpu", torch.float32))

    return make


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@every_case
def test_the_logits_are_those_of_transformers(name: str, pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    tokens = it.tokens(it.case.prompt)
    expected = it.reference(tokens)
    assert 0.5 < expected.std() < 20, "weights too narrow or too wide to judge by"
    assert worst(it.read(tokens, [it.case.prompt]), expected) < TOLERANCE


@every_case
@pytest.mark.parametrize("sizes", [[9, 8, 7], [1, 16, 1, 6], [1] * 24], ids=["pieces", "uneven", "token by token"])
def test_a_prompt_in_pieces_is_the_prompt_whole(name: str, sizes: list[int], pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    tokens = it.tokens(it.case.prompt, seed=1)
    assert worst(it.read(tokens, _fitted(sizes, it.case.prompt)), it.reference(tokens)) < TOLERANCE


def _fitted(sizes: list[int], total: int) -> list[int]:
    """The sizes, cut off at `total`."""
    fitted: list[int] = []
    for size in sizes:
        fitted.append(min(size, total - sum(fitted)))
    return [size for size in fitted if size]


@every_case
def test_the_greedy_tokens_are_those_of_transformers(name: str, pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    tokens, new = it.tokens(it.case.prompt, seed=2), 12
    expected = tokens
    for _ in range(new):
        expected = torch.cat((expected, it.reference(expected)[:, -1:].argmax(-1)), dim=1)
    cache, slots, length = it.cache(), torch.zeros(1, dtype=torch.int64), it.case.prompt
    with torch.inference_mode():
        at = torch.tensor([length - 1])
        logits = it.ours(tokens, torch.zeros(1, dtype=torch.int64), cache, slots, length, at)
        made = []
        for position in range(length, length + new):
            made.append(logits.argmax(-1))
            logits = it.ours(made[-1][:, None], torch.tensor([position]), cache, slots, position + 1, torch.tensor([0]))
    assert torch.stack(made, dim=1).tolist() == expected[:, length:].tolist()


@every_case
def test_a_batch_is_its_members_one_by_one(name: str, pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    check_batch(it, TOLERANCE)


def check_batch(it: Pair, tolerance: float) -> None:
    """Rows of different lengths, padded on the right, in slots out of order that others have used before; then two more
    tokens of each at once, then one and one.
    """
    lengths, slots, pieces = [13, 5, it.case.prompt - 4], torch.tensor([2, 0, 3], device=it.device), [2, 1, 1]
    texts = [it.tokens(length + sum(pieces), seed=length) for length in lengths]
    cache = it.cache(slots=4)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(std=10)
    ends, T = torch.tensor(lengths, device=it.device), max(lengths)
    padded = [nn.functional.pad(text[:, :n], (0, T - n), value=5) for text, n in zip(texts, lengths, strict=True)]
    with torch.inference_mode():
        got = [it.ours(torch.cat(padded), torch.zeros_like(ends), cache, slots, T, ends - 1)[:, None]]
        read_so_far = 0
        for size in pieces:
            starts = [n + read_so_far for n in lengths]
            chunk = torch.cat([text[:, at : at + size] for text, at in zip(texts, starts, strict=True)])
            got.append(it.ours(chunk, torch.tensor(starts, device=it.device), cache, slots, max(starts) + size))
            read_so_far += size
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        alone = it.read(text, [n, *pieces])[:, n - 1 :]
        assert worst(torch.cat(got, dim=1)[row : row + 1], alone) < tolerance


@every_case
def test_both_spellings_of_the_file_are_one_model(name: str, pair: Callable[[str], Pair], tmp_path: Path) -> None:
    it = pair(name)
    new = json.loads((it.directory / "config.json").read_text())
    old = json.loads(json.dumps(new))
    _spell_as_before(old.get("text_config", old))
    assert old != new
    for file in it.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_config(tmp_path) == it.ours.config
    # And Transformers agrees that the old spelling is the same model.
    theirs = type(it.theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()  # type: ignore[attr-defined]
    tokens = it.tokens(it.case.prompt)
    with torch.inference_mode():
        assert worst(theirs(tokens, use_cache=False).logits, it.reference(tokens)) < TOLERANCE


def _spell_as_before(config: dict[str, Any]) -> None:
    """`rope_parameters` -> `rope_theta`, `rope_scaling` and what else older versions wrote beside them."""
    parameters = config.pop("rope_parameters")
    if "sliding_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    config["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    # Gemma 3 came with the newer of the two names; the other families are read with the older one.
    key = "rope_type" if config["model_type"] == "gemma3_text" else "type"
    config["rope_scaling"] = None if kind == "default" else {key: kind, **parameters}


# What a feature is where it is absent. Fields that are not here are shapes or token ids.
ABSENT: dict[str, Any] = {
    "norm_plus_one": False,
    "post_norms": False,
    "qk_norm": False,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "qkv_bias": False,
    "o_bias": False,
    "mlp_bias": False,
    "attention_scale": None,
    "attention_softcap": None,
    "logits_softcap": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_divisor": 1.0,
}
# The parameters that each kind of rotary embedding computes with (short or long: which of them depends on the case).
USED_BY: dict[str, tuple[str, ...]] = {
    "default": ("theta", "partial_rotary_factor"),
    "linear": ("theta", "factor"),
    "llama3": ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("theta", "factor", "attention_factor", "partial_rotary_factor"),
}  # fmt: skip


def without_each_feature(config: ModelConfig, max_seq_len: int) -> Iterator[tuple[str, ModelConfig]]:
    """(what is changed, the configuration with it changed), for all that is special about this one."""
    for name, absent in ABSENT.items():
        if getattr(config, name) != absent:
            yield name, replace(config, **{name: absent})
    if any(layer.attention == "sliding" for layer in config.layers):
        yield "windows", replace(config, layers=tuple(replace(layer, attention="full") for layer in config.layers))
        yield "window size", replace(config, sliding_window=(config.sliding_window or 0) + 1)
    if config.num_experts:
        yield "experts of a token", replace(config, num_experts_per_tok=config.num_experts_per_tok + 1)
    if len(set(config.layers)) > 1 and len({layer.experts for layer in config.layers}) == 1:
        yield "order of layers", replace(config, layers=config.layers[1:] + config.layers[:1])
    for rope in {layer.rope for layer in config.layers}:
        if rope is None:
            filled = tuple(replace(layer, rope=layer.rope or RopeConfig()) for layer in config.layers)
            yield "layers without positions", replace(config, layers=filled)
            continue
        for name, other in _perturbed(rope, max_seq_len):
            layers = tuple(replace(layer, rope=other) if layer.rope == rope else layer for layer in config.layers)
            yield f"rope {name}", replace(config, layers=layers)


def _perturbed(rope: RopeConfig, max_seq_len: int) -> Iterator[tuple[str, RopeConfig]]:
    for name in USED_BY[rope.kind]:
        value = getattr(rope, name)
        if name == "factor" and rope.attention_factor is not None and rope.kind == "longrope":
            continue  # only serves to compute what is given here
        if name in ("mscale", "mscale_all_dim", "attention_factor") and value is None:
            continue
        if name == "truncate":
            yield name, replace(rope, truncate=not value)
        elif name in ("beta_fast", "beta_slow"):  # rounded to whole dimensions: only a large change shows
            yield name, replace(rope, **{name: value / 8 if name == "beta_fast" else value * 8})
        elif name == "partial_rotary_factor":
            if rope.kind == "default":
                yield name, replace(rope, partial_rotary_factor=value / 2)
        else:
            yield name, replace(rope, **{name: type(value)(value * 1.5)})
    if rope.kind == "longrope":
        used = "long_factor" if max_seq_len > rope.original_max_position_embeddings else "short_factor"
        yield used, replace(rope, **{used: tuple(2 * value for value in getattr(rope, used))})


@every_case
def test_each_feature_shows_in_the_logits(name: str, pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    tokens = it.tokens(it.case.prompt)
    logits = it.read(tokens, [it.case.prompt])
    hidden = []
    for feature, config in without_each_feature(it.ours.config, it.case.max_seq_len):
        with torch.device("meta"):
            other = Transformer(config)
        # What the model has and this one lacks (a norm, a bias) is the feature that is taken away.
        missing, _ = other.load_state_dict(it.ours.state_dict(), strict=False, assign=True)
        assert not missing
        cache = KVCache.create(config, 1, it.case.max_seq_len, "cpu", torch.float32)
        if worst(read(other, cache, tokens, [it.case.prompt]), logits) < 100 * TOLERANCE:
            hidden.append(feature)
    assert not hidden, f"the weights do not show: {hidden}"


def test_every_field_of_a_configuration_is_judged() -> None:
    """A new field is added to ABSENT (and so to the test above), or named here as a shape."""
    shapes = {
        "family", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "layers", "rms_norm_eps", "tie_word_embeddings", "sliding_window",
        "bos_token_id", "eos_token_ids", "stored_layers", "stored_extra_embeddings", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "qk_norm_whole",
    }  # fmt: skip
    assert {field.name for field in fields(ModelConfig)} == shapes | set(ABSENT)


def half_of(it: Pair, device: str, dtype: torch.dtype) -> tuple[Pair, Tensor, Tensor, Tensor]:
    """The pair in a 16-bit type on a device; tokens; float32 logits of Transformers there; its 16-bit error."""
    theirs = type(it.theirs).from_pretrained(it.directory, attn_implementation="eager", dtype=torch.float32)  # type: ignore[attr-defined]
    theirs = theirs.eval().to(device)
    half = Pair(it.case, it.directory, theirs, load(it.directory, device, dtype))
    tokens = half.tokens(it.case.prompt)
    exact = half.reference(tokens)
    theirs.to(dtype)
    return half, tokens, exact, (half.reference(tokens) - exact).abs()


def check_half(it: Pair, device: str, dtype: torch.dtype) -> None:
    """Our error in 16 bits is of the size of Transformers', however the text is read."""
    half, tokens, exact, their_error = half_of(it, device, dtype)
    for sizes in ([it.case.prompt], _fitted([9, 8, 7], it.case.prompt), [1] * it.case.prompt):
        error = (half.read(tokens, sizes) - exact).abs()
        assert error.mean() < 1.5 * their_error.mean()
        assert error.max() < 3 * their_error.max()


@every_case
def test_bf16_errs_no_more_than_transformers(name: str, pair: Callable[[str], Pair]) -> None:
    check_half(pair(name), "cpu", torch.bfloat16)


@pytest.mark.gpu
@every_case
def test_on_cuda_bf16_errs_no_more_than_transformers(name: str, pair: Callable[[str], Pair]) -> None:
    check_half(pair(name), "cuda", torch.bfloat16)


@pytest.mark.gpu
@every_case
def test_on_cuda_the_laws_hold_in_float32(name: str, pair: Callable[[str], Pair]) -> None:
    it = pair(name)
    theirs = type(it.theirs).from_pretrained(it.directory, attn_implementation="eager").eval().to("cuda")  # type: ignore[attr-defined]
    there = Pair(it.case, it.directory, theirs, load(it.directory, "cuda", torch.float32))
    tokens = there.tokens(it.case.prompt)
    expected = there.reference(tokens)
    for sizes in ([it.case.prompt], _fitted([9, 8, 7], it.case.prompt), [1] * it.case.prompt):
        assert worst(there.read(tokens, sizes), expected) < 2 * TOLERANCE
    check_batch(there, 2 * TOLERANCE)
