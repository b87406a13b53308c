"""A conversation says what its parts would say alone, reads every token once, and goes on when its context is full."""

from dataclasses import replace

import pytest
import torch

from config.errors import UserError
from config.settings import SamplingParams
from generate.conversation import Conversation, spliced
from generate.sequence import Sequence
from tests.generate.scripted import RecallModel, Utf8Tokenizer, make_engine

USER, ASSISTANT, SYSTEM, END, PAIR = 256, 257, 258, 259, 260
VOCAB = 300
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


class Pairs(Utf8Tokenizer):
    """A token a byte, but "ab" is one of its own."""

    def encode(self, text):
        return [PAIR if piece == b"ab" else byte for piece in _cut(text.encode()) for byte in piece[:1]]

    def decode_bytes(self, ids, *, start=False):
        return b"".join(b"ab" if i == PAIR else bytes([i]) for i in ids if i < 256 or i == PAIR)


def _cut(data):
    while data:
        length = 2 if data.startswith(b"ab") else 1
        yield data[:length]
        data = data[length:]


class Template:
    """A token for the role, the text, a token for its end."""

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer or Utf8Tokenizer()

    def render(self, messages, add_generation_prompt=True):
        roles = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
        ids = []
        for message in messages:
            ids += [roles[message["role"]], *self.tokenizer.encode(message["content"]), END]
        return [*ids, ASSISTANT] if add_generation_prompt else ids


def conversation(model=None, *, max_seq_len=200, tokenizer=None, chunk=512, **options):
    model = RecallModel(VOCAB) if model is None else model
    engine = make_engine(
        model, max_seq_len=max_seq_len, vocab_size=VOCAB, eos_ids=frozenset({END}), prefill_chunk=chunk
    )
    return Conversation(engine, Template(tokenizer), tokenizer or Utf8Tokenizer(), **options)


def says(text, tokenizer=None):
    """A model that says a text after any prompt: the prompt's last token is the mark of its turn."""

    class Says:
        def __init__(self):
            self.script = [*(tokenizer or list)(text.encode()), END]

        def __call__(self, tokens, start, cache, slots, context, logits_at=None):
            memory = cache.keys[0][int(slots[0]), 0, :, 0]
            begin, length = int(start[0]), tokens.shape[1]
            memory[begin : begin + length] = tokens[0].float()
            seen = memory[: begin + int(logits_at[0]) + 1].long().tolist()
            said = seen[len(seen) - seen[::-1].index(ASSISTANT) :]
            logits = torch.zeros(1, VOCAB)
            logits[0, self.script[len(said)]] = 100
            return logits

    return Says()


def test_an_answer_is_what_the_engine_makes_of_the_rendered_messages():
    talk = conversation(system="be kind")
    for text in ("hello", "how are you?", "fine"):
        pieces = list(talk.ask(text, GREEDY))
        fresh = make_engine(RecallModel(VOCAB), max_seq_len=200, vocab_size=VOCAB, eos_ids=frozenset({END}))
        prompt = Template().render([{"role": "system", "content": "be kind"}, *talk.messages[:-1]])
        alone = fresh.add(prompt, GREEDY)
        while not alone.finished:
            fresh.step()
        assert talk.reply.token_ids == alone.token_ids
        assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
        assert talk.messages[-2] == {"role": "user", "content": text}


def test_a_turn_reads_its_own_tokens_alone():
    talk = conversation(says("yes, abba"), max_seq_len=2000)
    read = []
    for turn in range(10):
        before = talk.engine.ledger.prefill_tokens
        assert "".join(talk.ask("and now?", replace(GREEDY, max_new_tokens=50))) == "yes, abba"
        read.append(talk.engine.ledger.prefill_tokens - before)
        assert talk.reply.prompt_tokens - talk.reply.reused_tokens == read[-1]
        assert talk.reply.context_used == talk.reply.prompt_tokens + len("yes, abba") + 1
        if turn:
            # The end of the last answer was sampled and not read yet; then the message with its marks.
            assert read[-1] == 1 + 1 + len("and now?") + 1 + 1
    assert len(set(read[1:])) == 1


