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
from generate.adjust import Adjustments, is_adjusted, logprobs, token_logprobs
from generate.guide import Guide
from generate.likelihood import Continuation, Likelihood, Read, Reader
from generate.sampling import SamplingPlan
from generate.scheduler import Decode, Prefill, Scheduler, batch_bucket, slots_needed
from generate.sequence import FinishReason, RequestOutput, Sequence, TokenLogprobs
from generate.stats import Ledger
from generate.step import DecodeState, LanguageModel, choose, decode, prefill, read
from model.kv_cache import KVCache

PrefillFn = Callable[[LanguageModel, KVCache, Tensor, Tensor, Tensor, Tensor, int], Tensor]
DecodeFn = Callable[[LanguageModel, KVCache, DecodeState, Tensor, SamplingPlan | None], Tensor]
PrepareFn = Callable[[KVCache, DecodeState, Tensor, SamplingPlan | None], None]


class TokenBytes(Protocol):
    """What the engine asks of a tokenizer."""

    def decode_bytes(self, ids: SequenceOf[int], *, start: bool = False) -> bytes: ...


@dataclass(frozen=True)
class _Issued:
    """A step that the device was given. `tokens` and `logprobs` (of `adjust.logprobs`), where it makes any, are on the
    host once `ready` has passed (None: they are there now).
    """

    work: Prefill | Decode
    tokens: Tensor | None
    logprobs: Tensor | None
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
        read_fn: Read = read,
        reads_any_cache: bool = True,
        prepare_fn: PrepareFn | None = None,
        every_batch: bool = True,
        ledger: Ledger | None = None,
    ) -> None:
        """cache: of `slots_needed(max_num_seqs)` slots or more. Without a tokenizer there is no text, only tokens.

        reads_any_cache: `read_fn` takes a cache of another shape too. prepare_fn: makes a step ready before it runs.
        every_batch: each batch size is a step of its own to make ready; without it all decoding runs in the largest.
        """
        assert cache.num_slots >= slots_needed(max_num_seqs)
        self.model = model
        self.cache = cache
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.prefill_fn = prefill_fn
        self.decode_fn = decode_fn
        self.read_fn, self.reads_any_cache = read_fn, reads_any_cache
        self.ledger = Ledger() if ledger is None else ledger
        self.device = cache.keys[0].device
        self.prepare_fn = prepare_fn
        largest = batch_bucket(max_num_seqs)
        self._batch_sizes = [1 << i for i in range(largest.bit_length())] if every_batch else [largest]
        self.scheduler = Scheduler(max_num_seqs, prefill_chunk, self._batch_sizes[0])
        self.adjustments = Adjustments(cache.num_slots, vocab_size, self.device, eos_ids)
        self._ready: set[SamplingPlan] = set()
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
    def prepare(self, params: SamplingParams, *, any_request: bool = False) -> None:
        """Make ready what requests like this one will run, so that nothing is compiled while they do. any_request: and
        what all others will run.
        """
        if self.prepare_fn is None:
            return
        plan = SamplingPlan.of([params], self.vocab_size)
        plans = {plan, SamplingPlan()} if any_request else {plan}
        for size in self._batch_sizes:
            slots_B = torch.arange(size, device=self.device).clamp(max=self.cache.num_slots - 1)
            for one in (*plans, None) if any_request else plans:
                self.prepare_fn(self.cache, self.state, slots_B, one)
        self._ready |= plans

    def add(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        new_text: bool = False,
        guide: Guide | None = None,
    ) -> Sequence:
        """Queue a prompt. Raises UserError for one that the context cannot hold or the model does not know.

        new_text: what is made begins a text (a reply in a chat, what follows BOS alone) and does not continue one.
        guide: what is made keeps to it; it follows this sequence alone.
        """
        check_prompt(prompt_ids, self.cache.max_seq_len, self.vocab_size)
        room = self.cache.max_seq_len - len(prompt_ids)
        wanted = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        arrived_at = time.perf_counter()
        sequence = Sequence(
            self._next_id, tuple(prompt_ids), params, wanted, arrived_at=arrived_at, at_start=new_text, guide=guide
        )
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
        outputs: list[RequestOutput] = []
        if any(sequence.guide is not None for sequence in self.scheduler.running):
            while self._in_flight:  # a guide must have seen the last token to say what may follow it
                outputs += self._collect(self._in_flight.popleft())
        work = self.scheduler.schedule()
        if work is not None:
            self._in_flight.append(self._issue(work))
        if len(self._in_flight) > (0 if work is None else self._lookahead):
            outputs += self._collect(self._in_flight.popleft())
        return outputs

    @torch.inference_mode()
    def score(
        self, requests: SequenceOf[Continuation], on_done: Callable[[int], None] = lambda count: None
    ) -> list[Likelihood]:
        """How likely each continuation is after its context; `on_done` is told how many more are done. Nothing else may
        be running. Raises UserError for a continuation that the context cannot hold.
        """
        assert not self.has_unfinished
        self.forget()  # every slot is overwritten
        reader = Reader(
            self.model,
            self.cache,
            self.read_fn,
            num_slots=self.scheduler.num_slots,
            most_tokens=self.scheduler.prefill_chunk,
            vocab_size=self.vocab_size,
            any_shape=self.reads_any_cache,
        )
        began = self._now()
        found, tokens = reader.score(requests, on_done)
        self.ledger.prefill(tokens, self._now() - began)
        return found

    def forget(self) -> None:
        """Read the next prompts as if none had been read before: for measurements."""
        self.scheduler.forget()

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
        tokens, likely = self._issue_prefill(work) if isinstance(work, Prefill) else self._issue_decode(work)
        if tokens is None or self.device.type != "cuda":
            return _Issued(work, tokens, likely, None, issued_at)
        tokens = tokens.to("cpu", non_blocking=True)
        likely = None if likely is None else likely.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return _Issued(work, tokens, likely, ready, issued_at)

    def _issue_prefill(self, work: Prefill) -> tuple[Tensor | None, Tensor | None]:
        sequence = work.sequence
        slot = sequence.slot
        assert slot is not None
        if work.copy_from is not None:
            self.cache.copy(work.copy_from, slot, work.start)
        if work.first:
            self.state.params.write(slot, sequence.params)
            self.adjustments.begin(sequence)
            if sequence.params.repetition_penalty != 1:
                self.state.seen[slot] = False
                self.state.seen[slot, self._to_device(sequence.prompt_ids)] = True
        slots_1 = self._full(slot)
        logits_1V = self.prefill_fn(
            self.model,
            self.cache,
            self._to_device(sequence.prompt_ids[work.start : work.end])[None],
            self._full(work.start),
            slots_1,
            self._full(work.end - work.start - 1),
            work.end,
        )
        if not work.last:
            return None, None
        plan = SamplingPlan.of([sequence.params], self.vocab_size)
        return self._choose(logits_1V, (sequence,), slots_1, self._full(work.end), plan)

    def _issue_decode(self, work: Decode) -> tuple[Tensor, Tensor | None]:
        if self._batch is None or self._batch[0] != work.sequences:
            plan = SamplingPlan.of([sequence.params for sequence in work.sequences], self.vocab_size)
            self._batch = (work.sequences, self._to_device(work.slots), plan)
        sequences, slots_B, plan = self._batch
        plain = not any(is_adjusted(s.params, s.guide) or s.params.top_logprobs is not None for s in sequences)
        if plain and (self.prepare_fn is None or plan in self._ready):
            return self.decode_fn(self.model, self.cache, self.state, slots_B, plan), None
        logits_BV = self.decode_fn(self.model, self.cache, self.state, slots_B, None)
        return self._choose(logits_BV, sequences, slots_B, self.state.next_positions(slots_B), plan)

    def _choose(
        self,
        logits_BV: Tensor,
        sequences: tuple[Sequence, ...],
        slots_B: Tensor,
        positions_B: Tensor,
        plan: SamplingPlan,
    ) -> tuple[Tensor, Tensor | None]:
        """Sample as the sequences of the first rows ask. The tokens; how likely they were, if any asks for that."""
        adjusted = any(is_adjusted(sequence.params, sequence.guide) for sequence in sequences)
        logits = self.adjustments.apply(logits_BV, sequences) if adjusted else logits_BV
        tokens_B = choose(self.state, logits, slots_B, positions_B, plan)
        if adjusted:
            self.adjustments.note(sequences, tokens_B)
        wanted = [s.params.top_logprobs for s in sequences if s.params.top_logprobs is not None]
        if not wanted:
            return tokens_B, None
        count = len(sequences)
        return tokens_B, logprobs(logits_BV[:count], tokens_B[:count], max(wanted))

    def _collect(self, issued: _Issued) -> list[RequestOutput]:
        """Read a step's tokens, waiting for them, and hand them to the sequences that still want them."""
        live = [sequence for sequence in issued.rows if not sequence.finished]
        if issued.rows and not live:
            return []
        tokens: list[int] = []
        likely: list[list[float]] = []
        if issued.tokens is not None:
            if issued.ready is not None:
                issued.ready.synchronize()
            tokens = issued.tokens.tolist()
            likely = [] if issued.logprobs is None else issued.logprobs.tolist()
        # A step's time runs from the last step's end, or from its own issue when the device was idle before.
        now = self._now()
        seconds, self._read_at = now - max(issued.issued_at, self._read_at), now
        if isinstance(issued.work, Prefill):
            self.ledger.prefill(issued.work.end - issued.work.start, seconds)
        else:
            self.ledger.decode(len(live), seconds)
        # The rows of a padded batch come first, its padding after them.
        return [
            self._advance(sequence, tokens[row], likely[row] if likely else None)
            for row, sequence in enumerate(issued.rows)
            if not sequence.finished
        ]

    def _advance(self, sequence: Sequence, token: int, likely: list[float] | None) -> RequestOutput:
        """Append a token to its sequence, and end it where it ends."""
        if not sequence.token_ids:
            self.ledger.first_token(time.perf_counter() - sequence.arrived_at)
        sequence.token_ids.append(token)
        params = sequence.params
        if sequence.guide is not None:
            sequence.guide.advance(token)
        ended = (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids
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
        found: tuple[TokenLogprobs, ...] = ()
        if likely is not None and params.top_logprobs is not None:
            found = (token_logprobs(likely, token, params.top_logprobs),)
        return RequestOutput(sequence.seq_id, text, (token,), reason, found)

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
