"""The one thread that runs the engine: jobs in by an inbox, what they gave out by a queue each. Knows sequences and
their failures; neither HTTP nor what an answer looks like.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from config.errors import UserError
from config.settings import SamplingParams
from generate.engine import Engine
from generate.guide import Guide
from generate.sequence import RequestOutput, Sequence
from server.errors import RequestError, unavailable
from server.metrics import Metrics

MAX_FAILURES = 8
"""So many steps that fail one after the other are no request's fault."""


class Cancelled(Exception):
    """Nobody waits for the job's outputs any more."""


@dataclass(frozen=True)
class Ask:
    """One sequence that a job wants."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    new_text: bool = False
    guide: Guide | None = None


@dataclass(frozen=True)
class Piece:
    """What a step gave one of a job's sequences. reused: tokens of its prompt that were not read again."""

    index: int
    output: RequestOutput
    reused: int


class Job:
    """The sequences of one request. Made and read by its own thread, fed by the worker's."""

    def __init__(self, asks: list[Ask]) -> None:
        self.asks = asks
        self.cancelled = False
        self.sequences: list[Sequence] = []
        """The worker's."""
        self._events: SimpleQueue[Piece | RequestError | None] = SimpleQueue()
        self._unfinished = len(asks)

    @property
    def is_over(self) -> bool:
        """Whether all that there is was read."""
        return not self._unfinished

    @property
    def has_more(self) -> bool:
        """Whether something can be read without waiting."""
        return not self._events.empty()

    def put(self, event: Piece | RequestError | None) -> None:
        """None: it was cancelled."""
        self._events.put(event)

    def pieces(self) -> Iterator[Piece]:
        """All there is, as it comes. Raises RequestError when it fails and Cancelled when it was."""
        while self._unfinished:
            event = self._events.get()
            if event is None:
                raise Cancelled
            if isinstance(event, RequestError):
                self._unfinished = 0
                raise event
            if event.output.finish_reason is not None:
                self._unfinished -= 1
            yield event


