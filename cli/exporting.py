"""A prepared model -> a package: compiled entry points, weights, and the model's small files, in one file that is
checked against the eager model before it takes its name. Knows all parts, and no flags.
"""

import dataclasses
import errno
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from cli import exported
from cli.builder import (
    PREFILL_CHUNK,
    Prepared,
    build,
    context_length,
    eos_ids,
    load_model,
    make_engine,
    plan_of,
    prepare,
)
from cli.console import Progress, cache_dir_or_say, human_bytes, status
from cli.export import PACKAGED
from cli.exported import QUANTIZED_OPS
from cli.needs import planned_model
from cli.package_lines import runner_lines, vocabulary_lines
from cli.saving import model_files, stored_of, versions
from config.errors import UserError
from config.settings import BuildSettings
from generate.artifacts import native_compiler, step_sources
from generate.engine import Engine
from generate.exported import AOTINDUCTOR, EntryPoint, compile_entry_point, entry_points, form_for
from generate.scheduler import slots_needed
from model.environment import Environment
from model.export import (
    ARTIFACTS,
    FILES,
    FORMAT,
    LINES,
    NATIVE,
    PACKAGE,
    PROGRAMS,
    VOCABULARY,
    WEIGHTS,
    Metadata,
    PackageWriter,
    open_package,
    program_files,
    weight_parts,
    writing,
)
from model.kv_cache import KVCache
from model.moe_experts import ExpertLinear
from model.native import ATTENTION, EXPERTS, PRODUCTS, op_library
from model.products import multiplies
from model.saved import Layout
from model.transformer import Transformer
from quant import native
from quant.directory import FILE as STORED_FILE

