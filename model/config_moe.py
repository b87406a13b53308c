"""What a config.json says of a mixture of experts: how many there are, how many a token goes through, in which layers.
Reads and checks those keys alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from model.config_fields import Fields
from model.config_types import LayerConfig

COUNTS = ("num_local_experts", "num_experts")
"""Two spellings of one number; Transformers writes some families with the one that its older versions did not."""


def read_experts(fields: Fields, layers: Sequence[LayerConfig], *, normalizes: bool | None) -> dict[str, Any]:
    """The fields of ModelConfig that a mixture has, and its layers marked. normalizes: whether the weights of the
    chosen experts are made to sum to one; None: the file says so.
    """
    written = [key for key in COUNTS if fields.data.get(key) is not None]
    if len(written) == 2 and fields.data[written[0]] != fields.data[written[1]]:
        raise fields.error(written[0], f"differs from {written[1]}, which is the same: leave one")
    fields.used |= set(COUNTS)
    count = fields.integer(written[0] if written else next(key for key in COUNTS if key in fields.defaults))
    chosen = fields.integer("num_experts_per_tok")
    if chosen > count:
        raise fields.error("num_experts_per_tok", f"is {chosen}, more than the {count} experts that there are")
    return {
        "layers": layers,
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": fields.integer("intermediate_size"),
        "norm_topk_prob": fields.flag("norm_topk_prob") if normalizes is None else normalizes,
    }


def everywhere(layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """All layers with experts (Mixtral, OLMoE)."""
    return tuple(replace(layer, experts=True) for layer in layers)


def where_sparse(fields: Fields, layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """Every `decoder_sparse_step`-th layer, but those of `mlp_only_layers` (Qwen)."""
    step = fields.integer("decoder_sparse_step")
    dense = fields.sequence("mlp_only_layers") or []
    for number in dense:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise fields.error("mlp_only_layers", f"has {number!r}, not the number of a layer")
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(len(layers))]
    if not any(sparse):
        raise fields.error("mlp_only_layers" if dense else "decoder_sparse_step", "leaves no layer with experts")
    return tuple(replace(layer, experts=has) for layer, has in zip(layers, sparse, strict=True))
