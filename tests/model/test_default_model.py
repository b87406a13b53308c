"""The embedded model: its files are whole and small, are what Transformers reads, and predict unseen text as claimed.

The bits per character are computed by the engine's own model on texts that were held out of the training; a model of
this size with other weights does not come near the bound.
"""

import json
import math
import subprocess
import sys
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.default
from model.chat_template import ChatTemplate, load_chat_template
from model.config import load_config
from model.default.corpus import TINY_SOURCES, Example, is_held_out, load_corpus, read_corpus
from model.default.evaluate import QUESTIONS, bits_per_character, load, test_parts
from model.default.export import export
from model.kv_cache import KVCache
from model.loader import load_weights
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from tests.model.tiny_tokenizers import NASTY, SENTENCES

DEFAULT = Path(model.default.__file__).parent
ROOT = DEFAULT.parent.parent
EXPORTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HELD_OUT = "held_out.json"
MOST_BYTES = 16_000_000
MOST_BITS = 0.80
LONGEST_REPLY = 48  # tokens of small talk
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside with her red ball."
test_parts.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name


@pytest.fixture(scope="module")
def ours() -> Transformer:
    with torch.device("meta"):
        network = Transformer(load_config(DEFAULT))
    load_weights(network, DEFAULT, torch.device("cpu"), torch.float32)
    return network.eval()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEFAULT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEFAULT, load_config(DEFAULT))


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEFAULT)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return load_chat_template(DEFAULT, tokenizer, load_config(DEFAULT))


@pytest.fixture(scope="module")
def unseen() -> list[Example]:
    """The first twenty held-out stories of either source of TinyStories, in the order of the corpus."""
    held_out = (e for e in read_corpus() if e.source in TINY_SOURCES and is_held_out(e))
    return [story for _, group in groupby(held_out, lambda e: e.source) for story in islice(group, 20)]


def new_cache(network: Transformer) -> KVCache:
    return KVCache.create(network.config, 1, 1024, torch.device("cpu"), torch.float32)


def logits_of(network: Transformer, cache: KVCache, ids: list[int], start: int = 0) -> Tensor:
    """Logits [T, V] of ids that stand at the position `start`."""
    slots = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        logits: Tensor = network(torch.tensor([ids]), slots + start, cache, slots, start + len(ids))
    return logits[0]


def greedy(network: Transformer, ids: list[int], most: int, ends: frozenset[int]) -> list[int]:
    """The likeliest tokens after `ids`, the end token included, at most so many."""
    cache, made, piece, start = new_cache(network), list[int](), ids, 0
    while len(made) < most and not ends.intersection(made):
        token = int(logits_of(network, cache, piece, start)[-1].argmax())
        made.append(token)
        start, piece = start + len(piece), [token]
    return made


