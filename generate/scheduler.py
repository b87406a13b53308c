"""Who runs next: waiting sequences, running ones and the slots of the cache between them. Pure Python; knows no
tensors.

First come, first served. Prompts are read one sequence at a time and in chunks, so that the memory a prompt takes is
bounded; between two chunks those that run get a step, so that no prompt makes them wait for more than one. Decoding
runs in batches of fixed sizes (1, 2, 4, 8, …), so that a compiled step has few shapes.

A slot remembers what its part of the cache holds. A prompt that begins like that begins after it.
"""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from generate.sequence import Sequence, SequenceStatus

LEAST_SHARED = 16
"""Fewer tokens are sooner read again than found in the cache, unless they are all that a slot holds."""


@dataclass(frozen=True)
class Prefill:
    """Read prompt tokens `start` to `end` of one sequence; the last chunk also samples the first new token. Before it,
    copy the tokens before `start` from slot `copy_from`, where they stand already.
    """

    sequence: Sequence
    start: int
    end: int
    copy_from: int | None = None

    @property
    def first(self) -> bool:
        return self.start == self.sequence.num_reused

    @property
    def last(self) -> bool:
        return self.end == len(self.sequence.prompt_ids)


@dataclass(frozen=True)
class Decode:
    """One more token for each of these sequences. `slots` are the rows of the batch, padded to its fixed size."""

    sequences: tuple[Sequence, ...]
    slots: tuple[int, ...]


def batch_bucket(rows: int) -> int:
    """The fixed batch size that `rows` rows run in: the next power of two."""
    assert rows > 0
    return 1 << (rows - 1).bit_length()


def slots_needed(max_num_seqs: int) -> int:
    """Slots of the cache for that many sequences. Beyond one, batches may be padded, and a padding row needs a slot of
    its own to write to: a scratch slot after the others, whose content nobody reads.
    """
    return max_num_seqs if max_num_seqs == 1 else max_num_seqs + 1


class Scheduler:
    """Gives each sequence a slot, and each step its work. What it hands out it takes as done: the next call plans on
    it.
    """

    def __init__(self, max_num_seqs: int, prefill_chunk: int, min_batch: int = 1) -> None:
        """min_batch: decode in no batch smaller than this."""
        assert max_num_seqs > 0
        assert prefill_chunk > 0
        assert 1 <= min_batch <= batch_bucket(max_num_seqs)
        self.min_batch = min_batch
        self.prefill_chunk = prefill_chunk
        self.num_slots = self.scratch_slot = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._held: dict[int, SequenceOf[int]] = dict.fromkeys(range(max_num_seqs), ())
        """What free slots hold, the least recently used first."""
        self._copy_from: dict[int, int] = {}
        self._read_since_decode = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def add(self, sequence: Sequence) -> None:
        assert sequence.prompt_ids
        assert sequence.max_new_tokens > 0
        self.waiting.append(sequence)

    def schedule(self) -> Prefill | Decode | None:
        """The next step's work; None when all that is unfinished waits for results of steps already issued."""
        if self.waiting and self._held and not self.prefilling:  # the one before may be what this one begins with
            sequence = self.waiting.popleft()
            self._place(sequence)
            sequence.status = SequenceStatus.PREFILLING
            self.prefilling.append(sequence)
        work: Prefill | Decode | None = None
        if self.prefilling and self._read_since_decode + self._next_chunk() > self.prefill_chunk:
            work = self._decode()
        if work is None:
            work = self._prefill() if self.prefilling else self._decode()
        self._read_since_decode = self._read_since_decode + work.end - work.start if isinstance(work, Prefill) else 0
        return work

    def forget(self) -> None:
        """Let every free slot forget what it holds, so that nothing is spared the next prompts."""
        self._held = dict.fromkeys(self._held, ())

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its slot."""
        assert not sequence.finished
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.PREFILLING:
            self.prefilling.remove(sequence)
        else:
            self.running.remove(sequence)
        if sequence.slot is not None:
            uncopied = self._copy_from.pop(sequence.seq_id, None) is not None
            self._held[sequence.slot] = () if uncopied else held_by(sequence)
            sequence.slot = None
        sequence.status = SequenceStatus.FINISHED

    def _place(self, sequence: Sequence) -> None:
        """Give a sequence the free slot that holds the most of its prompt, or the one that was not used for longest
        and what another slot has to be copied from.
        """
        prompt, oldest = sequence.prompt_ids, next(iter(self._held))
        busy = {other.slot: held_by(other) for other in (*self.prefilling, *self.running) if other.slot is not None}
        best, shared = oldest, 0
        for slot, held in (*self._held.items(), *busy.items()):
            # The last token is read in any case: the next one comes of it.
            common = min(common_prefix(prompt, held), len(prompt) - 1)
            if common > shared and (common >= LEAST_SHARED or common == len(held)):
                best, shared = slot, common
        sequence.slot = best
        if best in busy or (best != oldest and 2 * shared < len(self._held[best])):
            # Somebody else's, or mostly of another text that may go on.
            sequence.slot = oldest
            if shared > sequence.num_prefilled:
                self._copy_from[sequence.seq_id] = best
        del self._held[sequence.slot]
        sequence.num_reused = sequence.num_prefilled = max(sequence.num_prefilled, shared)

    def _next_chunk(self) -> int:
        sequence = self.prefilling[0]
        return min(self.prefill_chunk, len(sequence.prompt_ids) - sequence.num_prefilled)

    def _prefill(self) -> Prefill:
        sequence = self.prefilling[0]
        start = sequence.num_prefilled
        work = Prefill(sequence, start, start + self._next_chunk(), self._copy_from.pop(sequence.seq_id, None))
        sequence.num_prefilled = work.end
        if work.last:
            self.prefilling.popleft()
            self.running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            sequence.num_issued = 1
        return work

    def _decode(self) -> Decode | None:
        rows = [sequence for sequence in self.running if sequence.num_issued < sequence.max_new_tokens]
        if not rows:
            return None
        slots = []
        for sequence in rows:
            assert sequence.slot is not None
            sequence.num_issued += 1
            slots.append(sequence.slot)
        padding = [self.scratch_slot] * (max(self.min_batch, batch_bucket(len(rows))) - len(rows))
        return Decode(tuple(rows), tuple(slots + padding))


def held_by(sequence: Sequence) -> SequenceOf[int]:
    """The tokens that a sequence's slot holds for certain, from its beginning: what was read of the prompt, then what
    was generated and read again. Steps in flight may write behind them, and are done before anybody reads there.
    """
    if sequence.num_prefilled < len(sequence.prompt_ids):
        return sequence.prompt_ids[: sequence.num_prefilled]
    return (*sequence.prompt_ids, *sequence.token_ids[: max(0, sequence.num_issued - 1)])


def common_prefix(a: SequenceOf[int], b: SequenceOf[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, step = 0, LEAST_SHARED
    limit = min(len(a), len(b))
    while low < limit and a[low : low + step] == b[low : low + step]:  # beyond an end only one of them goes on
        low, step = low + step, 2 * step
    low, high = min(low, limit), min(low + step, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
