"""Sequences in, text and tokens out: `step()` is the heartbeat, everything else loops over it. Knows neither where a
model came from nor how its steps were compiled.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from config.errors import UserError
from config.settings import MAX_SEED, SamplingParams
from generate.sampling import SamplingPlan
from generate.scheduler import Decode, Prefill, Scheduler, batch_bucket, slots_needed
from generate.sequence import FinishReason, RequestOutput, Sequence
from generate.stats import Ledger
from generate.step import DecodeState, LanguageModel, decode, prefill
from model.kv_cache import KVCache

PrefillFn = Callable[
    [LanguageModel, KVCache, DecodeState, Tensor, Tensor, Tensor, Tensor, int, SamplingPlan],
    Tensor,
]
DecodeFn = Callable[[LanguageModel, KVCache, DecodeState, Tensor, SamplingPlan], Tensor]
PrepareFn = Callable[[KVCache, DecodeState, Tensor, SamplingPlan, int], None]


class TokenBytes(Protocol):
    """What the engine asks of a tokenizer."""

    def decode_bytes(self, ids: SequenceOf[int], *, start: bool = False) -> bytes: ...


@dataclass(frozen=True)
class _Issued:
    """A step that the device was given. `tokens` is on the host once `ready` has passed (None: it is there now)."""

    work: Prefill | Decode
    tokens: Tensor
    ready: torch.cuda.Event | None
    issued_at: float

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """The sequences that this step made a token for."""
        if isinstance(self.work, Decode):
            return self.work.sequences
        return (self.work.sequence,) if self.work.last else ()


class Engine:
    """Runs sequences on one model. Not thread-safe: one thread owns it.

    On CUDA a step is issued before the last one's tokens are read, so that the device never waits for the host; a
    sequence that turns out to have ended has then run one step too many, which is thrown away.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        tokenizer: TokenBytes | None,
        *,
        vocab_size: int,
        eos_ids: frozenset[int] = frozenset(),
        max_num_seqs: int = 1,
        prefill_chunk: int = 512,
        prefill_fn: PrefillFn = prefill,
        decode_fn: DecodeFn = decode,
        prepare_fn: PrepareFn | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """cache: of `slots_needed(max_num_seqs)` slots. Without a tokenizer there is no text, only tokens.

        prepare_fn: makes a step ready before it runs. Each batch size is then a step of its own to make ready, so that
        all decoding runs in the largest.
        """
        assert cache.num_slots == slots_needed(max_num_seqs)
        self.model = model
        self.cache = cache
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.prefill_fn = prefill_fn
        self.decode_fn = decode_fn
        self.ledger = Ledger() if ledger is None else ledger
        self.device = cache.keys[0].device
        self.prepare_fn = prepare_fn
        self._batch_size = batch_bucket(max_num_seqs)
        self.scheduler = Scheduler(max_num_seqs, prefill_chunk, 1 if prepare_fn is None else self._batch_size)
        scratch = max_num_seqs if cache.num_slots > max_num_seqs else None
        self.state = DecodeState.create(cache.num_slots, vocab_size, self.device, scratch)
        self._lookahead = 1 if self.device.type == "cuda" else 0
        self._in_flight: deque[_Issued] = deque()
        self._next_id = 0
        self._read_at = 0.0
        self._batch: tuple[tuple[Sequence, ...], Tensor, SamplingPlan] | None = None

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    @torch.inference_mode()
    def prepare(self, params: SamplingParams, prompt_tokens: int) -> None:
        """Make ready what requests like this one will run, so that nothing is compiled while they do."""
        if self.prepare_fn is None:
            return
        slots_B = torch.arange(self._batch_size, device=self.device).clamp(max=self.cache.num_slots - 1)
        self.prepare_fn(self.cache, self.state, slots_B, SamplingPlan.of([params], self.vocab_size), prompt_tokens)

    def add(self, prompt_ids: SequenceOf[int], params: SamplingParams, *, new_text: bool = False) -> Sequence:
        """Queue a prompt. Raises UserError for one that the context cannot hold or the model does not know.

        new_text: what is made begins a text (a reply in a chat, what follows BOS alone) and does not continue one.
        """
        check_prompt(prompt_ids, self.cache.max_seq_len, self.vocab_size)
        room = self.cache.max_seq_len - len(prompt_ids)
        wanted = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        arrived_at = time.perf_counter()
        sequence = Sequence(self._next_id, tuple(prompt_ids), params, wanted, arrived_at=arrived_at, at_start=new_text)
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def add_samples(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, num_samples: int, *, new_text: bool = False
    ) -> list[Sequence]:
        """Queue a prompt `num_samples` times; sample i has the seed `params.seed + i`, and is what that seed gives
        alone.
        """
        seeds = [(params.seed + i) % (MAX_SEED + 1) for i in range(num_samples)]
        return [self.add(prompt_ids, replace(params, seed=seed), new_text=new_text) for seed in seeds]

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Issue one step, and return what the oldest step in flight gave; at most one wait for the device."""
        work = self.scheduler.schedule()
        if work is not None:
            self._in_flight.append(self._issue(work))
        if len(self._in_flight) > (0 if work is None else self._lookahead):
            return self._collect(self._in_flight.popleft())
        return []

    def cancel(self, sequence: Sequence) -> RequestOutput | None:
        """End a sequence now; its last output, with the text that was still held back. None if it had ended already."""
        if sequence.finished:
            return None
        return RequestOutput(sequence.seq_id, self._finish(sequence, "abort"), (), "abort")

    def generate(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, num_samples: int = 1
    ) -> Iterator[RequestOutput]:
        """All outputs of a prompt's samples, as they come. Closing the iterator cancels what is left."""
        sequences = self.add_samples(prompt_ids, params, num_samples)
        ours = {sequence.seq_id for sequence in sequences}
        try:
            while not all(sequence.finished for sequence in sequences):
                yield from (output for output in self.step() if output.seq_id in ours)
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def _issue(self, work: Prefill | Decode) -> _Issued:
        issued_at = self._now()
        tokens = self._issue_prefill(work) if isinstance(work, Prefill) else self._issue_decode(work)
        if self.device.type != "cuda":
            return _Issued(work, tokens, None, issued_at)
        host = tokens.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return _Issued(work, host, ready, issued_at)

    def _issue_prefill(self, work: Prefill) -> Tensor:
        sequence = work.sequence
        slot = sequence.slot
        assert slot is not None
        if work.start == 0:
            self.state.params.write(slot, sequence.params)
            if sequence.params.repetition_penalty != 1:
                self.state.seen[slot] = False
                self.state.seen[slot, self._to_device(sequence.prompt_ids)] = True
        # A chunk before the last samples nothing that anybody wants: the greedy plan is cheapest and leaves no trace.
        plan = SamplingPlan.of([sequence.params], self.vocab_size) if work.last else SamplingPlan()
        return self.prefill_fn(
            self.model,
            self.cache,
            self.state,
            self._to_device(sequence.prompt_ids[work.start : work.end])[None],
            self._full(work.start),
            self._full(slot),
            self._full(work.end - work.start - 1),
            work.end,
            plan,
        )

    def _issue_decode(self, work: Decode) -> Tensor:
        if self._batch is None or self._batch[0] != work.sequences:
            plan = SamplingPlan.of([sequence.params for sequence in work.sequences], self.vocab_size)
            self._batch = (work.sequences, self._to_device(work.slots), plan)
        _, slots_B, plan = self._batch
        return self.decode_fn(self.model, self.cache, self.state, slots_B, plan)

    def _collect(self, issued: _Issued) -> list[RequestOutput]:
        """Read a step's tokens, waiting for them, and hand them to the sequences that still want them."""
        live = [sequence for sequence in issued.rows if not sequence.finished]
        if issued.rows and not live:
            return []
        tokens: list[int] = []
        if issued.rows:
            if issued.ready is not None:
                issued.ready.synchronize()
            tokens = issued.tokens.tolist()
        # A step's time runs from the last step's end, or from its own issue when the device was idle before.
        now = self._now()
        seconds, self._read_at = now - max(issued.issued_at, self._read_at), now
        if isinstance(issued.work, Prefill):
            self.ledger.prefill(issued.work.end - issued.work.start, seconds)
        else:
            self.ledger.decode(len(live), seconds)
        # The rows of a padded batch come first, its padding after them.
        pairs = zip(issued.rows, tokens, strict=False)
        return [self._advance(sequence, token) for sequence, token in pairs if not sequence.finished]

    def _advance(self, sequence: Sequence, token: int) -> RequestOutput:
        """Append a token to its sequence, and end it where it ends."""
        if not sequence.token_ids:
            self.ledger.first_token(time.perf_counter() - sequence.arrived_at)
        sequence.token_ids.append(token)
        ended = token in self.eos_ids and not sequence.params.ignore_eos
        text = ""
        if self.tokenizer is not None and not ended:
            text = sequence.detokenizer.push(self._bytes(self.tokenizer, sequence, token))
        reason: FinishReason | None = None
        if ended or sequence.detokenizer.stopped:
            reason = "stop"
        elif len(sequence.token_ids) == sequence.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self._finish(sequence, reason)
        return RequestOutput(sequence.seq_id, text, (token,), reason)

    def _bytes(self, tokenizer: TokenBytes, sequence: Sequence, token: int) -> bytes:
        data = tokenizer.decode_bytes((token,))
        if sequence.at_start and data:  # the first that shows: without the space that stands before a first word
            data, sequence.at_start = tokenizer.decode_bytes((token,), start=True), False
        return data

    def _now(self) -> float:
        """A clock that stands still while something is compiled, which so counts in no rate."""
        return time.perf_counter() - self.ledger.phase_s["compile"]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> str:
        """Take a sequence out; the text that it still held back."""
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason
        self._batch = None
        return sequence.detokenizer.finish()

    def _to_device(self, values: SequenceOf[int]) -> Tensor:
        """int64, without waiting for the device."""
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _full(self, value: int) -> Tensor:
        return torch.full((1,), value, dtype=torch.int64, device=self.device)


def check_prompt(prompt_ids: SequenceOf[int], max_seq_len: int, vocab_size: int) -> None:
    """Raises UserError for a prompt that a context of `max_seq_len` tokens, or a model, has no place for."""
    if not prompt_ids:
        raise UserError("the prompt has no tokens: at least one is needed to begin with")
    if len(prompt_ids) >= max_seq_len:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and the context holds {max_seq_len}, "
            "of which the answer needs at least one: shorten the prompt"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise UserError(
            f"the prompt has a token that is not among the model's {vocab_size}: the tokenizer is not this model's"
        )
