"""An Explanation as a person and as a script see it: one screen of aligned lines, or one JSON document. Finds nothing
out itself.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from cli.builder import Prepared
from cli.console import human_bytes
from cli.explain import Explanation, Group, Layer, explain, not_fitting
from cli.ledger import rate

LEFT = 2
"""Blanks before a line of a part, and between its columns."""


def show_explanation(
    prepared: Prepared, max_seq_len: int, num_seqs: int = 1, *, compares: bool = False, as_json: bool
) -> int:
    """Print on stdout what `explain` finds; the exit code. Raises UserError."""
    found = explain(prepared, max_seq_len, num_seqs, compares=compares)
    print(json.dumps(document(found)) if as_json else "\n".join(lines(found)))
    return 0


# ---- For a person ----


def lines(found: Explanation) -> list[str]:
    """One screen: settings, layers, what is not quantized, memory, speed."""
    parts = {
        "settings": table(
            [
                (one.name.replace("_", "-"), f"{one.text} ({one.why})" if one.why else one.text, one.source)
                for one in found.settings
            ]
        ),
        "layers": _layers(found),
        "not quantized": table(
            [(f"x{len(left.names)}", left.reason, human_bytes(left.nbytes), few(left.patterns))
             for left in found.not_quantized],
            right=(0, 2),
        ),
        "quality": [" " * LEFT + line for line in (found.receipt.lines() if found.receipt is not None else ())],
        "memory": _memory(found),
        "speed": _speed(found),
    }  # fmt: skip
    shown = [[name, *part] for name, part in parts.items() if part]
    return [line for i, part in enumerate(shown) for line in ([""] if i else []) + part]


def _layers(found: Explanation) -> list[str]:
    rows = [
        (
            group.pattern,
            f"x{len(group.names)}" if len(group.names) > 1 else "",
            scheme(group.layer),
            str(list(group.layer.shape)),
            group.layer.computed_by,
            human_bytes(group.nbytes) if group.nbytes else "",
        )
        for group in found.groups
    ]
    if found.others:
        what = "norms and biases" if any(group.pattern.endswith(".bias") for group in found.others) else "norms"
        count, nbytes = sum(len(group.names) for group in found.others), sum(group.nbytes for group in found.others)
        rows.append((what, f"x{count}", found.others[0].layer.scheme, "", "PyTorch", human_bytes(nbytes)))
    written = table(rows, right=(1, 5))
    notes = [f"{' ' * 2 * LEFT}{group.layer.note}" if group.layer.note else "" for group in found.groups]
    result = []
    for line, note in zip(written, [*notes, ""], strict=False):
        result += [line, note] if note else [line]
    return result


def _memory(found: Explanation) -> list[str]:
    needs = found.needs
    several = f" for each of {needs.slots} sequences" if needs.slots > 1 else ""
    rows = [
        ("weights", human_bytes(needs.weights), f"{human_bytes(needs.weights_per_token)} are read for a token"),
        *([("cache", human_bytes(needs.cache), f"for {needs.max_seq_len:,} tokens{several}")] if needs.slots else []),
        ("peak", human_bytes(needs.peak), _parts_of_peak(found)),
        *([("compiler", human_bytes(needs.compiler), "on top, the first time")] if needs.compiler else []),
        ("free", human_bytes(needs.free), "it fits" if needs.fits else "it does not fit"),
    ]
    written = table(rows, right=(1,))
    if not needs.fits:
        written.append(" " * LEFT + not_fitting(needs, found.would_fit, found.device))
    return written


def _parts_of_peak(found: Explanation) -> str:
    needs = found.needs
    if needs.loading > needs.running:
        what = "while loading" if needs.slots else "for a weight at a time"
        parts = [(needs.loading - needs.mapped, what), (needs.mapped, "of mapped files")]
    else:
        what = "of weights, a full cache and one step" if needs.slots else "while the receipt is measured"
        parts = [(needs.running, what)]
    parts += [(needs.process, "of the program"), (needs.quantizer, "of the quantizer")]
    return ", ".join(f"{human_bytes(nbytes)} {what}" for nbytes, what in parts if nbytes)


def _speed(found: Explanation) -> list[str]:
    needs = found.needs
    first, full = found.most_tok_s(needs.cache_read_first), found.most_tok_s(needs.cache_read_full)
    if first is None or full is None or found.read_bytes_s is None:
        return []
    return [
        f"{' ' * LEFT}at most {rate(first)} at context 1, {rate(full)} at the full context: "
        f"memory is read at {human_bytes(found.read_bytes_s)}/s"
    ]


def scheme(layer: Layer) -> str:
    """ "linear:int4 g32", "embedding 8 bits", "bf16"."""
    arguments = dict(layer.arguments)
    words = [layer.scheme]
    if "bitwidth" in arguments:
        words.append(f"{arguments['bitwidth']} bit{'s' if arguments['bitwidth'] > 1 else ''}")
    if arguments.get("groupsize", 0) > 0:
        words.append(f"g{arguments['groupsize']}")
    if arguments.get("has_weight_zeros"):
        words.append("zeros")
    return " ".join(words)


def few(patterns: Sequence[str]) -> str:
    """At most three of them."""
    return ", ".join(patterns[:3]) + (", …" if len(patterns) > 3 else "")


def table(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned columns; those of `right` to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = " " * LEFT
    return [
        gap + gap.join(
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True)) if width
        ).rstrip()
        for row in rows
    ]  # fmt: skip


# ---- For a script ----


def document(found: Explanation) -> dict[str, Any]:
    """What --json prints; the keys named in docs/commands.md are a promise."""
    needs = found.needs
    return {
        "settings": {
            setting.name: {"value": setting.value, "why": setting.why or None, "source": setting.source}
            for setting in found.settings
        },
        "layers": [_group(group) for group in (*found.groups, *found.others)],
        "not_quantized": [
            {"reason": left.reason, "count": len(left.names), "names": list(left.names), "bytes": left.nbytes}
            for left in found.not_quantized
        ],
        "receipt": found.receipt.document() if found.receipt is not None else None,
        "memory": {
            "weight_bytes": needs.weights,
            "weight_bytes_per_token": needs.weights_per_token,
            "kv_cache_bytes": needs.cache if needs.slots else None,
            "peak_memory_bytes": needs.peak,
            "compiler_bytes": needs.compiler,
            "needed_bytes": needs.more,
            "free_bytes": needs.free,
            "fits": needs.fits,
            "would_fit": [{"flags": one.flags, "needed_bytes": one.more} for one in found.would_fit],
        },
        "speed": {
            "read_bytes_s": found.read_bytes_s,
            "decode_tok_s_first": found.most_tok_s(needs.cache_read_first),
            "decode_tok_s_full": found.most_tok_s(needs.cache_read_full),
        },
    }


def _group(group: Group) -> dict[str, Any]:
    layer = group.layer
    return {
        "pattern": group.pattern,
        "count": len(group.names),
        "scheme": layer.scheme,
        "arguments": dict(layer.arguments),
        "shape": list(layer.shape),
        "computed_by": layer.computed_by,
        "bytes": group.nbytes,
        "note": layer.note or None,
    }
