"""The rotary embeddings of a Hugging Face config.json, in both of its spellings: `rope_parameters` (Transformers 5)
and `rope_theta` with `rope_scaling` (before). Knows no other part of the file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches

from model.config_fields import Fields, shown
from model.config_types import RopeConfig

# The keys that each kind takes, besides rope_theta, partial_rotary_factor and the kind itself.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
# Says how a YaRN model was trained; nothing is computed from it.
_HARMLESS = frozenset({"finetuned"})
_OWN_KEYS = frozenset({"rope_theta", "partial_rotary_factor", "rope_type", "type"})


def read_rope(fields: Fields, head_dim: int, max_positions: int, *, phi: bool) -> RopeConfig:
    """The one rotary embedding of a family whose layers share it.

    `phi`: the spellings of Phi-3, whose "su" and "yarn" both mean longrope and which may rotate a part of each head.
    """
    section = _scaling_section(fields)
    theta = _agreed_number(fields, section, "rope_theta")
    return _rope(fields, section, theta, head_dim, max_positions, phi=phi)


def read_rope_by_attention(fields: Fields, head_dim: int, max_positions: int) -> Mapping[str, RopeConfig]:
    """Gemma 3: one for the full layers, one for the sliding ones. The old `rope_scaling` is of the full layers."""
    nested = fields.section("rope_parameters")
    scaling = fields.section("rope_scaling")
    thetas = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    if nested is not None:
        if scaling is not None:
            raise fields.error("rope_scaling", "and rope_parameters are both there: leave one")
        for key in nested.data:
            if key not in thetas:
                allowed = ", ".join(thetas)
                raise nested.error(key, f"is not known: this family has one object for each of {allowed} there")
    ropes = {}
    for kind, key in thetas.items():
        section = nested.section(kind) if nested is not None else scaling if kind == "full_attention" else None
        theta = _agreed_number(fields, section, "rope_theta", outer_key=key)
        ropes[kind] = _rope(fields, section, theta, head_dim, max_positions, phi=False)
    return ropes


def _scaling_section(fields: Fields) -> Fields | None:
    """Whichever of the two spellings is there; both only where they say the same."""
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new is not None and old is not None and dict(new.data) != dict(old.data):
        raise fields.error("rope_parameters", "and rope_scaling are both there and differ: leave one")
    return new if new is not None else old


def _agreed_number(fields: Fields, section: Fields | None, key: str, outer_key: str | None = None) -> float:
    """`key` of the section, or of the file's top level under `outer_key`, or its default; never two that differ."""
    outer_key = outer_key or key
    outer = fields.number(outer_key, above=0.0)
    inner = section.optional_number(key, above=0.0) if section is not None else None
    if section is not None and inner is not None and fields.data.get(outer_key) is not None and inner != outer:
        raise section.error(key, f"is {inner:g}, but {outer_key} is {outer:g}: leave one")
    return outer if inner is None else inner


def _rope(
    fields: Fields, section: Fields | None, theta: float, head_dim: int, max_positions: int, *, phi: bool
) -> RopeConfig:
    section = section or Fields({}, fields.where)
    fields.used.add("original_max_position_embeddings")  # says nothing where nothing is stretched
    kind = _kind(section, _KEYS, phi=phi)
    section.used |= _OWN_KEYS | set(_KEYS[kind])
    section.refuse_unread(_HARMLESS, f"the rope type {kind!r}")
    partial = _agreed_number(fields, section, "partial_rotary_factor")
    rotary_dim = int(head_dim * partial)
    if partial > 1 or (partial != 1 and not phi):
        raise section.error("partial_rotary_factor", f"is {partial:g}; this family can only be run with 1")
    if rotary_dim < 2 or rotary_dim % 2:
        raise section.error("partial_rotary_factor", f"leaves {rotary_dim} rotary dimensions of {head_dim}: not even")
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    if kind == "linear":
        stretch = section.number("factor", above=0.0)
        return RopeConfig(theta=theta, kind="linear", factor=stretch, partial_rotary_factor=partial)

    original = _original_positions(fields, section, max_positions)
    if kind == "llama3" or section.get("factor") is not None:
        factor = section.number("factor", above=0.0)
    else:
        factor = max_positions / original
    common = RopeConfig(
        theta=theta, factor=factor, original_max_position_embeddings=original, partial_rotary_factor=partial
    )
    return _FINISH[kind](section, common, rotary_dim)


def _kind(section: Fields, known: Collection[str], *, phi: bool) -> str:
    """`rope_type`, or `type` as older files spell it."""
    names = {section.get(key) for key in ("rope_type", "type") if isinstance(section.get(key), str)}
    for key in ("rope_type", "type"):
        value = section.get(key)
        if value is not None and not isinstance(value, str):
            raise section.error(key, f"is {shown(value)}, not a name")
    if len(names) > 1:
        raise section.error("rope_type", f"is {shown(section.get('rope_type'))}, but type is another: leave one")
    name = str(names.pop()) if names else "default"
    if phi and name in ("su", "yarn"):
        name = "longrope"
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        key = "rope_type" if section.get("rope_type") is not None else "type"
        raise section.error(key, f"{name!r} cannot be run here{hint}; it can be one of {', '.join(known)}")
    return name


def _original_positions(fields: Fields, section: Fields, max_positions: int) -> int:
    """The context before it was stretched: in the section, or beside it (Phi-3), or all of it."""
    inner = section.optional_integer("original_max_position_embeddings", minimum=2)
    outer = fields.optional_integer("original_max_position_embeddings", minimum=2)
    if inner is not None and outer is not None and inner != outer:
        raise section.error(
            "original_max_position_embeddings", f"is {inner}, but the one outside is {outer}: leave one"
        )
    return inner or outer or max_positions


def _llama3(section: Fields, common: RopeConfig, rotary_dim: int) -> RopeConfig:
    low = section.number("low_freq_factor", above=0.0)
    high = section.number("high_freq_factor", above=0.0)
    if high <= low:
        raise section.error("high_freq_factor", f"is {high:g}, not above low_freq_factor ({low:g})")
    return replace(common, kind="llama3", low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Fields, common: RopeConfig, rotary_dim: int) -> RopeConfig:
    if common.theta <= 1:
        raise section.error("rope_theta", f"is {common.theta:g}; yarn needs more than 1")
    truncate = section.get("truncate")
    return replace(
        common,
        kind="yarn",
        attention_factor=section.optional_number("attention_factor", above=0.0),
        # Zero counts as absent, as in Transformers.
        beta_fast=section.optional_number("beta_fast", above=-1.0) or 32.0,
        beta_slow=section.optional_number("beta_slow", above=-1.0) or 1.0,
        mscale=section.optional_number("mscale", above=-1.0),
        mscale_all_dim=section.optional_number("mscale_all_dim", above=-1.0),
        truncate=True if truncate is None else section.flag("truncate"),
    )


def _longrope(section: Fields, common: RopeConfig, rotary_dim: int) -> RopeConfig:
    return replace(
        common,
        kind="longrope",
        attention_factor=section.optional_number("attention_factor", above=0.0),
        short_factor=section.positive_numbers("short_factor", rotary_dim // 2),
        long_factor=section.positive_numbers("long_factor", rotary_dim // 2),
    )


_FINISH: dict[str, Callable[[Fields, RopeConfig, int], RopeConfig]] = {
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
