"""What a person asked for, frozen and checked: how to build the model, how to sample. Knows no flags and no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from config.errors import UserError

DEVICES = ("fast", "cpu", "cuda", "mps")
DTYPES = ("fast", "fast16", "bf16", "fp16", "fp32")

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096
MAX_PENALTY = 2.0
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Setting:
    """A value and who set it: a flag ("--dtype"), 'quantize "precision"', "TORCHCHAT_DTYPE" or "default"."""

    value: str
    source: str = "default"


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides which engine is built."""

    model: str
    device: Setting = Setting("fast")
    dtype: Setting = Setting("fast")
    compile: bool = False
    compile_prefill: bool = False
    quantize: str | None = None
    """The quantization recipe as JSON text, checked, with every default written out; None: nothing is quantized."""
    quantize_source: str | None = None
    """Where the recipe came from, which is how errors about it begin: "--quantize cpu"."""
    max_seq_len: int | None = None
    """Positions in the KV cache (prompt and answer together); None for what the model and the memory allow."""
    max_num_seqs: int = 1
    random_weights: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Who set `model`, `compile`, `compile_prefill`, `quantize` and `max_seq_len`, as a `Setting` has it; what is
    missing has its default."""

    def source(self, name: str) -> str:
        """Who set a setting: "--dtype", "TORCHCHAT_MODEL", "default"."""
        if name in ("device", "dtype"):
            return {"device": self.device, "dtype": self.dtype}[name].source
        return self.sources.get(name, Setting.source)

    def __post_init__(self) -> None:
        one_of("device", self.device.value, DEVICES)
        one_of("dtype", self.dtype.value, DTYPES)
        if self.max_seq_len is not None:
            check_int("max_seq_len", self.max_seq_len, 1, MAX_COUNT)
        check_int("max_num_seqs", self.max_num_seqs, 1, 4096)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. Raises UserError when a value is out of its range, so that every caller may pass on
    what a person or a request asked for.
    """

    max_new_tokens: int | None = None
    """None: until the model ends its text or the context is full."""
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the most likely tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen (CTRL, arXiv:1909.05858); 1 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence; the text shown ends before them."""
    seed: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was generated already; negative favours it."""
    frequency_penalty: float = 0.0
    """The same, times how often it was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids."""
    min_new_tokens: int = 0
    """The end of the text cannot be sampled before."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence as the model's own end does, and are no part of its text."""
    top_logprobs: int | None = None
    """Report the log-probability of each token and of so many likeliest ones; None reports none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, 1, MAX_COUNT)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        check_int("top_k", self.top_k, 0, MAX_COUNT)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        check_int("seed", self.seed, 0, MAX_SEED)
        _check_float("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_float("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        check_int("min_new_tokens", self.min_new_tokens, 0, MAX_COUNT)
        if self.top_logprobs is not None:
            check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.logit_bias) > MAX_BIASES:
            raise UserError(f"logit_bias takes at most {MAX_BIASES} tokens, not {len(self.logit_bias)}")
        for token, bias in self.logit_bias:
            check_int("a token of logit_bias", token, 0, MAX_COUNT)
            _check_float(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        if len(self.stop_token_ids) > MAX_STOPS:
            raise UserError(f"stop_token_ids takes at most {MAX_STOPS} tokens, not {len(self.stop_token_ids)}")
        for token in self.stop_token_ids:
            check_int("a token of stop_token_ids", token, 0, MAX_COUNT)
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop takes at most {MAX_STOPS} texts, not {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise UserError(f"stop takes texts of 1 to {MAX_STOP_LENGTH} characters, not {shorten(repr(text))}")

    @classmethod
    def from_generation_config(cls, entries: Mapping[str, object], source: str) -> "SamplingParams":
        """What a model's generation_config.json recommends, over our defaults; `source` names it in errors.

        `do_sample: false` means temperature 0. Only the settings that we have are read: the rest of that file speaks
        of Transformers' other ways to search, and of token ids that the tokenizer knows.
        """
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found: dict[str, Any] = {name: entries[name] for name in names if entries.get(name) is not None}
        if entries.get("do_sample") is False:
            found["temperature"] = 0.0
        try:
            return cls(**found)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {shorten(repr(value))}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}, not {shorten(repr(value))}")


def _check_float(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)  # nan is within no bounds
    if not number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        span = f"over {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise UserError(f"{name} must be a number {span}, not {shorten(repr(value))}")


def shorten(text: str, limit: int = 80) -> str:
    """`text` on one line of at most `limit` characters; an ellipsis says that some were left off."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
