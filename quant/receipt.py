"""The quality receipt of a quantized model: what it lost, on which text, measured with what. Knows figures, not how
they are measured; imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from config.errors import UserError


@dataclass(frozen=True)
class Receipt:
    """A quantized model beside the same model unquantized, in the same dtype. A figure that is not a finite number, as
    of a model that computes none, is None.
    """

    text: str
    """What was read, in words or as the name of a file."""
    text_sha256: str
    tokens: int
    """How many were predicted."""
    perplexity: float | None
    perplexity_unquantized: float | None
    kl_divergence: float | None
    """KL(unquantized || quantized), in nats a token: the mean over the tokens."""
    top1_agreement: float | None
    """The share of tokens for which both find the same one likeliest."""
    dtype: str
    device: str
    versions: Mapping[str, str]
    """Of torch, torchao and torchchat."""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def read(cls, document: object, where: str) -> "Receipt":
        """The inverse of `document`. Raises UserError, which begins with `where`."""
        if not isinstance(document, dict) or set(document) != {field.name for field in fields(cls)}:
            raise UserError(f"{where} is not what torchchat writes there; quantize the model again")
        for key, value in document.items():
            if not _READS[key](value):
                raise UserError(f'{where} "{key}" is not what torchchat writes there; quantize the model again')
        return cls(**document)

    def lines(self) -> list[str]:
        """What a person sees."""
        change = ""
        if self.perplexity is not None and self.perplexity_unquantized:
            change = f" ({self.perplexity / self.perplexity_unquantized - 1:+.2%})"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"perplexity {_number(self.perplexity)}, unquantized {_number(self.perplexity_unquantized)}{change}",
            f"KL divergence {_number(self.kl_divergence)} nats a token, top-1 agreement "
            + ("not a number" if self.top1_agreement is None else f"{self.top1_agreement:.2%}"),
            f"on {self.tokens:,} tokens of {self.text} (sha256 {self.text_sha256[:12]}…), {self.dtype} on "
            f"{self.device}, {versions}",
        ]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_versions(value: object) -> bool:
    """Whether it is an object of names and versions."""
    return isinstance(value, dict) and all(_is_text(name) and _is_text(version) for name, version in value.items())


_READS = {
    **dict.fromkeys(("text", "text_sha256", "dtype", "device"), _is_text),
    **dict.fromkeys(("perplexity", "perplexity_unquantized", "kl_divergence", "top1_agreement"), _is_figure),
    "tokens": _is_count,
    "versions": is_versions,
}
