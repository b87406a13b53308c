"""The steps of a model as entry points of a package: compiled ahead into files, and called with `generate.step`'s
signatures. Knows steps and their tensors; not the package's other contents.

Prefill is one entry point for any length, decode one for a single row and, where several sequences are to run, one for
any number of rows. They end with logits, so that the few of them serve every way of sampling, and a program without
Python too; decode takes the likeliest token itself where it is told to. The usual ways of sampling for one row are an
entry point of their own. Weights, keys and values are inputs, as they are to every compiled step
(`generate.compilation`), so that the entry points share one copy of each.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.errors import UserError
from generate.artifacts import environment_key, keep_package, kept_in, native_compiler
from generate.backends import ARTIFACT, PACKAGE, Backend, Dynamic, Function, Largest, Program
from generate.compilation import LEAST_LENGTHS, Tensors, failure, load_kept, loads_packages
from generate.graphs import captured_decode
from generate.sampling import CANDIDATES, SamplingPlan
from generate.step import DecodeState, LanguageModel, choose, prefill, read
from model.kv_cache import KVCache
from model.transformer import Transformer

AOTINDUCTOR, ARTIFACT_FORM = "aotinductor", "artifact"
BACKENDS: dict[str, Backend] = {AOTINDUCTOR: PACKAGE, ARTIFACT_FORM: ARTIFACT}
PREFILL, DECODE, DECODE_BATCH, SAMPLE = "prefill", "decode", "decode_batch", "sample"


def form_for(device: torch.device) -> str:
    """How entry points for a device are compiled: what is loadable there."""
    return AOTINDUCTOR if device.type == "cpu" and loads_packages() else ARTIFACT_FORM


@dataclass(frozen=True)
class EntryPoint:
    """What is compiled: a function of `inputs`; `dynamic` and `largest` as `generate.backends` has them."""

    name: str
    function: Function
    inputs: list[Tensor]
    dynamic: Dynamic
    largest: Largest


def tensors_of(model: Transformer, max_seq_len: int) -> Tensors:
    return Tensors(tuple(name for name, _ in model.named_parameters()), model, max_seq_len)


def entry_points(model: Transformer, cache: KVCache, prefill_chunk: int) -> list[EntryPoint]:
    """All that a model needs whose sequences live in `cache`. After the tensors of model and cache, prefill takes what
    `generate.step.prefill` does, and decode tokens, positions and advance of a DecodeState, greedy, int64 [1], and
    slots, int64 [B]; both return logits, float32 [., V]. Where greedy is 1 and not 0, decode notes the likeliest tokens
    in the state, as `generate.step.choose` does.
    """
    tensors = tensors_of(model, cache.max_seq_len)
    flat = tensors.flatten(cache)

    def traced_prefill(*inputs: Tensor) -> Tensor:
        its_model, its_cache, (tokens, start, slots, last, context) = tensors.restore(inputs)
        return prefill(its_model, its_cache, tokens, start, slots, last, context)

    def traced_decode(*inputs: Tensor) -> Tensor:
        its_model, its_cache, (newest, positions, advance, greedy, slots) = tensors.restore(inputs)
        tokens_B, positions_B, length = newest[slots], positions[slots], its_cache.max_seq_len
        logits_BV = its_model(tokens_B[:, None], positions_B, its_cache, slots, length, torch.zeros_like(slots))
        newest[slots] = torch.where(greedy == 1, logits_BV.argmax(-1), tokens_B)
        positions[slots] = positions_B + advance[slots] * greedy
        return logits_BV

    def indices(*shape: int, value: int = 0) -> Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=cache.keys[0].device)

    length = max(LEAST_LENGTHS, min(prefill_chunk, cache.max_seq_len))
    some = length // 2
    standing = [*(indices(cache.num_slots) for _ in range(3)), indices(1)]
    reading = [indices(1, some), indices(1), indices(1), indices(1), torch.tensor(some)]
    found = [
        EntryPoint(PREFILL, traced_prefill, [*flat, *reading], {len(flat): {1: "T"}}, {"T": length}),
        EntryPoint(DECODE, traced_decode, [*flat, *standing, indices(1)], {}, {}),
    ]
    if cache.num_slots > 1:
        largest = max(LEAST_LENGTHS, 2 * cache.num_slots)
        rows = indices(largest // 2 + (largest // 2 == cache.num_slots), value=cache.num_slots - 1)
        inputs = [*flat, *standing, rows]
        found.append(EntryPoint(DECODE_BATCH, traced_decode, inputs, {len(inputs) - 1: {0: "B"}}, {"B": largest}))
    return [*found, _sample_entry(model, cache)]


def _sample_entry(model: Transformer, cache: KVCache) -> EntryPoint:
    """Takes the tensors of a DecodeState, logits [1, V] and slots [1]; `generate.step.choose`."""
    vocab_size, device = model.config.vocab_size, cache.keys[0].device
    plan = sampled_by(vocab_size)
    state = DecodeState.create(cache.num_slots, vocab_size, device)

    def traced(*inputs: Tensor) -> Tensor:
        its_state, (logits, slots) = Tensors.restore_state(inputs)
        return choose(its_state, logits, slots, its_state.next_positions(slots), plan)

    logits, slots = torch.zeros(1, vocab_size, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    return EntryPoint(SAMPLE, traced, [*state.tensors(), logits, slots], {}, {})


def sampled_by(vocab_size: int) -> SamplingPlan:
    """The plan of the entry point that samples. It serves every other with no more candidates: no row's tokens depend
    on its plan.
    """
    return SamplingPlan(greedy=False, candidates=min(CANDIDATES[0], vocab_size), penalties=True)


def compile_entry_point(
    entry: EntryPoint, model: Transformer, form: str, cache_dir: Path | None, report: Callable[[str], None]
) -> bytes:
    """The file that the backend of `form` makes of it; out of `cache_dir` if it is kept there. Raises UserError."""
    device = entry.inputs[0].device
    shapes = [(str(t.dtype), tuple(t.shape), t.stride()) for t in entry.inputs]
    parts = ("exported", form, entry.name, repr(entry.largest), repr(model.config), repr(model), repr(shapes))
    kept = None if cache_dir is None else kept_in(cache_dir) / f"{environment_key(device, *parts)}.pt2"
    if kept is not None and load_kept(kept, device) is not None:
        report(f"{entry.name}: compiled before")
        return kept.read_bytes()
    began = time.perf_counter()
    try:
        compiler = native_compiler()
    except UserError as error:
        raise UserError(f"export: {str(error).partition(': install')[0]}: install one (on Debian: g++)") from error
    report(f"{entry.name}: compiling, which takes a while")
    with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
        path = Path(directory) / "step.pt2"
        try:
            with _any_number_of_threads():
                BACKENDS[form].compile(entry.function, entry.inputs, entry.dynamic, entry.largest, path, compiler)
        except Exception as error:  # what compilers raise has nothing else in common
            raise UserError(f"{failure('export', compiler, error)}; see all of it with TORCHCHAT_DEBUG=1") from error
        report(f"{entry.name}: compiled in {time.perf_counter() - began:.1f} s")
        if kept is not None:
            try:
                keep_package(path, kept)
            except OSError as error:
                report(f"what was compiled is not kept: {kept.parent}: {error.strerror}")
        return path.read_bytes()


def _any_number_of_threads() -> Any:
    """What runs the package may have another number of processors: it is asked then, not written into the code."""
    from torch._inductor import config as inductor_config

    return inductor_config.patch({"cpp.dynamic_threads": True})


class ExportedSteps:
    """`prefill` and `decode` with the signatures of `generate.step`, run by the entry points of a package.

    For one cache and one state. On CUDA each way of decoding is captured into a graph with its sampling, as
    `CompiledSteps` does.
    """

    def __init__(self, model: Transformer, programs: Mapping[str, Program]) -> None:
        """programs: entry points by their names. model: has the weights that they are given; its code does not run."""
        self.model, self.programs = model, programs
        self.captures = next(model.parameters()).is_cuda
        self._flat: tuple[KVCache, list[Tensor]] | None = None
        self._decoders: dict[tuple[int, SamplingPlan | None], Callable[[Tensor], Tensor]] = {}
        self._graphs: Any = None
        device = next(model.parameters()).device
        self._greedy, self._otherwise = (torch.full((1,), n, dtype=torch.int64, device=device) for n in (1, 0))

    def prepare(self, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None) -> None:
        """Capture what decoding rows `slots_B` will need."""
        if slots_B.is_cuda:
            self._decoder(cache, state, slots_B, plan)

    def prefill(
        self,
        model: LanguageModel,
        cache: KVCache,
        tokens_1T: Tensor,
        start_1: Tensor,
        slots_1: Tensor,
        last_1: Tensor,
        context: int,
    ) -> Tensor:
        """`generate.step.prefill`."""
        if tokens_1T.shape[1] == 1:  # a length of one would be compiled apart; what padding writes is overwritten
            tokens_1T, context = torch.cat((tokens_1T, tokens_1T), dim=1), context + 1
        inputs = [*self._tensors(cache), tokens_1T, start_1, slots_1, last_1, torch.tensor(context)]
        return self.programs[PREFILL](inputs)

    def read(
        self,
        model: LanguageModel,
        cache: KVCache,
        tokens_BT: Tensor,
        start_B: Tensor,
        slots_B: Tensor,
        context: int,
    ) -> Tensor:
        """`generate.step.read`, eager: scoring texts is no entry point."""
        return read(model, cache, tokens_BT, start_B, slots_B, context)

    def decode(
        self, model: LanguageModel, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None
    ) -> Tensor:
        """`generate.step.decode`."""
        if slots_B.is_cuda:
            return self._decoder(cache, state, slots_B, plan)(slots_B)
        return self._decode(cache, state, slots_B, plan)

    def _decode(self, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None) -> Tensor:
        program = self.programs[DECODE if slots_B.shape[0] == 1 else DECODE_BATCH]
        greedy = plan is not None and plan.greedy and not plan.penalties
        standing = [state.tokens, state.positions, state.advance, self._greedy if greedy else self._otherwise]
        logits_BV = program([*self._tensors(cache), *standing, slots_B])
        if plan is None:
            return logits_BV
        if greedy:
            return state.tokens[slots_B]
        usual = len(slots_B) == 1 and not plan.greedy and plan.candidates <= sampled_by(logits_BV.shape[1]).candidates
        if usual:
            return self.programs[SAMPLE]([*state.tensors(), logits_BV, slots_B])
        return choose(state, logits_BV, slots_B, state.next_positions(slots_B), plan)

    def _decoder(
        self, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None
    ) -> Callable[[Tensor], Tensor]:
        key = (slots_B.shape[0], plan)
        if key not in self._decoders:
            if self._graphs is None:
                self._graphs = torch.cuda.graph_pool_handle()

            def step(inputs: list[Tensor]) -> Tensor:
                return self._decode(cache, state, inputs[-1], plan)

            self._decoders[key] = captured_decode(step, [], slots_B, state, self._graphs)
        return self._decoders[key]

    def _tensors(self, cache: KVCache) -> list[Tensor]:
        if self._flat is None or self._flat[0] is not cache:
            self._flat = (cache, tensors_of(self.model, cache.max_seq_len).flatten(cache))
        return self._flat[1]
