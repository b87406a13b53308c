"""One request as the engine sees it: a Sequence of tokens with its status, and the RequestOutput of each step. Uses no
torch.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from config.settings import SamplingParams
from generate.detokenizer import Detokenizer
from generate.guide import Guide

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end-of-sequence token or a stop string. length: `max_new_tokens` or the context's end. abort: cancelled."""


class SequenceStatus(Enum):
    WAITING = "waiting"  # for a slot
    PREFILLING = "prefilling"  # has a slot; its prompt is not wholly read yet
    RUNNING = "running"  # a token a decode step
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it.

    `num_prefilled` and `num_issued` count what the device was told to do, which may run ahead of `token_ids`, what was
    read back. `max_new_tokens` is the request's, cut to what the context holds.
    """

    seq_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int | None = None
    num_prefilled: int = 0
    num_reused: int = 0
    """Tokens of the prompt that the cache held already."""
    num_issued: int = 0
    token_ids: list[int] = field(default_factory=list)
    """Every generated token, the end-of-sequence token included."""
    finish_reason: FinishReason | None = None
    arrived_at: float = 0.0
    """When it was asked for, in seconds of `time.perf_counter`."""
    at_start: bool = False
    """What it makes begins a text, and nothing of that shows yet."""
    guide: Guide | None = None
    """What its tokens must keep to."""
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.params.stop)

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, by the model alone: before temperature, filters, penalties and what a guide allows.

    top: the likeliest tokens and their log-probabilities, likeliest first; as many as `SamplingParams.top_logprobs`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """What one step gave one sequence. `text` is the text that can be shown now: it may be empty while a character or a
    possible stop string is incomplete. The last output of a sequence, and only that, has a `finish_reason`. logprobs:
    one for each token, where they were asked for.
    """

    seq_id: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