def test_what_was_said_is_not_read_again_however_it_is_cut():
    tokenizer = Pairs()
    talk = conversation(says("cabab"), tokenizer=tokenizer, max_seq_len=500)  # byte by byte, the tokenizer has "ab"
    list(talk.ask("ab", replace(GREEDY, max_new_tokens=50)))
    assert talk.reply.token_ids == [*b"cabab", END]
    list(talk.ask("ab", replace(GREEDY, max_new_tokens=50)))
    assert talk.reply.prompt_tokens - talk.reply.reused_tokens == 1 + 1 + 1 + 1 + 1


def test_splicing_changes_the_cut_and_never_the_text():
    tokenizer = Pairs()
    read = (USER, PAIR, END, ASSISTANT, *b"xab", END)
    rendered = [USER, PAIR, END, ASSISTANT, *b"x", PAIR, END, USER, *b"y", END, ASSISTANT]
    assert spliced(read, rendered, tokenizer) == [*read, USER, *b"y", END, ASSISTANT]
    other = [USER, PAIR, END, ASSISTANT, *b"z", PAIR, END]
    assert spliced(read, other, tokenizer) == other
    longer = [USER, PAIR, END, ASSISTANT, *b"x", PAIR, *b"!", END]
    assert spliced(read, longer, tokenizer) == longer
    assert spliced((), rendered, tokenizer) == rendered
    assert spliced(read, list(read[:3]), tokenizer) == list(read[:3])


@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_answer_stays_as_far_as_it_got(after):
    talk = conversation(says("one two three"), max_seq_len=500)
    answer = talk.ask("count", replace(GREEDY, max_new_tokens=50))
    shown = "".join(next(answer) for _ in range(after))
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}
    assert (talk.reply.text, talk.reply.finish_reason) == (shown, "abort")
    assert not talk.engine.has_unfinished
    assert "".join(talk.ask("again", replace(GREEDY, max_new_tokens=50))) == "one two three"


def test_an_answer_that_never_began_takes_its_message_with_it():
    talk = conversation(says("x"))
    answer = talk.ask("hello", GREEDY)
    answer.close()  # before it was begun
    assert talk.messages == []
    long = conversation(says("x"), max_seq_len=10)
    with pytest.raises(UserError, match=r"the message has 33 tokens .* the context holds 10"):
        list(long.ask("x" * 30, GREEDY))
    assert long.messages == []
    assert "".join(long.ask("x", replace(GREEDY, max_new_tokens=2))) == "x"


def test_retry_and_undo():
    talk = conversation(max_seq_len=300)
    with pytest.raises(UserError, match="no answer yet"):
        list(talk.retry(GREEDY))
    list(talk.ask("a long enough question", GREEDY))
    list(talk.ask("b", GREEDY))
    first = talk.messages[-1]
    list(talk.retry(GREEDY))
    assert talk.messages[-1] == first  # greedy: the same
    assert talk.reply.reused_tokens == talk.reply.prompt_tokens - 1
    answer = talk.retry(GREEDY)
    answer.close()
    assert talk.messages[-1] == first
    assert talk.undo() == "b"
    assert len(talk.messages) == 2
    assert talk.undo() == "a long enough question"
    assert talk.undo() is None


def test_the_oldest_messages_make_way_and_it_is_said():
    talk = conversation(says("so it is"), max_seq_len=100, system="s")
    params = replace(GREEDY, max_new_tokens=None)
    dropped = []
    for turn in range(12):
        assert "".join(talk.ask(f"message {turn}", params, dropped.append)) == "so it is"
        assert talk.reply.prompt_tokens <= 75
        assert talk.reply.dropped == sum(dropped)
    assert len(talk.messages) == 24  # the history stays
    assert dropped
    assert all(count > 0 and count % 2 == 0 for count in dropped)
    assert len(dropped) < 11  # room is made for several turns at once