def ask(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_the_files_are_there_and_small() -> None:
    """Everything a user is given besides code: weights, tokenizer, settings, log, README; the corpora stay apart."""
    files = [file for file in DEFAULT.iterdir() if file.is_file() and file.suffix != ".py"]
    assert {*EXPORTED, HELD_OUT, "README.md", "training_log.json"} == {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_the_config_is_a_plain_llama() -> None:
    config = json.loads((DEFAULT / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert not {"rope_scaling", "rope_parameters", "auto_map", "quantization_config"} & config.keys()
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert config["attention_bias"] is config["mlp_bias"] is False


def test_the_files_are_what_the_trainer_exports(tmp_path: Path) -> None:
    """Reading them and writing them again changes no byte, so that none was edited by hand."""
    exported, vocabulary = load(DEFAULT)
    export(exported, vocabulary, tmp_path)
    for name in EXPORTED:
        assert (tmp_path / name).read_bytes() == (DEFAULT / name).read_bytes(), name


def test_the_logits_are_those_of_transformers(ours: Transformer, theirs: Any, tokenizer: Tokenizer) -> None:
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = tokenizer.encode(" ".join([STORY] * 8), bos=True)
    assert len(ids) > 128
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(ours, new_cache(ours), ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [STORY, ""])
def test_greedy_text_is_that_of_transformers(ours: Transformer, theirs: Any, tokenizer: Tokenizer, prompt: str) -> None:
    ids = tokenizer.encode(prompt, bos=True)
    made = greedy(ours, ids, 40, tokenizer.eos_ids)
    # The directory's generation_config sets a penalty, which Transformers applies to greedy decoding too.
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, repetition_penalty=1.0, max_new_tokens=40)
    assert ids + made == expected[0].tolist()


@pytest.mark.parametrize("text", [*NASTY, SENTENCES[0], STORY, 'He said, "Hi!"\n\nThe end.'])
def test_text_is_tokenized_as_by_transformers_and_comes_back(
    tokenizer: Tokenizer, their_tokenizer: Any, text: str
) -> None:
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not {tokenizer.special_id(piece) for piece in tokenizer.special_pieces} & set(ids)
    assert tokenizer.encode(text, bos=True) == [1, *ids]
    if "▁" not in text:  # a space to Transformers; ours keeps it
        assert their_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids


def test_transformers_begins_and_decodes_alike(tokenizer: Tokenizer, their_tokenizer: Any) -> None:
    ids = their_tokenizer(STORY)["input_ids"]
    assert ids == tokenizer.encode(STORY, bos=tokenizer.add_bos)
    assert ids[0] == tokenizer.bos_id
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == STORY
    assert tokenizer.eos_ids == {their_tokenizer.eos_token_id}
    assert their_tokenizer.model_max_length == load_config(DEFAULT).max_position_embeddings


@pytest.mark.parametrize(
    "messages",
    [
        ask("Hello! How are you?"),
        ask("  Hi\n", " Hello! \n", "Tell me a story.\n\nA long one!", "Once upon a time…", "naïve 日本 👍🏽"),
        [{"role": "system", "content": "You are kind."}, *ask("Hi", "Hello!", "Who are you?")],
        ask("", ""),
    ],
)
def test_the_template_is_rendered_as_by_transformers(
    template: ChatTemplate, their_tokenizer: Any, messages: list[dict[str, str]]
) -> None:
    for prompt in (True, False):
        ids = template.render(messages, add_generation_prompt=prompt)
        expected = their_tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == expected
        assert ids.count(1) == 1


@pytest.mark.parametrize("question", [q[0] for q in QUESTIONS if "story" not in q[0]])
def test_small_talk_is_answered_and_ends(
    ours: Transformer, tokenizer: Tokenizer, template: ChatTemplate, question: str
) -> None:
    reply = greedy(ours, template.render(ask(question)), LONGEST_REPLY, tokenizer.eos_ids)
    assert reply[-1] in tokenizer.eos_ids
    text = tokenizer.decode(reply)
    assert text[0].isupper()
    assert text[-1] in ".!?"
    assert len(text.split()) > 1


def test_unseen_stories_take_under_080_bits_per_character(
    ours: Transformer, tokenizer: Tokenizer, unseen: list[Example]
) -> None:
    assert len(unseen) == 40
    nats, cache = 0.0, new_cache(ours)
    for story in unseen:
        ids = [*tokenizer.encode(story.messages[0][1], bos=True), *tokenizer.eos_ids]
        logits = logits_of(ours, cache, ids[:-1])
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    bits = nats / math.log(2) / sum(story.characters for story in unseen)
    assert bits < MOST_BITS
    trained, vocabulary = load(DEFAULT)
    part = test_parts(vocabulary, {TINY_SOURCES[0]: unseen}, batch_tokens=2048, context=1024)["tinystories"]
    assert bits_per_character([trained], part, half=False) == pytest.approx(bits, abs=1e-4)


def test_nothing_held_out_is_trained_on() -> None:
    corpus = load_corpus(seed=1)
    examples = [example for group in corpus.train.values() for example in group]
    held_out = {example.messages for group in corpus.held_out.values() for example in group}
    stories = {messages[0][1] for messages in held_out if messages[0][0] == "story"}
    assert len(stories) > 200
    assert held_out.isdisjoint(example.messages for example in examples)
    # Requests for stories hold stories; small talk is strung together from whole exchanges.
    assert stories.isdisjoint(content for example in examples for _, content in example.messages)


def test_the_readme_tells_what_the_log_says() -> None:
    readme = (DEFAULT / "README.md").read_text(encoding="utf-8")
    log = json.loads((DEFAULT / "training_log.json").read_text())
    student, teachers = log["held_out_bits_per_character"], log["teachers_held_out_bits_per_character"]
    assert student["tinystories"] < MOST_BITS
    for row, bits in student.items():
        assert f"{bits:.4f} | {teachers[row]:.4f} |" in readme, row
    assert f"{log['parameters']:,}" in readme
    config = load_config(DEFAULT)
    assert config.vocab_size == log["recipe"]["vocab_size"]
    assert config.hidden_size == log["recipe"]["student_dim"]


@pytest.mark.slow
def test_every_stage_of_the_training_runs(tmp_path: Path) -> None:
    """The whole recipe at a toy size, in seconds of one core: it writes a model that loads, and says what it did."""
    command = [sys.executable, "-m", "model.default.train", "--smoke", "--device", "cpu", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted((*EXPORTED, "training_log.json"))
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log["curves"].keys() == {"teacher 0", "teacher 1", "student"}
    for curve in log["curves"].values():
        assert curve[-1]["tinystories"] < curve[0]["tinystories"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.num_parameters() == log["parameters"]
