"""Trains the embedded default model from the corpora in this folder: `python3 -m model.default.train`.

The recipe: a SentencePiece tokenizer; a few large, strongly regularized teachers; texts that the teachers write; a
small student that learns the teachers' probabilities on real and written texts, exported in Hugging Face form.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.default.batches import Batch, Document, Mixture, split
from model.default.corpus import Corpus, load_corpus, texts_for_tokenizer
from model.default.distill import hard_loss, label, soft_loss, write_texts
from model.default.evaluate import bits_per_character, load, test_parts, unpicked_samples
from model.default.export import export
from model.default.llama import Llama, Shape
from model.default.optimizer import MuonAdamW, learning_rate
from model.default.vocabulary import UNK, Vocabulary, train_tokenizer

# Share of each group in the tokens of a batch, at the start and at the end of training (linear in between).
SHARES = {
    "tiny": (0.25, 0.60),
    "asked": (0.05, 0.10),
    "tales": (0.20, 0.08),
    "persona": (0.13, 0.12),
    "small_talk": (0.04, 0.04),
    "topics": (0.33, 0.06),
}
FOCUS = ("tiny", "asked", "persona", "small_talk")  # groups that the student's training ends on
STUDENT_FOCUS = (0.6, 0.95)  # share of batches from the focus, at the start and at the end
CURVE_POINTS = 8
CURVE_ROWS = ("tinystories", "small_talk")


@dataclass(frozen=True)
class Recipe:
    """Every number of a run; each is a flag of the same name."""

    seed: int = 1
    vocab_size: int = 4096
    context: int = 1024
    batch_tokens: int = 32768
    lr: float = 0.02
    embedding_lr: float = 0.004
    teachers: int = 3  # 0: no distillation, the student learns from the corpus alone
    teacher_dim: int = 640
    teacher_layers: int = 8
    teacher_heads: int = 10
    teacher_hidden: int = 1728
    teacher_dropout: float = 0.15
    teacher_weight_decay: float = 1.0
    teacher_masking: float = 0.0  # share of the input tokens that are hidden
    teacher_tokens: float = 30e6
    written_stories: float = 8e6  # tokens
    written_chats: float = 3e6
    writing_rows: int = 4096
    topic_tokens: float = 2e6  # of the long topical chat, for the student
    top: int = 32
    hard_weight: float = 0.1
    student_dim: int = 256
    student_layers: int = 8
    student_heads: int = 4
    student_hidden: int = 768
    student_dropout: float = 0.0
    student_weight_decay: float = 0.1
    student_tokens: float = 130e6
    keep: float = 1.0  # share of the corpus that is used


SMOKE = Recipe(
    vocab_size=600, context=128, batch_tokens=1024, teachers=2, teacher_dim=32, teacher_layers=2, teacher_heads=2,
    teacher_hidden=64, teacher_tokens=8e3, written_stories=1e3, written_chats=1e3, writing_rows=4, topic_tokens=2e3,
    student_dim=32, student_layers=2, student_heads=2, student_hidden=64, student_tokens=8e3, keep=0.01,
)  # fmt: skip


class Run:
    """What the stages share: recipe, device, data, and the log that ends up in training_log.json."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.began = time.monotonic()
        self.log: dict[str, Any] = {"recipe": asdict(recipe), "torch": torch.__version__, "curves": {}, "seconds": {}}
        if device.type == "cuda":
            self.log["device"] = torch.cuda.get_device_name(device)
        torch.manual_seed(recipe.seed)
        torch.set_float32_matmul_precision("high")
        self.corpus: Corpus = load_corpus(recipe.seed, recipe.keep)
        self.vocabulary = Vocabulary(train_tokenizer(texts_for_tokenizer(self.corpus, recipe.seed), recipe.vocab_size))
        self.groups = {
            name: [d for ids in self.vocabulary.encode_all(examples) for d in split(ids, recipe.context)]
            for name, examples in self.corpus.train.items()
        }
        self.tests = test_parts(self.vocabulary, self.corpus.held_out, recipe.batch_tokens, recipe.context)
        sizes = {name: sum(len(d.ids) for d in documents) for name, documents in self.groups.items()}
        self.log["group_tokens"] = sizes
        self.say(f"tokens by group: {sizes}")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def results(self, models: Sequence[Llama], rows: Iterable[str] | None = None) -> dict[str, float]:
        """Held-out bits per character, in bfloat16 on a GPU; rows: of the results table, all unless given."""
        chosen = self.tests if rows is None else [row for row in rows if row in self.tests]
        return {row: bits_per_character(models, self.tests[row], half=self.on_gpu) for row in chosen}