@pytest.mark.parametrize("text", ["plain words, many of them, so that it is long", "žluťoučký kůň → 🦄🦄🦄 ďábelské"])
def test_an_answer_goes_on_over_the_end_of_the_context_without_a_seam(text):
    class Goes:
        """Says the text, going on where the answer in its prompt ends."""

        def __call__(self, ids, start, cache, slots, context, logits_at=None):
            memory = cache.keys[0][int(slots[0]), 0, :, 0]
            begin, length = int(start[0]), ids.shape[1]
            memory[begin : begin + length] = ids[0].float()
            seen = memory[: begin + int(logits_at[0]) + 1].long().tolist()
            said = len(seen) - 1 - (len(seen) - 1 - seen[::-1].index(ASSISTANT))
            logits = torch.zeros(1, VOCAB)
            logits[0, [*text.encode(), END][said]] = 100
            return logits

    size = len(text.encode())
    talk = conversation(Goes(), max_seq_len=size + 30, system="s")
    talk.messages += [
        {"role": "user", "content": "an old question"},
        {"role": "assistant", "content": "an old answer, of some length, that has to go"[: size - 5]},
    ]
    dropped = []
    answer = "".join(talk.ask("go on", replace(GREEDY, max_new_tokens=None), dropped.append))
    assert answer == text
    assert "�" not in answer
    assert talk.messages[-1]["content"] == text
    assert talk.reply.finish_reason == "stop"
    assert dropped == [2]


def test_an_answer_that_fills_the_context_alone_ends_there():
    talk = conversation(says("x" * 100), max_seq_len=20)
    answer = "".join(talk.ask("y", replace(GREEDY, max_new_tokens=None)))
    assert talk.reply.finish_reason == "length"
    assert set(answer) == {"x"}
    assert len(answer) == 20 - 4


def test_stop_strings_are_found_and_not_shown():
    talk = conversation(says("one two three"), max_seq_len=300)
    answer = "".join(talk.ask("count", replace(GREEDY, max_new_tokens=50, stop=("two",))))
    assert answer == "one "
    assert talk.reply.finish_reason == "stop"
    assert not talk.engine.has_unfinished


def test_another_model_takes_over_in_the_middle():
    talk = conversation(says("first"), max_seq_len=300)
    params = replace(GREEDY, max_new_tokens=50)
    list(talk.ask("a", params))
    talk.engine = conversation(says("second"), max_seq_len=300).engine
    assert "".join(talk.ask("b", params)) == "second"
    assert [message["content"] for message in talk.messages] == ["a", "first", "b", "second"]


def test_reused_tokens_change_no_text():
    """Slots that hold what a prompt begins with: the text is that of an empty cache, token for token."""
    prompts = [[1, 2, 3] * 10, [1, 2, 3] * 10 + [5] * 4, [1, 2, 3] * 9 + [7] * 9, [9] * 20, [1, 2, 3] * 11]
    params = SamplingParams(temperature=0.9, seed=3, max_new_tokens=9, repetition_penalty=1.3)
    alone = []
    for prompt in prompts:
        engine = make_engine(max_seq_len=100)
        sequence = engine.add(prompt, params)
        while engine.has_unfinished:
            engine.step()
        alone.append(sequence.token_ids)
    for slots in (1, 2, 3):
        engine = make_engine(max_num_seqs=slots, max_seq_len=100, prefill_chunk=7)
        made: list[Sequence] = []
        for _ in range(2):
            made = [engine.add(prompt, params) for prompt in prompts]
            while engine.has_unfinished:
                engine.step()
            assert [sequence.token_ids for sequence in made] == alone
        assert any(sequence.num_reused >= 27 for sequence in made)
        engine.forget()
        again = engine.add(prompts[0], params)
        while engine.has_unfinished:
            engine.step()
        assert (again.num_reused, again.token_ids) == (0, alone[0])
