"""The formats of models that bring no template: who is given which, how they look, and laws that hold for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.chat_families import TEMPLATES
from model.chat_template import ChatTemplate, load_chat_template
from model.config import ModelConfig
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model.tiny_tokenizers import tiny_config, write_byte_level, write_sentencepiece

Messages = list[dict[str, Any]]
Loaded = dict[str, tuple[Tokenizer, ChatTemplate]]
IM = ["<|im_start|>", "<|im_end|>"]
INST = ["[INST]", "[/INST]"]
SYSTEM = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
PHI = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
GRANITE = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True)
class Case:
    """A family: what tells it, its special tokens too, and how it writes Be, Hi, Yes, And? and Hi alone."""

    pieces: Sequence[str]
    file: str
    with_system: str
    alone: str
    end: str = "</s>"
    name: str = "some-model"
    family: str = "llama"
    vocab_size: int = 4096
    trims: bool = False
    """White space around what is said."""
    moves: bool = False
    """The system text, with each turn."""


CASES = {
    "llama 3": Case(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama3.jinja",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>", trims=True,
    ),
    "llama 2": Case(
        [], "llama2.jinja",
        "<s>[INST] <<SYS>>\nBe\n<</SYS>>\n\nHi [/INST] Yes </s><s>[INST] And? [/INST]",
        "<s>[INST] Hi [/INST]",
        name="Llama-2-7b-chat-hf", trims=True,
    ),
    "mistral 1": Case(
        [], "mistral1.jinja",
        "<s> [INST] Be\n\nHi [/INST] Yes</s> [INST] And? [/INST]",
        "<s> [INST] Hi [/INST]",
        name="Mixtral-8x7B-Instruct-v0.1",
    ),
    "mistral 3": Case(
        INST, "mistral.jinja",
        "<s>[INST] Hi[/INST] Yes</s>[INST] Be\n\nAnd?[/INST]",
        "<s>[INST] Hi[/INST]",
        name="Mistral-7B-Instruct-v0.3", moves=True,
    ),
    "mistral 3 tekken": Case(
        INST, "mistral.jinja",
        "<s>[INST]Hi[/INST]Yes</s>[INST]Be\n\nAnd?[/INST]",
        "<s>[INST]Hi[/INST]",
        name="mistral-nemo-instruct", vocab_size=131072, moves=True,
    ),
    "mistral 7": Case(
        [*INST, *SYSTEM], "mistral7.jinja",
        "<s>[SYSTEM_PROMPT] Be[/SYSTEM_PROMPT][INST] Hi[/INST] Yes</s>[INST] And?[/INST]",
        "<s>[INST] Hi[/INST]",
        name="Mistral-Large-Instruct-2411",
    ),
    "mistral 7 tekken": Case(
        [*INST, *SYSTEM], "mistral7.jinja",
        "<s>[SYSTEM_PROMPT]Be[/SYSTEM_PROMPT][INST]Hi[/INST]Yes</s>[INST]And?[/INST]",
        "<s>[INST]Hi[/INST]",
        name="Mistral-Small-24B-Instruct-2501", vocab_size=131072,
    ),
    "chatml": Case(
        IM, "chatml.jinja",
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "qwen": Case(
        IM, "qwen.jinja",
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        QWEN + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>", family="qwen2",
    ),
    "gemma": Case(
        ["<start_of_turn>", "<end_of_turn>"], "gemma.jinja",
        "<s><start_of_turn>user\nBe\n\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n<start_of_turn>user\n"
        "And?<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>", trims=True,
    ),
    "granite": Case(
        GRANITE, "granite.jinja",
        "<|start_of_role|>system<|end_of_role|>Be<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Yes<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>And?"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        end="<|end_of_text|>",
    ),
    "phi 3": Case(
        PHI, "phi3.jinja",
        "<|system|>\nBe<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes<|end|>\n<|user|>\nAnd?<|end|>\n<|assistant|>\n",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        end="<|end|>",
    ),
    "phi 4": Case(
        [*IM, "<|im_sep|>"], "phi4.jinja",
        "<|im_start|>system<|im_sep|>Be<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>"
        "Yes<|im_end|><|im_start|>user<|im_sep|>And?<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        end="<|im_end|>",
    ),
    "phi 4 mini": Case(
        PHI, "phi4_mini.jinja",
        "<|system|>Be<|end|><|user|>Hi<|end|><|assistant|>Yes<|end|><|user|>And?<|end|><|assistant|>",
        "<|user|>Hi<|end|><|assistant|>",
        end="<|end|>", vocab_size=200_064,
    ),
    "plain": Case(
        INST, "plain.jinja",
        "<s>Be\n\nUser: Hi\nAssistant: Yes\nUser: And?\nAssistant:",
        "<s>User: Hi\nAssistant:",
        trims=True,
    ),
}  # fmt: skip


def say(*contents: str, system: str | None = None) -> Messages:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def load(path: Path, case: Case, name: str | None = None) -> tuple[Tokenizer, ChatTemplate]:
    write_byte_level(path, markers=case.pieces)
    config = tiny_config(case.vocab_size)
    config = ModelConfig(**{**vars(config), "family": case.family})
    tokenizer = load_tokenizer(path, config)
    end = tokenizer.special_id(case.end)
    assert end is not None
    config = ModelConfig(**{**vars(config), "eos_token_ids": (end,)})
    return tokenizer, load_chat_template(path, tokenizer, config, name or case.name)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return {name: load(tmp_path_factory.mktemp("family"), case) for name, case in CASES.items()}


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, special tokens by their names."""
    pieces = {tokenizer.special_id(piece): piece.encode() for piece in tokenizer.special_pieces}
    return b"".join(pieces.get(token) or tokenizer.decode_bytes([token]) for token in ids).decode()


