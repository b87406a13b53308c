"""Who runs next: waiting sequences, running ones and the slots of the cache between them. Pure Python; knows no
tensors.

First come, first served; prompts are read before anybody decodes, one sequence at a time and in chunks, so that the
memory a prompt takes is bounded. Decoding runs in batches of fixed sizes (1, 2, 4, 8, …), so that a compiled step has
few shapes.
"""

from collections import deque
from dataclasses import dataclass

from generate.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class Prefill:
    """Read prompt tokens `start` to `end` of one sequence; the last chunk also samples the first new token."""

    sequence: Sequence
    start: int
    end: int

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
        self.scratch_slot = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def add(self, sequence: Sequence) -> None:
        assert sequence.prompt_ids
        assert sequence.max_new_tokens > 0
        self.waiting.append(sequence)

    def schedule(self) -> Prefill | Decode | None:
        """The next step's work; None when all that is unfinished waits for results of steps already issued."""
        while self.waiting and self._free_slots:
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.status = SequenceStatus.PREFILLING
            self.prefilling.append(sequence)
        return self._prefill() if self.prefilling else self._decode()

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
            self._free_slots.append(sequence.slot)
            sequence.slot = None
        sequence.status = SequenceStatus.FINISHED

    def _prefill(self) -> Prefill:
        sequence = self.prefilling[0]
        start = sequence.num_prefilled
        work = Prefill(sequence, start, min(start + self.prefill_chunk, len(sequence.prompt_ids)))
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
