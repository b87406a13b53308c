"""A prepared model -> a program of ExecuTorch's, in one file that is checked against the eager model before it takes
its name. Knows all parts, and no flags.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from cli.builder import PREFILL_CHUNK, Prepared, context_length, eos_ids, load_model
from cli.console import status
from cli.exporting import CHECKED_TOKENS, check_prompt_ids, compare_logits
from cli.needs import planned_model
from cli.pte import FORMAT, Facts, packed
from cli.saving import check_disk, model_files, stored_of, versions
from config.errors import UserError
from generate.executorch import Program, lower, no_cache, require
from generate.stats import weight_bytes_per_token
from generate.step import LanguageModel
from model.kv_cache import KVCache
from model.transformer import Transformer
from quant.directory import FILE as STORED_FILE
from quant.portable import make_portable, why_not

CLOSE = {False: 1e-3, True: 5e-2}
"""How far logits may be from eager ones, as a share of their size: XNNPACK's tanh and GELU are approximations. With
quantized layers an input that is rounded to 8 bits may fall to the other side when sums are made in another order.
"""
ROOM = 16 << 20


@dataclass(frozen=True)
class ExportedPte:
    """What came of it: bytes and seconds."""

    file_bytes: int
    lower_s: float
    check_s: float
    tokens: int
    """So many were compared with eager ones."""
    difference: float
    """The largest of logits, as a share of their size."""


def check_can_export(prepared: Prepared, output: Path) -> None:
    """Raises UserError where the model cannot be exported so, and OSError where there is no room for it."""
    require()
    if any(layer.experts for layer in prepared.config.layers):
        raise UserError("--output-pte-path: XNNPACK has no kernel for mixtures of experts: write a package instead")
    for assignment in prepared.plan.assignments if prepared.plan is not None else ():
        why = why_not(assignment.key, assignment.format, assignment.shape[1])
        if why is not None:
            raise UserError(f"--output-pte-path: {assignment.name}: {why}")
    # A tied table is there twice: as rows to look up, and packed for the product.
    table = prepared.config.vocab_size * prepared.config.hidden_size * 4 * prepared.config.tie_word_embeddings
    check_disk(output.parent, sum(p.nbytes for p in planned_model(prepared).parameters()) + table + ROOM)


def export_pte(prepared: Prepared, output: Path) -> ExportedPte:
    """Writes the file. Raises UserError, and OSError where the disk does; then there is no file, or the one that was
    there before.
    """
    length = context_length(prepared)
    model = load_model(prepared, length)
    tokens, expected = _eager(prepared, model, length)
    began = time.perf_counter()
    status("lowering the model to ExecuTorch, which takes a while")
    metadata = _metadata(prepared, model, length)
    make_portable(model)
    facts = {
        "get_max_seq_len": length,
        "get_vocab_size": prepared.config.vocab_size,
        "get_eos_ids": sorted(eos_ids(prepared)),
    }
    program = lower(model, length, PREFILL_CHUNK["cpu"], metadata, facts)
    lowered = time.perf_counter()
    with _taking_its_name_last(output) as partial:
        with partial.open("xb") as file:
            program.write_to_file(file)
        status("comparing the program with the eager model")
        written = time.perf_counter()
        difference = _check(prepared, Program(partial), length, tokens, expected)
    return ExportedPte(
        output.stat().st_size, lowered - began, time.perf_counter() - written, len(expected), difference
    )


def _metadata(prepared: Prepared, model: Transformer, length: int) -> bytes:
    files = model_files(prepared)
    stored = prepared.stored or (stored_of(prepared) if prepared.plan is not None else None)
    if stored is not None:
        files[STORED_FILE] = (json.dumps(stored.document(), indent=2) + "\n").encode()
    return packed(
        Facts(
            format=FORMAT,
            model=prepared.settings.model,
            recipe=None if stored is None else json.loads(stored.recipe.text),
            max_seq_len=length,
            prefill_chunk=min(PREFILL_CHUNK["cpu"], length),
            eos_token_ids=sorted(eos_ids(prepared)),
            weight_bytes_per_token=weight_bytes_per_token(model),
            versions={**versions(), "executorch": version("executorch")},
            created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        ),
        files,
    )


@contextmanager
def _taking_its_name_last(output: Path) -> Iterator[Path]:
    """A path beside `output` whose file is that in the end, or is removed."""
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# ---- The check ----


def _eager(prepared: Prepared, model: Transformer, length: int) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens of a prompt and its likeliest continuation, and the logits of each of the latter."""
    prompt = check_prompt_ids(prepared, length)
    cache = KVCache.create(prepared.config, 1, length, "cpu", torch.float32)
    return _logits(model, cache, prompt, len(prompt))


def _check(
    prepared: Prepared, program: Program, length: int, tokens: list[int], expected: list[torch.Tensor]
) -> float:
    """The largest difference of logits. Raises UserError where the program's are others than the eager model's."""
    _, found = _logits(program, no_cache(length), tokens, len(tokens) - len(expected) + 1)
    close = CLOSE[prepared.plan is not None and bool(prepared.plan.assignments)]
    worst = 0.0
    for logits, right in zip(found, expected, strict=True):
        difference, agrees = compare_logits(logits, right, close)
        worst = max(worst, difference)
        if not agrees:
            raise UserError(
                f"export: what was lowered gives logits other than the eager model (by {difference:.2g} of their size):"
                " nothing was written; report this with the model's name"
            )
    return worst


@torch.inference_mode()
def _logits(
    model: LanguageModel, cache: KVCache, tokens: list[int], prompt: int
) -> tuple[list[int], list[torch.Tensor]]:
    """The logits after the first `prompt` tokens and each that follows; where none does, the likeliest ones do."""
    tokens, follow = list(tokens), len(tokens) == prompt
    count = min(CHECKED_TOKENS, cache.max_seq_len - prompt) if follow else len(tokens) - prompt + 1
    found: list[torch.Tensor] = []
    start = 0
    for i in range(count):
        end = prompt + i
        part = torch.tensor([tokens[start:end]])
        at = torch.tensor([start]), cache, torch.zeros(1, dtype=torch.int64), end, torch.tensor([end - start - 1])
        found.append(model(part, *at)[0].clone())
        if follow and i + 1 < count:
            tokens.append(int(found[-1].argmax()))
        start = end
    return tokens, found
