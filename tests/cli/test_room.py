"""The room for sequences beside a model: what was said stays, the rest follows what is free."""

import pytest

from cli import measure
from cli.builder import prepare
from cli.needs import needs_of
from cli.room import CONTEXT, LEAST_CONTEXT, NUM_SEQS, SHARE, room_for
from config.errors import UserError
from config.settings import BuildSettings, Setting

GB = 10**9


@pytest.fixture(scope="module")
def model():
    """A gigabyte of weights in bf16, 28 layers of 1,024 numbers a token for keys and values each, 40,960 positions."""
    settings = BuildSettings(
        "qwen3-0.6b", Setting("cpu", "--device"), Setting("bf16", "--dtype"), False, False, random_weights=True
    )
    return prepare(settings, needs_tokenizer=False)


@pytest.fixture
def free(monkeypatch):
    def set_free(nbytes):
        monkeypatch.setattr(measure, "free_memory", lambda device: int(nbytes))

    return set_free


def test_what_is_wanted_where_there_is_room(model, free):
    free(500 * GB)
    room = room_for(model)
    assert (room.num_seqs, room.max_seq_len) == (NUM_SEQS["cpu"], CONTEXT)
    said = room_for(model, 100, 300)
    assert (said.num_seqs, said.max_seq_len) == (100, 300)


@pytest.mark.parametrize("gigabytes", [2.3, 3, 4, 5, 8, 12])
@pytest.mark.parametrize(("num_seqs", "max_seq_len"), [(None, None), (3, None), (None, 4096)])
def test_it_fits_and_the_next_larger_would_not(model, free, gigabytes, num_seqs, max_seq_len):
    free(gigabytes * GB)
    room = room_for(model, num_seqs, max_seq_len)
    assert num_seqs in (None, room.num_seqs)
    assert max_seq_len in (None, room.max_seq_len)
    assert needs_of(model, room.max_seq_len, room.num_seqs).more <= SHARE * gigabytes * GB
    longer = min(CONTEXT, 2 * room.max_seq_len) if max_seq_len is None else max_seq_len
    more = min(NUM_SEQS["cpu"], 2 * room.num_seqs) if num_seqs is None else num_seqs
    if room.max_seq_len >= LEAST_CONTEXT and (more, longer) != (room.num_seqs, room.max_seq_len):
        assert needs_of(model, longer, more).more > SHARE * gigabytes * GB


@pytest.mark.parametrize(("num_seqs", "max_seq_len"), [(None, None), (64, 40960)])
def test_what_does_not_fit_is_one_line(model, free, num_seqs, max_seq_len):
    free(1.2 * GB)
    with pytest.raises(UserError, match=r"1\.2 GB are free on cpu: take a smaller --max-num-seqs") as caught:
        room_for(model, num_seqs, max_seq_len)
    assert "\n" not in str(caught.value)