class Worker:
    """Runs jobs on an engine, in the thread that calls `run`. Everything else may be called from any thread, at any
    time, and does not wait for a step.

    That thread should be the one that built the model: OpenMP has threads for each thread that computes, and lets all
    of them sleep at once where they are more than processors, which made a step take three times as long on 2 cores.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self._metrics = engine, metrics
        self.on_death: Callable[[], None] = lambda: None
        """Is called when the engine can run nothing any more."""
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._stopping = False
        self._dead = ""
        self._places: dict[int, tuple[Job, int]] = {}
        self._last_token: dict[int, float] = {}
        self._failures = 0

    def run(self) -> None:
        """Until `stop`, or until the engine is dead."""
        try:
            while self._turn():
                pass
        except Exception:  # whatever it is, nobody may wait for an engine that does not run
            traceback.print_exc(file=sys.stderr)
            self._die("the engine failed")
        else:
            self._fail_all(unavailable("the server ends"))

    def stop(self) -> None:
        """End `run` after the step that it is in; what runs is broken off."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def submit(self, job: Job) -> None:
        """Raises RequestError when nothing is taken any more."""
        with self._changed:
            if self._dead or self._stopping:
                raise unavailable("the server takes no requests any more")
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: free what it has. Whoever reads its pieces is told."""
        with self._changed:
            if job.cancelled:
                return
            job.cancelled = True
            self._inbox.append(job)
            self._changed.notify()
        job.put(None)

    def death(self) -> str:
        """Why the engine runs nothing any more; "" while it does."""
        return self._dead

    @property
    def waiting(self) -> int:
        return len(self.engine.scheduler.waiting)

    @property
    def running(self) -> int:
        scheduler = self.engine.scheduler
        return len(scheduler.prefilling) + len(scheduler.running)

    # ---- In its thread ----

    def _turn(self) -> bool:
        """Take what came in, and do a step. False: it is over."""
        with self._changed:
            while not (self._inbox or self._stopping or self.engine.has_unfinished):
                self._changed.wait()
            if self._stopping:
                return False
            jobs, self._inbox = self._inbox, []
        for job in jobs:
            if job.cancelled:
                self._drop(job)
            else:
                self._add(job)
        if self.engine.has_unfinished:
            for output in self._step():
                self._route(output)
        return not self._dead

    def _add(self, job: Job) -> None:
        try:
            for index, ask in enumerate(job.asks):
                sequence = self.engine.add(ask.prompt_ids, ask.params, new_text=ask.new_text, guide=ask.guide)
                job.sequences.append(sequence)
                self._places[sequence.seq_id] = (job, index)
        except UserError as error:
            self._drop(job)
            job.put(RequestError(400, str(error)))

    def _drop(self, job: Job) -> None:
        for sequence in job.sequences:
            self.engine.cancel(sequence)
            self._forget(sequence.seq_id)

    def _forget(self, seq_id: int) -> None:
        self._places.pop(seq_id, None)
        self._last_token.pop(seq_id, None)

    def _route(self, output: RequestOutput) -> None:
        place = self._places.get(output.seq_id)
        if place is None:
            return
        job, index = place
        sequence = job.sequences[index]
        self._measure(sequence, output)
        if output.finish_reason is not None:
            self._forget(output.seq_id)
        job.put(Piece(index, output, sequence.num_reused))

    def _measure(self, sequence: Sequence, output: RequestOutput) -> None:
        now, metrics = time.perf_counter(), self._metrics
        last = self._last_token.get(output.seq_id)
        if last is None:
            metrics.first.observe(now - sequence.arrived_at)
            metrics.prompt_tokens.inc(len(sequence.prompt_ids))
            metrics.cached_tokens.inc(sequence.num_reused)
        else:
            metrics.between.observe(now - last)
        metrics.tokens.inc(len(output.token_ids))
        self._last_token[output.seq_id] = now

    # ---- When a step fails ----

    def _step(self) -> list[RequestOutput]:
        outputs, failure, involved = self._attempt()
        if failure is None:
            self._failures = 0
            return outputs
        self._failures += 1
        if self._failures >= MAX_FAILURES or not self._device_answers():
            self._die("the engine failed again and again")
            return []
        outputs = self._isolate(involved, failure)
        self.engine.forget()  # what was to be written to the cache may not have been
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return outputs

    def _attempt(self) -> tuple[list[RequestOutput], RequestError | None, list[Sequence]]:
        """One step. When it fails: why, and the sequences that are there still, brought back to where they were before.
        A prompt is read alone: if that fails, its request has ended already.
        """
        scheduler = self.engine.scheduler
        before = {s.seq_id: (s.num_prefilled, s.num_issued) for s in (*scheduler.prefilling, *scheduler.running)}
        failure = None
        try:
            return self.engine.step(), None, []
        except Exception as error:  # it is some request's, and no reason to end the others
            failure = _failure(error)
            traceback.print_exc(file=sys.stderr)
        # Outside of the handler, which keeps alive what the step had made.
        self._metrics.failures.inc()
        decoded = [s for s in scheduler.running if s.seq_id in before and 0 < before[s.seq_id][1] < s.num_issued]
        if not decoded:
            live = (*scheduler.prefilling, *scheduler.running)
            read = [s for s in live if before.get(s.seq_id) != (s.num_prefilled, s.num_issued)]
            self._end(read or list(live), failure)
            return [], failure, []
        lost = []
        for sequence in decoded:
            assert sequence.slot is not None
            newest = len(sequence.prompt_ids) + sequence.num_issued - 1
            if int(self.engine.state.positions[sequence.slot]) == newest:
                lost.append(sequence)  # its token was made, and is known to nobody
            else:
                sequence.num_issued -= 1
        self._end(lost, failure)
        return [], failure, [sequence for sequence in decoded if not sequence.finished]

    def _isolate(self, suspects: list[Sequence], failure: RequestError) -> list[RequestOutput]:
        """Run sequences that failed together one by one, and end those that fail alone. If none does, what they share
        is too much: when that happens again, the newest goes.
        """
        outputs: list[RequestOutput] = []
        guilty: list[Sequence] = []
        for suspect in suspects:
            if suspect.finished:
                continue
            others = [(s, s.num_issued) for s in self.engine.scheduler.running if s is not suspect]
            for sequence, _ in others:
                sequence.num_issued = sequence.max_new_tokens  # there is nothing to be done for it
            made, alone, involved = self._attempt()
            for sequence, issued in others:
                sequence.num_issued = issued
            outputs += made
            if alone is not None:
                self._end(involved, alone)
                guilty += involved
        if not guilty and self._failures > 1:
            self._end([s for s in suspects if not s.finished][-1:], failure)  # they are in the order they came in
        return outputs

    def _end(self, sequences: list[Sequence], failure: RequestError) -> None:
        """The requests that these belong to have failed."""
        for sequence in sequences:
            place = self._places.get(sequence.seq_id)
            if place is not None:
                self._drop(place[0])
                place[0].put(failure)
            else:
                self.engine.cancel(sequence)

    def _device_answers(self) -> bool:
        """Some failures of a GPU make every later step fail."""
        try:
            return int(torch.ones((), device=self.engine.device).item()) == 1
        except RuntimeError:
            return False

    def _die(self, why: str) -> None:
        with self._changed:
            self._dead = why
        self._fail_all(RequestError(500, f"{why}; the server ends", code="engine_dead"))
        self.on_death()

    def _fail_all(self, why: RequestError) -> None:
        with self._changed:
            jobs = {id(job): job for job in (*(job for job, _ in self._places.values()), *self._inbox)}
            self._inbox = []
        for job in jobs.values():
            job.put(why)


def _failure(error: Exception) -> RequestError:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return RequestError(
            500, "the memory is full: there is no room for this request; make it shorter", code="out_of_memory"
        )
    return RequestError(500, "the model failed on this request", code="engine_failure")
