"""Held-out bits per character and unpicked samples of an exported model: `python3 -m model.default.evaluate`.

Bits per character: the negative log2-likelihood of every token after BOS (end of text and marks of turns included),
summed over a text and divided by its characters (the marks count none). A text longer than the context is cut into
windows; each begins with the last token of the one before.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model.default.batches import IGNORED, Batch, pack, split
from model.default.corpus import TINY_SOURCES, Example, load_corpus
from model.default.llama import Llama, Shape, from_hugging_face, mean_probs
from model.default.sample import SampleSettings, sample
from model.default.vocabulary import BOS, EOS, Vocabulary

PROMPTS = (
    "",
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the park. They saw a big",
    "One day, a small bird found a shiny key in the grass.",
)
QUESTIONS = (
    ("Hello! How are you?",),
    ("Hi! What do you like to do for fun?",),
    ("Tell me a story.",),
    ("Tell me a story about a cat and a red ball.",),
    ("Who are you?",),
    ("I love music. Do you?",),
    ("What is your favorite food?",),
    ("Hello!", "I'm good. What about you?", "Thank you!"),
)


@dataclass(frozen=True)
class TestPart:
    """The held-out texts of one row of the results table, packed, and how many characters they have."""

    batches: list[Batch]
    characters: int


def test_parts(
    vocabulary: Vocabulary, held_out: dict[str, list[Example]], batch_tokens: int, context: int
) -> dict[str, TestPart]:
    """Every row of the results table, and "tinystories" for both of its sources together."""
    rows = dict(sorted(held_out.items()))
    rows["tinystories"] = [e for source in TINY_SOURCES for e in held_out.get(source, [])]
    parts = {}
    for row, examples in rows.items():
        documents = [d for ids in vocabulary.encode_all(examples) for d in split(ids, context)]
        characters = sum(e.characters for e in examples)
        if characters:
            parts[row] = TestPart(pack(documents, batch_tokens, context), characters)
    return parts


@torch.no_grad()
def bits_per_character(models: Sequence[Llama], part: TestPart, half: bool) -> float:
    """Bits per character over all texts of the part together, by the mean of the models' probabilities.

    half: compute in bfloat16.
    """
    device = models[0].embedding.device
    nats = torch.zeros((), device=device)
    for batch in part.batches:
        moved = batch.to(device)
        nats += F.nll_loss(mean_probs(models, moved, half).log(), moved.targets, ignore_index=IGNORED, reduction="sum")
    return float(nats) / math.log(2) / part.characters


def load(folder: Path) -> tuple[Llama, Vocabulary]:
    """The exported model, in float32, and its vocabulary."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
    )
    vocabulary = Vocabulary((folder / "tokenizer.model").read_bytes())
    return from_hugging_face(load_file(folder / "model.safetensors"), shape), vocabulary


def unpicked_samples(model: Llama, vocabulary: Vocabulary, seed: int) -> str:
    """A story for each prompt and a transcript for each list of questions, as Markdown; nothing is chosen by hand."""
    generator = torch.Generator(device=model.embedding.device).manual_seed(seed)
    longest = model.shape.context * 2 // 5

    def answer(ids: list[int]) -> list[int]:
        ids = ids[-longest:]
        settings = SampleSettings(length=len(ids) + longest, temperature=0.7, min_p=0.05)
        return sample(model, [ids], settings, EOS, generator)[0][len(ids) :]

    def quoted(ids: list[int]) -> str:
        return "\n".join(f"> {line}".rstrip() for line in vocabulary.decode(ids).split("\n"))

    parts = []
    for prompt in PROMPTS:
        ids = [BOS, *vocabulary.pieces.encode(prompt)]
        parts += [f"Prompt: {json.dumps(prompt)}", quoted(answer(ids))]
    for questions in QUESTIONS:
        ids = [BOS]
        for question in questions:
            ids += [vocabulary.user, *vocabulary.pieces.encode(question), vocabulary.assistant]
            reply = answer(ids)
            parts += [f"User: {question}", quoted(reply)]
            ids += reply
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the exported model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--limit", type=int, default=0, help="at most so many held-out texts of a kind (0: all)")
    arguments = parser.parse_args()
    model, vocabulary = load(arguments.model)
    held_out = load_corpus(seed=0).held_out
    if arguments.limit:
        held_out = {row: part[: arguments.limit] for row, part in held_out.items()}
    for row, part in test_parts(vocabulary, held_out, batch_tokens=2048, context=model.shape.context).items():
        print(f"{row:22} {bits_per_character([model], part, half=False):.4f} bits per character")
    print("\n" + unpicked_samples(model, vocabulary, arguments.seed))


if __name__ == "__main__":
    main()
