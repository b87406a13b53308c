"""Text comes back as it was; special tokens in text stay text; ids are those of the libraries and of Transformers."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken.load
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from config.errors import UserError
from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer_tiktoken import WORDS
from tests.model.tiny_tokenizers import (
    MARKERS,
    NASTY,
    SENTENCES,
    tiny_config,
    train_sentencepiece,
    write_byte_level,
    write_llama2c,
    write_metaspace,
    write_sentencepiece,
    write_tiktoken,
    write_unigram,
)


def llama2c(path: Path) -> Path:
    write_llama2c(path)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "sentencepiece bpe": write_sentencepiece,
    "sentencepiece unigram": lambda path: write_sentencepiece(path, "unigram"),
    "sentencepiece without prefix": lambda path: write_sentencepiece(path, add_dummy_prefix=False),
    "byte level": write_byte_level,
    "metaspace first": write_metaspace,
    "metaspace always": lambda path: write_metaspace(path, "always"),
    "metaspace never": lambda path: write_metaspace(path, "never"),
    "metaspace by normalizer": lambda path: write_metaspace(path, "normalizer"),
    "tiktoken": write_tiktoken,
    "llama2.c": llama2c,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(write(tmp_path_factory.mktemp("t")), tiny_config()) for kind, write in KINDS.items()}


def special_ids(tokenizer: Tokenizer) -> set[int]:
    ids = {tokenizer.special_id(piece) for piece in tokenizer.special_pieces}
    assert None not in ids
    return {i for i in ids if i is not None}


def check_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & special_ids(tokenizer)
    # Whatever the pieces in which they are asked for, the bytes are those of the whole.
    parts = [tokenizer.decode_bytes([token]) for token in ids]
    assert b"".join(parts) == tokenizer.decode_bytes(ids)
    head = tokenizer.decode_bytes(ids[:1], start=True)
    assert (head + tokenizer.decode_bytes(ids[1:])).decode() == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_and_makes_no_special_token(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    for text in [*NASTY, *SENTENCES[:5], *tokenizer.special_pieces]:
        check_text(tokenizer, text)
        check_text(tokenizer, f"{text}\n{text} x")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_comes_back(loaded: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = loaded[kind]
    fragments = st.one_of(
        st.text(max_size=8),
        st.sampled_from([" ", "▁", "\n", *MARKERS, "<0x0A>", "dog", *sorted(tokenizer.special_pieces)[:9]]),
    )
    check_text(tokenizer, "".join(data.draw(st.lists(fragments, max_size=6))))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stand_where_they_are_put(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    special = sorted(special_ids(tokenizer))[0]
    ids = tokenizer.encode_parts([special, special, "a dog", special, "x ▁ y", special])
    assert [i for i, token in enumerate(ids) if token == special][:2] == [0, 1]
    assert ids[-1] == special
    assert ids.count(special) == 4
    shown = tokenizer.decode(ids)
    assert shown.replace(" ", "") == "a dogx ▁ y".replace(" ", "")
    assert tokenizer.encode_parts([]) == []
    assert tokenizer.encode_parts([special]) == [special]


@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_put_once_and_has_no_text(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    assert tokenizer.bos_id is not None
    assert tokenizer.add_bos
    assert tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    with_bos = tokenizer.encode("a dog", bos=True)
    assert with_bos == [tokenizer.bos_id, *tokenizer.encode("a dog", bos=False)]
    assert tokenizer.decode(with_bos) == "a dog"
    assert tokenizer.decode_bytes([tokenizer.bos_id]) == b""
    assert tokenizer.special_id(tokenizer.named["bos_token"]) == tokenizer.bos_id
    assert tokenizer.special_id("no such token") is None
    assert tokenizer.special_id("a") is None


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_refused(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    for token in (-1, 4096, 1 << 40):
        with pytest.raises(UserError, match="vocabulary ends at 4095"):
            tokenizer.decode([token])
    # The model may have rows that no tokenizer knows.
    assert tokenizer.decode_bytes([tokenizer.vocab_size, 4095]) == b""
    for token in range(tokenizer.vocab_size):
        tokenizer.decode_bytes([token])


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_unicode_is_one_line(loaded: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(UserError, match="at character 2, which is no character"):
        loaded[kind].encode("ab\udcff", bos=False)


# Parity with the libraries and with Transformers.


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_ids_are_the_librarys(tmp_path: Path, model_type: str) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, model_type), tiny_config())
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*SENTENCES[:5], *NASTY]:
        if "▁" not in text and not any(marker in text for marker in MARKERS):
            assert tokenizer.encode(text, bos=False) == library.encode(text), text
            assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (library.bos_id(), {library.eos_id()})
    # A double line end is user-defined too, but no marker: it is found in text as the library finds it.
    assert library.piece_to_id("\n\n") in tokenizer.encode("a\n\nb", bos=False)


def test_a_model_that_normalizes_text_is_followed(tmp_path: Path) -> None:
    """SentencePiece's default turns text into NFKC with single spaces: it comes back changed, by the model's design."""
    settings_ = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, user_defined_symbols=[], **settings_), tiny_config())
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("  Once   upon ", "ﬁne ①", "a\n\nb", "e\u0301"):
        ids = tokenizer.encode(text, bos=False)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_sentencepiece_metadata_say_which_symbols_are_special(tmp_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(
        model_proto=write_sentencepiece(tmp_path).joinpath("tokenizer.model").read_bytes()
    )
    user, end = (library.piece_to_id(marker) for marker in MARKERS)
    decoder = {
        str(user): {"content": MARKERS[0], "special": False},
        str(end): {"content": MARKERS[1], "special": True},
        "500": {"content": "<extra>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    assert tokenizer.special_id(MARKERS[0]) is None
    assert user in tokenizer.encode("x<|user|>", bos=False)
    assert tokenizer.special_id(MARKERS[1]) == end
    assert tokenizer.special_id("<extra>") == 500
    assert tokenizer.vocab_size == 501
    assert tokenizer.decode([user, end, 500, 450]) == MARKERS[0]


@pytest.mark.parametrize("legacy", [None, False, True])
def test_sentencepiece_with_special_tokens_is_as_in_transformers(tmp_path: Path, legacy: bool | None) -> None:
    settings_ = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings_.items() if value is not None})
    )
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, user_defined_symbols=MARKERS), tiny_config())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "<s>Once upon <|user|> a time</s>there was<|end|>\nx",
        "<s><|user|>\nHello there<|end|>\n<|user|>\n",
        "<s> [INST] One day [/INST] The dog</s><s> [INST] x",
    ):
        assert tokenizer.encode_parts(tokenizer.split_specials(text)) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("byte level", "metaspace"))])
def test_tokenizer_json_is_as_in_transformers(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path), tiny_config())
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*SENTENCES[:5], *NASTY]:
        # A leading space is lost in Metaspace, and U+2581 becomes one; ours keeps both.
        if "▁" not in text and not (text.startswith(" ") and "metaspace" in kind):
            expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert tokenizer.encode(text, bos=False) == expected
        if "▁" not in text:
            parts = tokenizer.split_specials(text)
            assert tokenizer.encode_parts(parts) == theirs.encode(text, add_special_tokens=False)
    text = "<s><|user|> Hello<|end|>  \n there</s>\n<|user|>x <think> y"
    assert tokenizer.encode_parts(tokenizer.split_specials(text)) == theirs.encode(text, add_special_tokens=False)
    ids = tokenizer.encode("Once upon a time", bos=tokenizer.add_bos)
    assert ids == theirs.encode("Once upon a time")
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_model_without_bos_gets_none(tmp_path: Path) -> None:
    """Qwen's config.json has a bos_token_id, its tokenizer says that there is none."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path, bos=False), tiny_config(bos=400))
    assert tokenizer.bos_id is None
    assert not tokenizer.add_bos
    assert tokenizer.encode("", bos=True) == []


