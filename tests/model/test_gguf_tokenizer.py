"""The tokenizer in a GGUF file encodes as the one that it was made from, and as Transformers makes of the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from config.errors import UserError
from model.chat_template import load_chat_template
from model.gguf_file import read_gguf
from model.tokenizer import has_tokenizer, load_tokenizer
from model.tokenizer_gguf import WORDS, tokenizer_files
from tests.model.gguf_files import Tokens, byte_level_tokens, sentencepiece_tokens
from tests.model.tiny_tokenizers import MARKERS, NASTY, SENTENCES, tiny_config, write_sentencepiece

DEFAULT = Path(__file__).parents[2] / "model" / "default"
TEXTS = [*NASTY, *SENTENCES[:5], "Hello World's 12345 XMLHttpRequest über/unter\n\n  x", "don't I'LL WE'RE"]


def write_tokens(path: Path, tokens: Tokens, architecture: str = "llama") -> Path:
    """A file with a tokenizer alone."""
    writer = gguf.GGUFWriter(path, architecture)
    tokens(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# SentencePiece.


def test_the_built_in_models_tokenizer_is_the_same_from_gguf(tmp_path: Path) -> None:
    original = load_tokenizer(DEFAULT, tiny_config())
    special = json.loads((DEFAULT / "tokenizer_config.json").read_text())["added_tokens_decoder"].values()
    tokens = sentencepiece_tokens(DEFAULT, [token["content"] for token in special], add_space_prefix=False)
    found = load_tokenizer(write_tokens(tmp_path / "t.gguf", tokens), tiny_config())
    assert (found.bos_id, found.add_bos, found.vocab_size) == (original.bos_id, original.add_bos, original.vocab_size)
    assert found.eos_ids == original.eos_ids
    assert set(found.special_pieces) == set(original.special_pieces)
    assert found.special_id("<|user|>") == original.special_id("<|user|>") is not None
    for text in TEXTS:
        ids = original.encode(text, bos=True)
        assert found.encode(text, bos=True) == ids
        assert found.decode(ids) == original.decode(ids) == text
        assert found.split_specials(text) == original.split_specials(text)


@pytest.mark.parametrize("prefix", [True, False], ids=["space before", "no space"])
def test_pieces_that_are_found_whole_are_found_whole(prefix: bool, tmp_path: Path) -> None:
    write_sentencepiece(
        tmp_path, add_dummy_prefix=prefix, user_defined_symbols=[*MARKERS, "\n\n", "▁▁", "▁▁▁▁", "<h1>", "</h1>"]
    )
    settings = {"added_tokens_decoder": {}}
    (tmp_path / "config.json").write_text("{}")
    ids = load_tokenizer(tmp_path, tiny_config())
    pieces = {piece: ids.special_id(piece) for piece in ("<h1>", "</h1>")}
    settings["added_tokens_decoder"] = {str(i): {"content": piece, "special": False} for piece, i in pieces.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    original = load_tokenizer(tmp_path, tiny_config())
    tokens = sentencepiece_tokens(
        tmp_path, MARKERS, ["\n\n", "▁▁", "▁▁▁▁", "<h1>", "</h1>"], padding=3, add_space_prefix=prefix
    )
    found = load_tokenizer(write_tokens(tmp_path / "t.gguf", tokens), tiny_config())
    assert found.special_id("<h1>") is None
    for text in [*TEXTS, "a  b     c", "<h1>A title</h1>\n\n"]:
        ids = original.encode(text, bos=False)
        assert found.encode(text, bos=False) == ids
        assert found.decode(ids) == original.decode(ids)


def test_old_files_that_call_markers_text_are_understood(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    tokens = sentencepiece_tokens(tmp_path, [], MARKERS)
    found = load_tokenizer(write_tokens(tmp_path / "t.gguf", tokens), tiny_config())
    assert set(MARKERS) < set(found.special_pieces)
    assert found.eos_ids == {2, found.special_id("<|end|>")}


def test_phi_3s_special_tokens_swallow_what_follows(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    tokens = sentencepiece_tokens(tmp_path, MARKERS)
    for architecture, after in (("llama", "\nhi"), ("phi3", "hi")):
        found = load_tokenizer(write_tokens(tmp_path / f"{architecture}.gguf", tokens, architecture), tiny_config())
        assert found.split_specials("<|user|>\nhi<|end|>")[1] == after


# Bytes that are merged.


def trained(pre: str, path: Path) -> Path:
    """A tokenizer.json whose words are those of `pre`, with tokens as today's models have them."""
    words = WORDS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=words.whole_words))
    steps = [step for step in words.steps if step["type"] == "Digits"]
    splits = [pre_tokenizers.Digits(individual_digits=True) for _ in steps]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, *TEXTS], trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    def make(pre: str, **values: bool | int) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp(pre)
        (directory / "source").mkdir()  # Transformers would prefer a tokenizer.json beside the file
        file = trained(pre, directory / "source")
        ids = Tokenizer.from_file(str(file))
        named = {f"{name}_token_id": ids.token_to_id(piece) for name, piece in
                 (("bos", "<|begin_of_text|>"), ("eos", "<|im_end|>"))}  # fmt: skip
        return file, write_tokens(directory / "t.gguf", byte_level_tokens(file, pre, 5, **named, **values))

    return make


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "refact"])
def test_bytes_are_merged_as_in_the_tokenizer_that_the_file_was_made_from(pre: str, made: Any) -> None:
    source, file = made(pre, add_bos_token=False)
    original, found = load_tokenizer(source, tiny_config()), load_tokenizer(file, tiny_config())
    assert set(found.special_pieces) == set(original.special_pieces)
    assert not found.add_bos
    assert found.eos_ids == {found.special_id("<|im_end|>")}
    for text in [*TEXTS, "<think>a</think>"]:
        ids = original.encode(text, bos=False)
        assert found.encode(text, bos=False) == ids
        assert found.decode(ids) == text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "dbrx", "tekken", "gpt-4o"])