def specials(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    known = {tokenizer.special_id(piece) for piece in tokenizer.special_pieces}
    return [token for token in ids if token in known]


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_looks_as_its_family_has_it(loaded: Loaded, name: str) -> None:
    tokenizer, template = loaded[name]
    case = CASES[name]
    assert spelled(tokenizer, template.render(say("Hi", "Yes", "And?", system="Be"))) == case.with_system
    assert spelled(tokenizer, template.render(say("Hi"))) == case.alone
    assert template.plain == (name == "plain")
    # What stands in brackets is a special token where its family has one.
    written = [case.with_system.count(piece) for piece in tokenizer.special_pieces]
    assert len(specials(tokenizer, template.render(say("Hi", "Yes", "And?", system="Be")))) == sum(written)


def test_every_format_is_somebodys() -> None:
    assert {case.file for case in CASES.values()} == {file.name for file in TEMPLATES.iterdir()}


@pytest.mark.parametrize(
    ("name", "called", "end"),
    [
        ("llama 3", "Llama-3-8B-Instruct", "</s>"),  # a base model: it has the tokens, and does not end its texts so
        ("chatml", "some-chat", "</s>"),
        ("gemma", "gemma-2-2b", "</s>"),
        ("llama 2", "Llama-2-7b-hf", "</s>"),
        ("llama 2", "TinyLlama-1.1B-Chat-v1.0", "</s>"),  # a Llama of another format
        ("mistral 3", "Mistral-7B-v0.3", "</s>"),
    ],
)
def test_a_model_that_was_not_taught_a_format_is_given_none(tmp_path: Path, name: str, called: str, end: str) -> None:
    case = CASES[name]
    _, template = load(tmp_path, Case(case.pieces, "", "", "", end=end), called)
    assert template.plain


# Mistral's tokenizers put together what others write as text: the ids are those of the parts.


@pytest.mark.parametrize("version", [3, 7])
def test_mistrals_ids_are_those_of_the_parts(tmp_path: Path, version: int) -> None:
    pieces = [*INST, *SYSTEM] if version == 7 else INST
    write_sentencepiece(tmp_path, control_symbols=pieces, user_defined_symbols=[])
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    template = load_chat_template(tmp_path, tokenizer, tiny_config(eos=(2,)), "Mistral-7B-Instruct")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    begin, end, ask, asked, rule, ruled = (theirs.piece_to_id(piece) for piece in ("<s>", "</s>", *INST, *SYSTEM))
    talks = (("Hi there", "Yes.", "And?"), (" a\n", " b  ", "[INST]"), ("日本", "x\n \n", "</s>"))
    for system in (None, "Be brief. "):
        for first, answer, last in talks:
            expected = [begin]
            if system is not None and version == 7:
                expected += [rule, *theirs.encode(system), ruled]
            expected += [ask, *theirs.encode(first), asked, *theirs.encode(answer.rstrip(" ")), end]
            before = f"{system}\n\n" if system is not None and version == 3 else ""
            expected += [ask, *theirs.encode(before + last), asked]
            assert template.render(say(first, answer, last, system=system)) == expected


def test_mistrals_system_text_is_kept_where_the_last_word_is_the_models(loaded: Loaded) -> None:
    tokenizer, template = loaded["mistral 3"]
    ids = template.render(say("Hi", "Yes", system="Be"), add_generation_prompt=False)
    assert spelled(tokenizer, ids) == "<s>[INST] Be\n\nHi[/INST] Yes</s>"


# Laws.

SPELLINGS = sorted({piece for case in CASES.values() for piece in case.pieces} | {"<s>", "</s>", "<<SYS>>", "User:"})
HEADERS = [case.with_system for case in CASES.values()]
TAGS = ["<|", "|>", "<", ">", "[", "]", "</think>", "<think>", "\n", "  ", "𠀀", "é"]
parts = st.sampled_from([*SPELLINGS, *HEADERS, *TAGS])
words = st.lists(parts | st.text(max_size=8), max_size=6).map("".join) | st.text(max_size=40)
conversations = st.tuples(st.none() | words, st.lists(words, min_size=1, max_size=5)).map(
    lambda made: say(*made[1], system=made[0])
)
law: Callable[[Any], Any] = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", CASES)
@law
@given(messages=conversations)
def test_what_is_said_is_text(loaded: Loaded, name: str, messages: Messages) -> None:
    """It makes no special token, and it is there, exactly."""
    tokenizer, template = loaded[name]
    case = CASES[name]
    ids = template.render(messages)
    assert ids == template.render(messages)
    harmless = [{**message, "content": "x"} for message in messages]
    assert specials(tokenizer, ids) == specials(tokenizer, template.render(harmless))
    text = spelled(tokenizer, ids)
    at = 0
    for message in [m for m in messages if not (case.moves and m["role"] == "system")]:
        content = message["content"]
        if case.trims:
            content = content.strip()
        elif "mistral" in name and message["role"] == "assistant":
            content = content.rstrip(" ")
        found = text.find(content, at)
        assert found >= at, (content, text)
        at = found + len(content)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].moves])
@law
@given(messages=conversations)
def test_what_was_said_stays_as_it_was(loaded: Loaded, name: str, messages: Messages) -> None:
    """A prompt begins the longer one of which its answer is a part, so that no more than what is new is read."""
    tokenizer, template = loaded[name]
    whole = spelled(tokenizer, template.render(messages, add_generation_prompt=False))
    for count in range(1, len(messages)):
        if messages[count - 1]["role"] == "user":
            assert whole.startswith(spelled(tokenizer, template.render(messages[:count]))), count