def test_added_tokens_that_are_not_special_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path), tiny_config())
    ids = tokenizer.encode("<think>x", bos=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "<think>x"


def test_added_spaces_are_spaces(tmp_path: Path) -> None:
    """Gemma has added tokens of several spaces, written as its pieces are."""
    write_metaspace(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("▁▁▁", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    ids = [library.token_to_id("d"), library.token_to_id("▁▁▁"), library.token_to_id("d")]
    assert tokenizer.decode(ids) == library.decode(ids) == "d   d"
    check_text(tokenizer, "a▁▁▁b   c")


def test_a_token_that_metadata_call_special_is_special(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<think>"}))
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    assert tokenizer.eos_ids == {tokenizer.special_id("<think>")}
    check_text(tokenizer, "<think> and <s> and <|end|>")


def test_a_vocabulary_that_spells_special_tokens_makes_none_of_text(tmp_path: Path) -> None:
    """Unigram models find every piece of the vocabulary in text, special tokens too."""
    tokenizer = load_tokenizer(write_unigram(tmp_path), tiny_config())
    for text in ("a </s> b", "<s>", "<|user|>Hello<|end|>", " x  y"):
        check_text(tokenizer, text)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.encode("Once upon a time", bos=False) == theirs.encode("Once upon a time")


def test_merges_that_spell_a_special_token_make_none_of_text(tmp_path: Path) -> None:
    file = write_metaspace(tmp_path) / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for left, right in (("<", "s"), ("<s", ">")):
        for piece in (left, right, left + right):
            vocab.setdefault(piece, len(vocab) + 10)
        merges.insert(0 if left == "<" else 1, [left, right])
    file.write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    check_text(tokenizer, "a <s> b<s>")
    assert tokenizer.encode_parts([1, "x"])[0] == 1


def test_tiktoken_ids_are_the_librarys(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiktoken(tmp_path), tiny_config())
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.model"))
    library = tiktoken.Encoding("x", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in [*SENTENCES[:5], *NASTY]:
        assert tokenizer.encode(text, bos=False) == library.encode_ordinary(text)
    count = len(ranks)
    assert tokenizer.vocab_size == count + 256
    meta_layout = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eot_id|>": 9,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }
    for piece, offset in meta_layout.items():
        assert tokenizer.special_id(piece) == count + offset
    assert tokenizer.eos_ids == {count + 1, count + 8, count + 9}


@pytest.mark.parametrize("run", ["a", " ", "\n", "ab ", "é", "!"])
def test_a_very_long_text_is_encoded_in_time(loaded: dict[str, Tokenizer], run: str) -> None:
    text = run * (450_000 // len(run))
    for kind in ("tiktoken", "byte level", "sentencepiece bpe", "metaspace first"):
        tokenizer = loaded[kind]
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_llama2c_is_the_sentencepiece_model_that_it_was(tmp_path: Path) -> None:
    library = write_llama2c(tmp_path)
    tokenizer = load_tokenizer(tmp_path, tiny_config())
    for text in [*SENTENCES[:5], *NASTY]:
        if "▁" not in text:
            assert tokenizer.encode(text, bos=False) == library.encode(text)
    assert tokenizer.vocab_size == library.vocab_size()
    # Its models begin the next story, with BOS, where one ends.
    assert tokenizer.eos_ids == {1, 2}


def test_ends_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_metaspace(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    user, config = 392, tiny_config(eos=(7,))
    assert load_tokenizer(tmp_path, config).eos_ids == {7, 2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [user, 9999]}))
    assert load_tokenizer(tmp_path, config).eos_ids == {user, 2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": user}))
    assert load_tokenizer(tmp_path, config).eos_ids == {user, 2}


def test_add_bos_token_decides(tmp_path: Path) -> None:
    write_metaspace(tmp_path)
    for value in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": value}))
        assert load_tokenizer(tmp_path, tiny_config()).add_bos is value


# Which one it is, and what is wrong with it.


def refused(path: Path, vocab_size: int = 4096) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, tiny_config(vocab_size))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizer_json_comes_first_and_is_found_beside_a_file(tmp_path: Path) -> None:
    write_llama2c(tmp_path)
    (tmp_path / "stories.bin").touch()
    assert load_tokenizer(tmp_path / "stories.bin", tiny_config()).vocab_size == 420
    write_tiktoken(tmp_path)
    assert load_tokenizer(tmp_path, tiny_config()).named["bos_token"] == "<|begin_of_text|>"
    write_byte_level(tmp_path)
    assert load_tokenizer(tmp_path, tiny_config()).named["bos_token"] == "<s>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.bin"])
def test_other_files_are_told_for_what_they_are(tmp_path: Path, name: str) -> None:
    for data, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "is empty"),
        (b"hello world, no tokenizer", "is not"),
    ):
        (tmp_path / name).write_bytes(data)
        message = refused(tmp_path)
        assert name in message
        assert says in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_tokenizer_is_named(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path)
    file = next(tmp_path.glob("tokenizer.*"))
    data = file.read_bytes()
    for keep in (0.02, 0.3, 0.501, 0.93):
        file.write_bytes(data[: int(len(data) * keep)])
        message = error_of(tmp_path)
        if message is None:
            # Nothing marks the end of these: what is left of them may be a smaller one that is whole.
            assert kind in ("tiktoken", "llama2.c") or kind.startswith("sentencepiece")
        else:
            assert file.name in message


def error_of(path: Path) -> str | None:
    """What is wrong, in one line; None when nothing is."""
    try:
        load_tokenizer(path, tiny_config())
    except UserError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


def test_damage_never_escapes_as_anything_but_one_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    model = train_sentencepiece()
    refused_some = False
    for _ in range(60):
        damaged = bytearray(model)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        refused_some |= error_of(tmp_path) is not None
    assert refused_some


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    for write in (write_sentencepiece, write_byte_level, write_tiktoken, llama2c):
        directory = tmp_path / write.__name__
        directory.mkdir()
        write(directory)
        assert "but the model's vocabulary is 100; tokenizer and model do not belong together" in refused(
            directory, 100
        )
    # Special tokens beyond the vocabulary are another matter: a multimodal model's, of no use to its language model.
    tokenizer = load_tokenizer(tmp_path / "write_tiktoken", tiny_config(431 + 100))
    assert tokenizer.special_id("<|eot_id|>") is not None
    assert tokenizer.special_id("<|reserved_special_token_240|>") is None


def test_metadata_of_any_form_are_one_line_at_most(tmp_path: Path) -> None:
    write_metaspace(tmp_path)
    values = [None, 3, "x", "", [], {}, [1, None, "y"], {"a": 1}, {"content": 3}, {"1": {"content": "<s>"}}, True]
    keys = ["bos_token", "eos_token", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"]
    for value in values:
        for key in [*keys, "add_bos_token", "legacy"]:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}))
            error_of(tmp_path)
        for name, key in (("generation_config", "eos_token_id"), ("added_tokens", "<z>"), ("special_tokens_map", "x")):
            (tmp_path / f"{name}.json").write_text(json.dumps({key: value}))
            error_of(tmp_path)
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
            error_of(tmp_path)
            (tmp_path / f"{name}.json").unlink()


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    assert "no tokenizer here" in refused(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(treat_whitespace_as_suffix=True))
    assert "treat_whitespace_as_suffix" in refused(tmp_path)
    file = write_byte_level(tmp_path) / "tokenizer.json"
    data = json.loads(file.read_text())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    file.write_text(json.dumps(data))
    assert "joins tokens by WordPiece" in refused(tmp_path)