def test_bytes_are_merged_as_transformers_does(pre: str, made: Any) -> None:
    _, file = made(pre)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = load_tokenizer(file, tiny_config())
    assert found.add_bos is (pre in ("llama-bpe", "tekken"))
    for text in TEXTS:
        if WORDS[pre].nfc and "e\u0301" in text:
            continue  # Qwen's own tokenizer composes characters, which Transformers forgets here
        if not any(piece in text for piece in found.special_pieces):
            assert found.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False), text
        ids = found.encode(text, bos=False)
        assert found.decode(ids) == text


def test_the_words_of_a_kind_are_cut_as_published(tmp_path: Path) -> None:
    """Where the kinds differ: digits, contractions, capitals, line ends."""
    text = "I'LL see XMLHttp 12345/67\n\n"
    expected = {
        "gpt-2": ["I", "'", "LL", " see", " XMLHttp", " 12345", "/", "67", "\n\n"],
        "smollm": ["I", "'", "LL", " see", " XMLHttp", " ", "1", "2", "3", "4", "5", "/", "6", "7", "\n\n"],
        "llama-bpe": ["I", "'LL", " see", " XMLHttp", " ", "123", "45", "/", "67", "\n\n"],
        "qwen2": ["I", "'LL", " see", " XMLHttp", " ", "1", "2", "3", "4", "5", "/", "6", "7", "\n\n"],
        "tekken": ["I", "'LL", " see", " XMLHttp", " ", "1", "2", "3", "4", "5", "/", "6", "7", "\n\n"],
        "gpt-4o": ["I'LL", " see", " XMLHttp", " ", "123", "45", "/", "67", "\n\n"],
    }
    for pre, words in expected.items():
        file = write_tokens(tmp_path / f"{pre}.gguf", byte_level_tokens(trained(pre, tmp_path), pre))
        data = tokenizer_files(read_gguf(file)).data
        cut = Tokenizer.from_str(data.decode()).pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in cut] == words, pre


