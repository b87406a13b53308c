"""How a function of ours becomes an operator that the compilers know by name and do not look into."""

from collections.abc import Callable
from typing import Any

import torch

# The plain registry: `torch.library.custom_op` would import all of torch.compile at the first call, most of a second.
_library = torch.library.Library("torchchat", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_op(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    key: str = "CompositeExplicitAutograd",
    mutates: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """`torch.ops.torchchat.NAME`: `function` on the devices of the dispatch key, `fake` where only shapes are wanted.

    The function changes no argument but `mutates`, and its annotations are its schema.
    """
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, function, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"torchchat::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.torchchat, name)
    return op
