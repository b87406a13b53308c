"""Patterns of module names, as a recipe's "layers" and "skip" have them. Knows names, not modules.

A pattern is a glob (`*`, `?`, `[abc]`) over the whole name, as torchchat, Hugging Face or Meta call the layer. Some of
their layers are one matrix here (q, k and v; gate and up), which has one scheme.
"""

import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from config.errors import UserError
from config.settings import shorten

OTHER_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention.qkv_proj": (
        ("self_attn.qkv_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("attention.wq", "attention.wk", "attention.wv"),
    ),
    "attention.o_proj": (("self_attn.o_proj",), ("attention.wo",)),
    "feed_forward.gate_up_proj": (
        ("mlp.gate_up_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    "feed_forward.down_proj": (("mlp.down_proj",), ("feed_forward.w2",)),
    "feed_forward.experts.gate_up_proj": (
        ("mlp.experts.gate_up_proj",),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
    ),
    "feed_forward.experts.down_proj": (
        ("mlp.experts.down_proj",),
        ("mlp.experts.*.down_proj",),
        ("block_sparse_moe.experts.*.w2",),
    ),
    "embed_tokens": (("tok_embeddings",),),
    "lm_head": (("output",),),
}
"""Our name within a block -> what others call it, or the layers that it is made of."""


def spellings(name: str) -> list[tuple[str, ...]]:
    """Every way to write a module's name; a tuple of several is the layers elsewhere that it is made of."""
    block, leaf = "", name
    if found := re.fullmatch(r"(layers\.\d+\.)(.+)", name):
        block, leaf = found[1], found[2]
    ways = [(name,), *(tuple(block + part for part in parts) for parts in OTHER_NAMES.get(leaf, ()))]
    return [*ways, *(tuple(f"model.{part}" for part in parts) for parts in ways)]


def _parts_matched(pattern: str, name: str) -> tuple[bool, tuple[str, ...]]:
    """Whether the pattern is for that module; and the parts of it that it is for, if it is not for all of one way of
    writing it.
    """
    whole = False
    some: tuple[str, ...] = ()
    for parts in spellings(name):
        matched = tuple(part for part in parts if fnmatchcase(part, pattern))
        whole = whole or len(matched) == len(parts)
        if 0 < len(matched) < len(parts):
            some = matched
    return whole, some


def select(patterns: Iterable[str], names: Sequence[str], where: str, what: str) -> set[str]:
    """Those of `names` that a pattern is for. Raises UserError, beginning with `where`, for a pattern that is for none,
    or for a part of a matrix; `what` is what the names are of, such as "linear layer".
    """
    selected: set[str] = set()
    for pattern in patterns:
        mine: set[str] = set()
        for name in names:
            whole, parts = _parts_matched(pattern, name)
            if parts:
                raise UserError(f"{where}: {_quoted(pattern)} is for a part of a matrix: {_part_of(parts[0], name)}")
            if whole:
                mine.add(name)
        if not mine:
            raise UserError(f"{where}: {_quoted(pattern)} is no {what}{_nearest(pattern, names)}")
        selected |= mine
    return selected


def _part_of(part: str, name: str) -> str:
    together = next(parts for parts in spellings(name) if part in parts)
    leaves = [one.rpartition(".")[2] for one in together]
    ours = f"*.{name.rpartition('.')[2]}"
    return f'{", ".join(leaves[:-1])} and {leaves[-1]} are one here, "{ours}"'


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """What comes nearest to a pattern that is for none of `names`, in words."""
    anywhere = f"*.{pattern.removeprefix('*').removeprefix('.')}"
    for name in names:
        whole, parts = _parts_matched(anywhere, name)
        if parts:
            return f": {_part_of(parts[0], name)}"
        if whole:
            return f'; the nearest is "{anywhere}"'
    candidates: dict[str, None] = {}  # in order, each once
    for name in names:
        for parts in spellings(name):
            if len(parts) == 1 and not parts[0].startswith("model."):
                place, _, leaf = parts[0].rpartition(".")
                inner = place.rpartition(".")[2]
                candidates |= dict.fromkeys(
                    [f"*.{leaf}", f"*.{inner}.{leaf}", f"*.{inner}.*", name] if place else [name]
                )
    near = get_close_matches(pattern, candidates, n=1, cutoff=0.0)
    return f"; the nearest is {_quoted(near[0])}" if near else "; the model has none"


def _quoted(pattern: str) -> str:
    return shorten(json.dumps(pattern))