ROOM = 48 << 20
"""Of the disk, beside weights and small files: compiled code, and what the compilers write on the way."""
CHECKED_TOKENS = 16
CHECKED_PROMPT = "Once upon a time, there was a little girl who had a red ball. One day"
ATTENTION_OPS, EXPERTS_OPS, PRODUCTS_OPS = "attention.so", "experts.so", "products.so"
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits of the package may be from eager ones, as a share of their size: what rounding in another order makes.
"""


@dataclass(frozen=True)
class Exported:
    """What came of it: bytes and seconds."""

    file_bytes: int
    weight_bytes: int
    code_bytes: int
    compile_s: float
    check_s: float
    tokens: int
    """So many were compared with eager ones."""
    difference: float
    """The largest of logits, as a share of their size."""


def check_can_export(prepared: Prepared, output: Path) -> None:
    """Raises UserError where a model cannot be exported here, and OSError where there is no room for it."""
    if prepared.device.device.type not in PACKAGED:
        places = " or ".join(PACKAGED)
        raise UserError(f"a model is exported for {places}, not for {prepared.device.device.type}: give --device cpu")
    # What a compiler cannot make is refused now.
    compiled = dataclasses.replace(prepared.settings, compile=True)
    plan_of(compiled, prepared.config, prepared.device, prepared.dtype)
    if form_for(prepared.device.device) == AOTINDUCTOR:
        try:
            native_compiler()
        except UserError as error:
            raise UserError(f"export: {str(error).partition(': install')[0]}: install one (on Debian: g++)") from error
    needed = _weight_bytes(prepared) + ROOM
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        text = f"{human_bytes(needed)} are needed and {human_bytes(free)} are free; make room, or name another place"
        raise OSError(errno.ENOSPC, text, str(output.parent))


def export(prepared: Prepared, output: Path, max_num_seqs: int) -> Exported:
    """Writes the package. Raises UserError, and OSError where the disk does; then there is no file, or the one that was
    there before.
    """
    length = context_length(prepared)
    eager = dataclasses.replace(prepared.settings, compile=False, compile_prefill=False, max_num_seqs=1)
    prepared = dataclasses.replace(prepared, settings=eager)
    keep_in = cache_dir_or_say()
    libraries = _libraries(prepared, keep_in)
    model = load_model(prepared, length)
    device, dtype = prepared.device.device, prepared.dtype.dtype
    form, chunk = form_for(device), prefill_chunk(prepared)
    cache = KVCache.create(prepared.config, slots_needed(max_num_seqs), length, device, dtype)
    began = time.perf_counter()
    programs: dict[str, bytes] = {}
    for point in entry_points(model, cache, chunk):
        programs |= _files_of(point, compile_entry_point(point, model, form, keep_in, status), form)
    compiled = time.perf_counter()
    with writing(output) as (writer, partial):
        for name, data in (programs | libraries).items():
            writer.add(name, data)
        facts = _metadata(prepared, form, length, max_num_seqs, writer)
        _write_model(prepared, model, cache, facts, writer)
        writer.close()
        package_compiled = time.perf_counter()
        tokens, difference = _check(prepared, model, partial, length, max_num_seqs)
        checked = time.perf_counter()
        partial.replace(output)
    exported.remember(open_package(output))
    code = sum(map(len, (programs | libraries).values()))
    return Exported(
        output.stat().st_size, _weight_bytes(prepared), code, compiled - began, checked - package_compiled, tokens,
        difference,
    )  # fmt: skip


def prefill_chunk(prepared: Prepared) -> int:
    """So many tokens of a prompt are read at a time."""
    return PREFILL_CHUNK[prepared.device.device.type]


def _weight_bytes(prepared: Prepared) -> int:
    return sum(parameter.nbytes for parameter in planned_model(prepared).parameters())


def _files_of(point: EntryPoint, data: bytes, form: str) -> dict[str, bytes]:
    """What the compiler made of an entry point, as entries of the package."""
    if form != AOTINDUCTOR:
        return {ARTIFACTS + point.name: data}
    return {f"{PROGRAMS}{point.name}/{name}": file for name, file in program_files(data).items()}


def _libraries(prepared: Prepared, keep_in: Path | None) -> dict[str, bytes]:
    """The ops that the entry points call, in C++, as entries of the package; none where they run under Python."""
    if form_for(prepared.device.device) != AOTINDUCTOR:
        return {}
    found = {NATIVE + ATTENTION_OPS: op_library(ATTENTION, keep_in, status)}
    if not multiplies(prepared.dtype.dtype):
        found[NATIVE + PRODUCTS_OPS] = op_library(PRODUCTS, keep_in, status)
    if any(isinstance(module, ExpertLinear) for module in planned_model(prepared).modules()):
        found[NATIVE + EXPERTS_OPS] = op_library(EXPERTS, keep_in, status)
    if prepared.plan is not None and prepared.plan.assignments:
        library = found[NATIVE + QUANTIZED_OPS] = op_library(native.OP_SOURCES, keep_in, status, native.CHOICES)
        # Its products serve the eager model too, for which the same code would be compiled once more.
        with tempfile.NamedTemporaryFile(prefix="torchchat-", suffix=".so") as file:
            file.write(library)
            file.flush()
            native.use(Path(file.name))
    return found


def _metadata(prepared: Prepared, form: str, length: int, max_num_seqs: int, writer: PackageWriter) -> Metadata:
    needs = Environment.here(prepared.device.device, needs_python=form != AOTINDUCTOR)
    stored = prepared.stored or (stored_of(prepared) if prepared.plan is not None else None)
    return Metadata(
        format=FORMAT,
        form=form,
        torch=needs.torch_version,
        python=needs.python,
        cuda=needs.cuda,
        platform=needs.platform,
        device=prepared.device.device.type,
        instructions=list(needs.instructions),
        capability=needs.capability,
        dtype=prepared.dtype.name,
        recipe=None if stored is None else json.loads(stored.recipe.text),
        max_seq_len=length,
        max_num_seqs=max_num_seqs,
        prefill_chunk=prefill_chunk(prepared),
        eos_token_ids=sorted(eos_ids(prepared)),
        model=prepared.settings.model,
        source=step_sources(),
        versions=versions(),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        code=dict(writer.hashes),
    )


def _write_model(
    prepared: Prepared, model: Transformer, cache: KVCache, facts: Metadata, writer: PackageWriter
) -> None:
    """Everything but the code, the weights last."""
    files = model_files(prepared)
    if facts.recipe is not None:
        stored = prepared.stored or stored_of(prepared)
        files[STORED_FILE] = (json.dumps(stored.document(), indent=2) + "\n").encode()
    parameters = dict(model.named_parameters())
    layout = Layout.of({name: (p.dtype, tuple(p.shape)) for name, p in parameters.items()}, {})
    writer.add(PACKAGE, (json.dumps(facts.document(), indent=2) + "\n").encode())
    writer.add(LINES, runner_lines(prepared, facts, cache, layout, list(parameters)).encode())
    if (vocabulary := vocabulary_lines(prepared)) is not None:
        writer.add(VOCABULARY, vocabulary.encode())
    for name, data in files.items():
        writer.add(FILES + name, data)
    with Progress("writing the weights", layout.nbytes, in_bytes=True) as progress:
        writer.stream(WEIGHTS, layout.nbytes, weight_parts(layout, parameters, progress.advance))


# ---- The check ----


def _check(prepared: Prepared, model: Transformer, partial: Path, length: int, max_num_seqs: int) -> tuple[int, float]:
    """Holds the package against the eager model: how many tokens were compared, and the largest difference of logits.
    Raises UserError where they disagree.
    """
    status("comparing the package with the eager model")
    settings = BuildSettings(str(partial), max_num_seqs=max_num_seqs)
    packaged = prepare(settings, needs_tokenizer=False)
    theirs = build(packaged, length).engine
    ours = make_engine(prepared, model, length, None)
    ids = check_prompt_ids(prepared, length)
    count = min(CHECKED_TOKENS, length - len(ids))
    tokens, expected = _logits(ours, ids, [], count)
    worst, close = 0.0, CLOSE[prepared.dtype.dtype]
    for row, rows in enumerate([1] if max_num_seqs == 1 else [1, 2]):
        _, found = _logits(theirs, ids, tokens, count, slot=row, rows=rows)
        for logits, right in zip(found, expected, strict=True):
            difference, agrees = compare_logits(logits, right, close)
            worst = max(worst, difference)
            if not agrees:
                raise UserError(
                    f"export: what was compiled gives other logits than the eager model (by {difference:.1%}): nothing "
                    "was written; try another --dtype, or report this with the model's name"
                )
    return len(tokens), worst


def compare_logits(found_V: torch.Tensor, expected_V: torch.Tensor, close: float) -> tuple[float, bool]:
    """Their distance, as a share of the expected ones' norm, and whether they agree: within `close`, and the likeliest
    token another one only where rounding alone can have decided.
    """
    difference = float((found_V - expected_V).norm() / expected_V.norm())
    margin = float(expected_V.max() - expected_V[found_V.argmax()])
    return difference, difference <= close and margin <= 2 * float((found_V - expected_V).abs().max())


def check_prompt_ids(prepared: Prepared, length: int) -> list[int]:
    """The tokens that what was exported is checked on."""
    tokenizer, vocab = prepared.tokenizer, prepared.config.vocab_size
    if tokenizer is None:
        return [(17 * i + 3) % vocab for i in range(min(20, length // 2))]
    return tokenizer.encode(CHECKED_PROMPT, bos=tokenizer.add_bos)[: max(1, length // 2)]


@torch.inference_mode()
def _logits(
    engine: Engine, prompt: list[int], answer: list[int], count: int, *, slot: int = 0, rows: int = 1
) -> tuple[list[int], list[torch.Tensor]]:
    """The logits after a prompt and after each of `count` - 1 tokens: those of `answer`, or else the likeliest ones;
    and these tokens. rows: how many are decoded together, all but the first being padding.
    """

    def indices(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=engine.device)

    slots = indices(slot, *[engine.cache.num_slots - 1] * (rows - 1))
    end = len(prompt)
    found: list[torch.Tensor] = []
    for start in range(0, end, engine.scheduler.prefill_chunk):
        part = prompt[start : start + engine.scheduler.prefill_chunk]
        at = (indices(start), slots[:1], indices(len(part) - 1), start + len(part))
        found = [engine.prefill_fn(engine.model, engine.cache, indices(*part)[None], *at)]
    tokens: list[int] = []
    for i in range(count):
        tokens.append(answer[i] if answer else int(found[-1][0].argmax()))
        if i + 1 < count:
            engine.state.tokens[slot], engine.state.positions[slot] = tokens[-1], end + i
            found.append(engine.decode_fn(engine.model, engine.cache, engine.state, slots, None)[:1].clone())
    return tokens, [logits[0].float().cpu() for logits in found]
