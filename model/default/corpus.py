"""The training text: reads the packed corpora, holds some of it out and shapes examples from the rest.

Knows sources, splits and groups; knows no tokens and no tensors.
"""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model.default.smalltalk import GREETINGS, SMALL_TALK, STORY_REQUESTS, TOPIC_REQUESTS, Intent

CORPUS = Path(__file__).parent / "corpus"
HELD_OUT_IN = 25  # one text in so many is held out
TINY_SOURCES = ("tinystories_cased", "tinystories_recased")

Message = tuple[str, str]  # (role, content)


@dataclass(frozen=True)
class Example:
    """One text to learn from or to be tested on: a story, or a dialogue of alternating user and assistant turns."""

    source: str
    messages: tuple[Message, ...]  # a story is one message of the role "story"

    @property
    def is_story(self) -> bool:
        return self.messages[0][0] == "story"

    @property
    def characters(self) -> int:
        return sum(len(content) for _, content in self.messages)


def is_held_out(example: Example) -> bool:
    """Whether the text is for testing only: SHA-256 of its contents, joined by line breaks, modulo HELD_OUT_IN is 0."""
    digest = hashlib.sha256("\n".join(content for _, content in example.messages).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


def read_corpus(folder: Path = CORPUS) -> list[Example]:
    """Every story and dialogue of the corpus, in file order."""
    examples = []
    with gzip.open(folder / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            examples.append(Example(item["source"], (("story", item["text"]),)))
    with gzip.open(folder / "chat.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            examples.append(Example(item["source"], tuple((m["role"], m["content"]) for m in item["messages"])))
    return examples


def results_row(example: Example) -> str:
    """The row of the results table that a held-out example counts in."""
    if example.source in TINY_SOURCES:
        return example.source
    if example.is_story:
        return "other_stories"
    return "self_dialogue" if example.source.startswith("self_dialogue") else "small_talk"


def is_small_talk(example: Example) -> bool:
    """Whether it is a ChatterBot exchange that is small talk rather than a quiz."""
    return example.source.startswith("chatterbot") and not example.source.endswith(("trivia", "sports", "history"))


def story_subject(text: str) -> str | None:
    """What a story is about, for a request: "a little girl named Lily", "a boat"; None if its opening does not say."""
    opening = " ".join(re.split(r"(?<=[.!?])\s+", text, maxsplit=2)[:2])
    thing, after = r"(an? [a-z]+(?: [a-z]+){0,2}?)", r"(?= (?:named|called|who|that)\b|[,.!]| and )"
    being = re.search(rf"\b(?:was|lived|were) {thing}{after}", opening)
    name = re.search(r"\b(?:named|called) ([A-Z][a-z]+)\b", opening)
    if being and name:
        return f"{being[1]} named {name[1]}"
    if being or name:
        return being[1] if being else name[1] if name else None
    return None


def ask_for_story(story: Example, rng: random.Random) -> Example:
    """The story as an assistant's answer, with a request for it and sometimes small talk before and after."""
    text = story.messages[0][1]
    subject = story_subject(text)
    if subject and rng.random() < 0.6:
        request = rng.choice(TOPIC_REQUESTS).format(subject=subject)
    else:
        request = rng.choice(STORY_REQUESTS)
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages += _exchange(rng.choice(GREETINGS), rng)
    messages += [("user", request), ("assistant", text)]
    if rng.random() < 0.25:
        messages += _exchange(SMALL_TALK["thanks"], rng)
    return Example("asked", tuple(messages))


def small_talk_dialogue(pairs: list[Example], rng: random.Random) -> Example:
    """A short dialogue strung together from our own exchanges and single question-answer pairs of the corpus."""
    messages: list[Message] = []
    if rng.random() < 0.5:
        messages += _exchange(rng.choice(GREETINGS), rng)
    intents = list(SMALL_TALK.values())
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            messages += _exchange(rng.choice(intents), rng)
        else:
            messages += rng.choice(pairs).messages
    return Example("small_talk", tuple(messages))


def _exchange(intent: Intent, rng: random.Random) -> list[Message]:
    asked, answers = intent
    return [("user", rng.choice(asked)), ("assistant", rng.choice(answers))]


@dataclass(frozen=True)
class Corpus:
    """train: examples by group (what the mixture weighs); held_out: examples by row of the results table."""

    train: dict[str, list[Example]]
    held_out: dict[str, list[Example]]


def load_corpus(seed: int, keep: float = 1.0) -> Corpus:
    """Split and shape the corpus; keep < 1 takes that share of it (a smoke test)."""
    rng = random.Random(seed)
    everything = [e for e in read_corpus() if keep >= 1 or rng.random() < keep]
    held_out: dict[str, list[Example]] = {}
    for example in filter(is_held_out, everything):
        held_out.setdefault(results_row(example), []).append(example)

    rest = [e for e in everything if not is_held_out(e)]

    def having(wanted: Callable[[Example], bool]) -> list[Example]:
        return [e for e in rest if wanted(e)]

    tiny = having(lambda e: e.source in TINY_SOURCES)
    bot = having(is_small_talk)
    persona = having(lambda e: e.source == "synthetic_persona_chat")
    train = {
        "tiny": tiny,
        "tales": having(lambda e: e.is_story and e.source not in TINY_SOURCES),
        "asked": [ask_for_story(story, rng) for story in tiny],
        "persona": persona,
        "small_talk": bot + [small_talk_dialogue(bot, rng) for _ in range(3 * len(bot))],
        "topics": having(lambda e: e.source.startswith(("self_dialogue", "chatterbot")) and not is_small_talk(e)),
    }
    return Corpus(train, held_out)


def texts_for_tokenizer(corpus: Corpus, seed: int) -> Iterator[str]:
    """Stories, small talk and a tenth of the long topical chat: what the vocabulary should be good at."""
    rng = random.Random(seed)
    for group in ("tiny", "tales", "persona", "small_talk"):
        for example in corpus.train[group]:
            yield from (content for _, content in example.messages)
    for example in corpus.train["topics"]:
        if rng.random() < 0.1:
            yield from (content for _, content in example.messages)