def test_what_is_added_is_kept_whole_and_what_is_special_is_not_made_of_text(made: Any) -> None:
    _, file = made("qwen2")
    found = load_tokenizer(file, tiny_config())
    ids = found.encode("<think>x<|im_end|>", bos=False)
    assert found.special_id("<think>") is None
    assert found.special_id("<|im_end|>") not in ids
    assert found.decode(ids[:1]) == "<think>"


# What is recommended, and what there is not.


def test_sampling_and_template_are_those_of_the_file(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    tokens = sentencepiece_tokens(tmp_path, MARKERS)

    def more(writer: gguf.GGUFWriter) -> None:
        tokens(writer)
        writer.add_chat_template("{{ messages }}")
        writer.add_sampling_temp(0.6)
        writer.add_sampling_top_k(20)

    files = tokenizer_files(read_gguf(write_tokens(tmp_path / "t.gguf", more)))
    assert files.settings["chat_template"] == "{{ messages }}"
    assert {key: files.generation[key] for key in ("temperature", "top_k")} == {"temperature": 0.6, "top_k": 20}


def test_conversations_are_written_by_the_file_s_templates(tmp_path: Path) -> None:
    tokens = sentencepiece_tokens(write_sentencepiece(tmp_path), MARKERS)
    (tmp_path / "chat_template.jinja").write_text("that of a directory")
    named = [{"name": name, "template": f"{name} {{{{ messages[0].content }}}}"} for name in ("tool_use", "default")]

    def said(template: str | list[dict[str, str]], tools: list[Any] | None = None) -> str:
        def more(writer: gguf.GGUFWriter) -> None:
            tokens(writer)
            writer.add_chat_template(template)

        file = write_tokens(tmp_path / "model.gguf", more)
        tokenizer = load_tokenizer(file, tiny_config())
        loaded = load_chat_template(file, tokenizer, tiny_config())
        assert loaded.origin == "its own"
        return tokenizer.decode(loaded.render([{"role": "user", "content": "Hi <|end|>"}], tools=tools))

    assert said("one {{ messages[0].content }}", tools=[]) == "one Hi <|end|>"
    assert said(named) == "default Hi <|end|>"
    assert said(named, tools=[]) == "tool_use Hi <|end|>"
    listed = tokenizer_files(read_gguf(tmp_path / "model.gguf")).settings["chat_template"]
    assert sorted(listed, key=str) == sorted(named, key=str)


def test_a_file_without_a_tokenizer_takes_the_one_beside_it(tmp_path: Path) -> None:
    def none(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("no_vocab")

    file = write_tokens(tmp_path / "t.gguf", none)
    assert not has_tokenizer(file)
    write_sentencepiece(tmp_path)
    assert has_tokenizer(file)
    assert load_tokenizer(file, tiny_config()).encode("a dog", bos=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; only llama and gpt2 can be read here"),
        ({"pre": None}, "tokenizer.ggml.pre does not say how text is cut into words"),
        ({"pre": "default"}, "does not say how text is cut into words"),
        ({"pre": "qwen9"}, "tokenizer.ggml.pre is 'qwen9'; known here are gpt-2"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"types": [1]}, "tokenizer.ggml.token_type has 1 entries, not 3"),
        ({"types": ["x", "y", "z"]}, "tokenizer.ggml.token_type is"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a zz"]}, "is no tokenizer.json, or damaged"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    right = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"]}
    values = right | change

    def tokens(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(values["model"])
        for key, name in (("tokens", "tokens"), ("types", "token_type"), ("merges", "merges")):
            if values[key] is not None:
                writer.add_array(f"tokenizer.ggml.{name}", values[key])
        if values["pre"] is not None:
            writer.add_tokenizer_pre(values["pre"])

    file = write_tokens(tmp_path / "t.gguf", tokens)
    with pytest.raises(UserError) as caught:
        load_tokenizer(file, tiny_config())
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
