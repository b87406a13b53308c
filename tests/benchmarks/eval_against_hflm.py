"""Scoring by `eval` against lm-eval's own model for Transformers, `HFLM`: one machine, one process, the same random
weights in the same memory, the same requests, the same batch size.

Requests are made like those of known tasks: questions with examples before them and four choices, of about as many
tokens as such tasks have with a Llama tokenizer. Ours and theirs are timed in turn, one kind after the other, tokens
in and log-probabilities out; both must find the same. The last line on stdout is a JSON document.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from cli.builder import Built, build, prepare
from config.settings import BuildSettings, Setting
from generate.likelihood import Continuation
from model.device import device_name, synchronize
from tests.benchmarks.against_transformers import theirs

KINDS = {
    "hellaswag, no examples": (90, 25, 0, False),
    "hellaswag, 5 examples": (90, 25, 500, False),
    "arc, no examples": (30, 6, 0, False),
    "arc, 10 examples": (30, 6, 350, False),
    "mmlu, 5 examples, a letter": (80, 1, 520, True),
}
"""Of each kind: tokens of a question and of a choice, of the examples before, and whether those are always the same."""
MOST_DIFFERENT = {"fp32": 2e-3, "bf16": 5.0, "fp16": 1.0}
"""How far log-probabilities may be apart: with random weights each is about -10 a token."""


def requests_of(kind: str, questions: int, vocab_size: int) -> list[Continuation]:
    """Four choices a question, of lengths around the kind's, in the order in which lm-eval asks."""
    rng = random.Random(0)
    question, choice, examples, same = KINDS[kind]

    def tokens(length: int) -> tuple[int, ...]:
        spread = length // 4
        return tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(length - spread, length + spread)))

    shown = tokens(examples)
    made = []
    for _ in range(questions):
        context = (shown if same else tokens(examples)) + tokens(question)
        made += [Continuation(context, tokens(choice)) for _ in range(4)]
    return made


class Theirs(HFLM):
    """Without texts: what is asked are tokens."""

    def __init__(self, built: Built, batch_size: int) -> None:
        self._model, self._device = theirs(built), built.prepared.device.device
        self.batch_size_per_gpu, self.batch_schedule, self.batch_sizes = batch_size, 1, {}
        self._max_length, self.logits_cache, self.softmax_dtype = built.engine.cache.max_seq_len, True, None
        self.mixed_precision_dtype = None
        self._rank, self._world_size = 0, 1

    def score(self, requests: list[Continuation]) -> list[float]:
        asked = [(None, list(one.context), list(one.continuation)) for one in requests]
        return [logprob for logprob, _ in self._loglikelihood_tokens(asked, disable_tqdm=True)]


def timed(what: Any, built: Built) -> tuple[list[float], float]:
    synchronize(built.prepared.device.device)
    began = time.perf_counter()
    found = what()
    synchronize(built.prepared.device.device)
    return found, time.perf_counter() - began


def compare(built: Built, hflm: Theirs, kind: str, questions: int, repeats: int) -> dict[str, Any]:
    """The fastest of `repeats` runs of each, in turn, after one that does not count."""
    requests = requests_of(kind, questions, built.prepared.config.vocab_size)
    few = requests[:8]
    built.engine.score(few)
    hflm.score(few)
    ours_s, theirs_s, apart = [], [], 0.0
    for _ in range(repeats):
        before = built.ledger.prefill_tokens
        ours, seconds = timed(lambda: [one.logprob for one in built.engine.score(requests)], built)
        ours_s.append(seconds)
        read = built.ledger.prefill_tokens - before
        other, seconds = timed(lambda: hflm.score(requests), built)
        theirs_s.append(seconds)
        apart = max(abs(a - b) for a, b in zip(ours, other, strict=True))
    if apart > MOST_DIFFERENT[built.prepared.dtype.name]:
        sys.exit(f"{kind}: log-probabilities are {apart:.3g} apart: these are not the same model")
    return {
        "kind": kind,
        "requests": len(requests),
        "tokens": sum(len(one.context) + len(one.continuation) for one in requests),
        "tokens_computed": read,
        "ours_s": min(ours_s),
        "theirs_s": min(theirs_s),
        "ratio": min(theirs_s) / min(ours_s),
        "apart": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a known model, for its shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", action="append", help="kinds whose name has this in it; may be given again")
    args = parser.parse_args()
    settings = BuildSettings(
        args.model,
        device=Setting(args.device),
        dtype=Setting(args.dtype),
        max_seq_len=1024,
        max_num_seqs=args.batch_size,
        random_weights=True,
    )
    built = build(prepare(settings))
    hflm = Theirs(built, args.batch_size)
    rows = []
    for kind in KINDS:
        if args.only and not any(part in kind for part in args.only):
            continue
        with torch.inference_mode():
            row = compare(built, hflm, kind, args.questions, args.repeats)
        rows.append(row)
        print(
            f"{kind:<28} {row['requests'] / row['ours_s']:8.1f} requests/s  "
            f"HFLM {row['requests'] / row['theirs_s']:8.1f}  {row['ratio']:5.2f}x  "
            f"tokens {row['tokens']:,}, computed {row['tokens_computed']:,}, apart {row['apart']:.1g}",
            flush=True,
        )
    machine = {"device": device_name(built.prepared.device.device), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    print(json.dumps({"settings": vars(args), "machine": machine, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
