"""Who runs when, without a model."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config.settings import SamplingParams
from generate.scheduler import Decode, Prefill, Scheduler, batch_bucket, common_prefix, slots_needed
from generate.sequence import Sequence, SequenceStatus


def sequence(seq_id: int, prompt: int = 3, new: int = 2) -> Sequence:
    return Sequence(seq_id, tuple(range(prompt)), SamplingParams(), new)


def test_batches_are_powers_of_two() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 32, 33)] == [1, 2, 4, 4, 8, 8, 16, 32, 64]
    assert [slots_needed(n) for n in (1, 2, 3, 4, 32)] == [1, 3, 4, 5, 33]


def test_prompts_are_read_in_chunks_and_who_runs_waits_for_no_more_than_one() -> None:
    scheduler = Scheduler(2, prefill_chunk=4)
    a, b, c = sequence(0, prompt=9), sequence(1), sequence(2)
    for s in (a, b, c):
        scheduler.add(s)
    assert [scheduler.schedule() for _ in range(6)] == [
        Prefill(a, 0, 4),
        Prefill(a, 4, 8),
        Prefill(a, 8, 9),
        Decode((a,), (0,)),
        Prefill(b, 0, 3),
        Decode((b,), (1,)),
    ]
    assert (a.slot, b.slot, c.status) == (0, 1, SequenceStatus.WAITING)
    assert scheduler.schedule() is None  # both were told to make all they may; nothing more until results are read
    scheduler.finish(a)
    assert scheduler.schedule() == Prefill(c, 0, 3)
    assert c.slot == 0


def test_a_batch_is_padded_with_the_scratch_slot() -> None:
    scheduler = Scheduler(3, prefill_chunk=9)
    for i in range(3):
        scheduler.add(sequence(i))
        scheduler.schedule()
    work = scheduler.schedule()
    assert isinstance(work, Decode)
    assert work.slots == (0, 1, 2, scheduler.scratch_slot) == (0, 1, 2, 3)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_sequence_can_end_in_any_state(steps: int) -> None:
    scheduler = Scheduler(1, prefill_chunk=2)
    s = sequence(0)
    scheduler.add(s)
    for _ in range(steps):
        scheduler.schedule()
    scheduler.finish(s)
    assert (s.slot, s.finished, scheduler.has_unfinished, scheduler.schedule()) == (None, True, False, None)


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_never_shared_and_everybody_ends(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(rng.randint(1, 5), prefill_chunk=rng.randint(1, 4))
    todo = [sequence(i, rng.randint(1, 9), rng.randint(1, 6)) for i in range(12)]
    made = dict.fromkeys(range(12), 0)
    waiting = list(todo)
    while waiting or scheduler.has_unfinished:
        if waiting and rng.random() < 0.3:
            scheduler.add(waiting.pop(0))
        work = scheduler.schedule()
        held = [s.slot for s in todo if s.slot is not None]
        assert len(held) == len(set(held))
        rows: tuple[Sequence, ...] = ()
        if isinstance(work, Prefill):
            rows = (work.sequence,) if work.last else ()
        elif isinstance(work, Decode):
            rows = work.sequences
            assert len(work.slots) == batch_bucket(len(rows))
        for s in rows:
            made[s.seq_id] += 1
            if made[s.seq_id] == s.max_new_tokens or rng.random() < 0.1:
                scheduler.finish(s)
    assert all(s.finished for s in todo)
    assert all(1 <= made[s.seq_id] <= s.max_new_tokens for s in todo)


@given(st.lists(st.integers(0, 2), max_size=200), st.lists(st.integers(0, 2), max_size=200), st.integers(0, 150))
def test_a_common_prefix_is_the_longest(a: list[int], b: list[int], alike: int) -> None:
    b = a[:alike] + b
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(tuple(a), tuple(b)) == expected


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 30))
@example(2612, 2, 12)  # one ended before what it shares was copied
def test_what_is_reused_is_what_the_slot_holds(seed: int, slots: int, chunk: int) -> None:
    """A cache of token ids is kept beside the scheduler: whatever is read after a prefix finds that prefix there."""
    rng = random.Random(seed)
    scheduler = Scheduler(slots, chunk)
    cache: dict[int, list[int]] = {slot: [] for slot in range(slots)}
    texts = [[rng.randrange(2) for _ in range(60)] for _ in range(3)]
    todo = []
    for i in range(12):
        text = rng.choice(texts)[: rng.randint(1, 60)] + [rng.randrange(2) for _ in range(rng.randint(0, 5))]
        todo.append(Sequence(i, tuple(text), SamplingParams(), rng.randint(1, 6)))
    for s in todo:
        scheduler.add(s)
    steps = 0
    while scheduler.has_unfinished:
        steps += 1
        assert steps < 2000
        work = scheduler.schedule()
        rows: tuple[Sequence, ...] = ()
        if isinstance(work, Prefill):
            s = work.sequence
            assert s.slot is not None
            if work.copy_from is not None:
                assert work.first
                cache[s.slot] = cache[work.copy_from][: work.start]
            assert tuple(cache[s.slot][: work.start]) == s.prompt_ids[: work.start]
            cache[s.slot][work.start :] = s.prompt_ids[work.start : work.end]
            rows = (s,) if work.last else ()
        elif isinstance(work, Decode):
            rows = work.sequences
            for s in rows:
                assert s.slot is not None
                cache[s.slot].append(s.token_ids[-1])
        for s in rows:
            s.token_ids.append(rng.randrange(2))
            if len(s.token_ids) == s.max_new_tokens:
                scheduler.finish(s)
        if rng.random() < 0.1:
            alive = [s for s in todo if s.slot is not None]
            if alive:
                scheduler.finish(rng.choice(alive))
    assert all(s.num_reused < len(s.prompt_ids) for s in todo)