def train(
    run: Run,
    name: str,
    model: Llama,
    weight_decay: float,
    masking: float,
    tokens: float,
    next_batch: Callable[[float], Batch],
    loss: Callable[[Tensor, Tensor, Batch], Tensor],
) -> None:
    """Train the model in place on batches asked for by progress (0..1); log the held-out curve and the time."""
    recipe, began = run.recipe, time.monotonic()
    optimizer = MuonAdamW(model, recipe.lr, weight_decay, recipe.embedding_lr)
    if run.on_gpu:
        model.compile_blocks()
        loss = torch.compile(loss, dynamic=False)
    steps = max(1, int(tokens / recipe.batch_tokens))
    curve: list[dict[str, Any]] = []
    model.train()
    for step in range(steps):
        batch = next_batch(step / steps).to(run.device)
        if masking:
            masked = torch.rand(batch.tokens.shape, device=run.device) < masking
            batch = replace(batch, tokens=batch.tokens.masked_fill(masked & (batch.positions > 0), UNK))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu):
            value = loss(model(batch), model.embedding, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step(learning_rate((step + 1) / (steps + 1)))
        if (step + 1) * CURVE_POINTS // steps > step * CURVE_POINTS // steps:
            held_out = run.results([model], CURVE_ROWS)
            curve.append({"tokens": (step + 1) * recipe.batch_tokens, "loss": value.item(), **held_out})
            spent = time.monotonic() - began
            scores = " ".join(f"{row} {bits:.4f}" for row, bits in held_out.items())
            run.say(f"{name} {step + 1}/{steps} {spent:.1f} s, loss {value.item():.4f}, bits per character: {scores}")
    run.log["curves"][name] = curve
    run.log["seconds"][name] = time.monotonic() - began


def shares_at(progress: float) -> dict[str, float]:
    return {name: first + (last - first) * progress for name, (first, last) in SHARES.items()}


def new_mixture(run: Run, seed: int) -> Callable[[float], Batch]:
    mixture = Mixture(run.groups, run.recipe.batch_tokens, run.recipe.context, seed)
    return lambda progress: mixture.next_batch(shares_at(progress))


def train_teacher(run: Run, index: int) -> Llama:
    """One teacher; teachers differ in their initial weights and in the order of their data."""
    recipe = run.recipe
    shape = Shape(
        run.vocabulary.size, recipe.teacher_dim, recipe.teacher_layers, recipe.teacher_heads, recipe.teacher_hidden,
        recipe.context,
    )  # fmt: skip
    torch.manual_seed(recipe.seed + index)
    teacher = Llama(shape, recipe.teacher_dropout).to(run.device)
    mixture = new_mixture(run, recipe.seed + index)
    decay, masking, tokens = recipe.teacher_weight_decay, recipe.teacher_masking, recipe.teacher_tokens
    train(run, f"teacher {index}", teacher, decay, masking, tokens, mixture, hard_loss)
    return teacher


def student_batches(run: Run, teachers: list[Llama]) -> Callable[[float], Batch]:
    """Let the teachers write and label; the student then draws batches from a general pool and from one to end on."""
    recipe, began = run.recipe, time.monotonic()
    rng = random.Random(recipe.seed)
    stories = write_texts(teachers, run.vocabulary, False, recipe.written_stories, recipe.writing_rows, recipe.seed)
    chats = write_texts(teachers, run.vocabulary, True, recipe.written_chats, recipe.writing_rows, recipe.seed + 1)
    one = run.vocabulary.decode(stories[0].ids.tolist())
    run.say(f"written: {len(stories)} stories, {len(chats)} dialogues; one: {one!r}")
    run.log["seconds"]["writing"] = time.monotonic() - began

    began = time.monotonic()
    topics = rng.sample(run.groups["topics"], len(run.groups["topics"]))
    share = min(1.0, recipe.topic_tokens / max(1, sum(len(d.ids) for d in topics)))
    general = run.groups["tales"] + topics[: int(share * len(topics))] + chats
    focus: list[Document] = sum((run.groups[name] for name in FOCUS), start=list(stories))
    pools = [label(teachers, pool, recipe.batch_tokens, recipe.top, rng) for pool in (general, focus)]
    run.log["seconds"]["labelling"] = time.monotonic() - began
    run.say(f"labelled: {len(pools[0])} general batches, {len(pools[1])} to end on")
    queues: list[list[Batch]] = [[], []]

    def next_batch(progress: float) -> Batch:
        first, last = STUDENT_FOCUS
        index = int(rng.random() < first + (last - first) * progress)
        if not queues[index]:
            queues[index] = rng.sample(pools[index], len(pools[index]))
        return queues[index].pop()

    return next_batch


def train_student(run: Run, teachers: list[Llama]) -> Llama:
    """The small model: from the teachers where there are any, else from the corpus alone."""
    recipe = run.recipe
    shape = Shape(
        run.vocabulary.size, recipe.student_dim, recipe.student_layers, recipe.student_heads, recipe.student_hidden,
        recipe.context,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    student = Llama(shape, recipe.student_dropout).to(run.device)
    run.log["parameters"] = sum(p.numel() for p in student.parameters())

    def loss(hidden_ND: Tensor, embedding_VD: Tensor, batch: Batch) -> Tensor:
        if not teachers:
            return hard_loss(hidden_ND, embedding_VD, batch)
        return soft_loss(hidden_ND, embedding_VD, batch, recipe.hard_weight)

    source = student_batches(run, teachers) if teachers else new_mixture(run, recipe.seed)
    train(run, "student", student, recipe.student_weight_decay, 0.0, recipe.student_tokens, source, loss)
    return student


def parse() -> tuple[Recipe, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the model is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that tries every stage, on a CPU in a minute")
    parser.add_argument("--only-teachers", action="store_true", help="report on the teachers and write nothing")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS, help=f"default {field.default}")
    arguments = parser.parse_args()
    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return replace(SMOKE if arguments.smoke else Recipe(), **given), arguments


def main() -> None:
    recipe, arguments = parse()
    run = Run(recipe, torch.device(arguments.device))
    teachers = [train_teacher(run, index) for index in range(recipe.teachers)]
    if teachers:
        run.log["teachers_held_out_bits_per_character"] = run.results(teachers)
        run.say(f"teachers together, bits per character: {run.log['teachers_held_out_bits_per_character']}")
    if arguments.only_teachers:
        return
    student = train_student(run, teachers)
    arguments.output.mkdir(parents=True, exist_ok=True)
    export(student, run.vocabulary, arguments.output)
    exported, _ = load(arguments.output)
    tests = test_parts(run.vocabulary, run.corpus.held_out, batch_tokens=4096, context=recipe.context)
    exact = {row: bits_per_character([exported.to(run.device)], part, half=False) for row, part in tests.items()}
    run.log["held_out_bits_per_character"] = exact
    run.log["seconds"]["all"] = time.monotonic() - run.began
    log = json.dumps(run.log, indent=1)
    (arguments.output / "training_log.json").write_text(log + "\n", encoding="utf-8")
    run.say(f"exported, bits per character: {exact}")
    print(unpicked_samples(exported.to(run.device), run.vocabulary, seed=0))


if __name__ == "__main__":
    main()
