"""What is compiled, how, and the cache of it that lasts between runs. Knows the steps and their tensors; not who asks.

A step is compiled ahead of time, with every tensor it touches as an input, into one file that is kept: the next run
loads that with no tracing. On CUDA decode steps and short prompts, compiled or not, are captured into graphs
(`generate.graphs`).
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from config.cache import is_whole
from config.errors import UserError
from config.settings import shorten
from generate import step
from generate.artifacts import environment_key, keep_package, kept_in, let_compilers_keep, native_compiler
from generate.backends import ARTIFACT, PACKAGE, Backend, Dynamic, Largest, Program
from generate.graphs import ShortPrefill, captured_decode
from generate.sampling import RowParams, SamplingPlan
from generate.stats import Ledger
from generate.step import DecodeState, LanguageModel
from model import kernels
from model.kv_cache import KVCache
from model.tracing import tracing
from model.transformer import Transformer

LEAST_LENGTHS = 8
"""A prefill step is compiled for lengths from 2 to at least this: it takes a range for the length to stay open."""


@dataclass(frozen=True)
class Tensors:
    """Every tensor that a step reads or writes, in the fixed order that a compiled step takes them in."""

    names: tuple[str, ...]
    model: Transformer
    max_seq_len: int

    def flatten(self, cache: KVCache, state: DecodeState | None = None) -> list[Tensor]:
        parameters = [parameter for _, parameter in self.model.named_parameters()]
        flat = [*parameters, *cache.keys, *cache.values, *cache.frequencies]
        if state is not None:
            flat += state.tensors()
        return flat

    def restore(self, flat: tuple[Tensor, ...]) -> tuple[LanguageModel, KVCache, tuple[Tensor, ...]]:
        """The inverse of `flatten` without a state, and what comes after it in `flat`."""
        rest = iter(flat)

        def take(count: int) -> list[Tensor]:
            return [next(rest) for _ in range(count)]

        parameters = dict(zip(self.names, take(len(self.names)), strict=True))
        layers = len(self.model.config.layers)
        keys, values, frequencies = take(layers), take(layers), take(self.model.num_ropes)
        cache = KVCache(keys, values, frequencies, self.max_seq_len)

        return cast(LanguageModel, _Restored(self.model, parameters)), cache, tuple(rest)

    @staticmethod
    def restore_state(flat: tuple[Tensor, ...]) -> tuple[DecodeState, tuple[Tensor, ...]]:
        """The state that comes next, and what comes after it."""
        tokens, positions, advance, seen, *rest = flat
        count = len(fields(RowParams))
        return DecodeState(tokens, positions, advance, RowParams(*rest[:count]), seen), tuple(rest[count:])


class _Restored:
    """A model with other tensors in place of its parameters."""

    def __init__(self, model: Transformer, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, *args: Any) -> Tensor:
        result: Tensor = torch.func.functional_call(self.model, self.parameters, args)
        return result

    def hidden(self, *args: Any) -> Tensor:
        parameters = {f"model.{name}": tensor for name, tensor in self.parameters.items()}
        result: Tensor = torch.func.functional_call(_Hidden(self.model), parameters, args)
        return result


class _Hidden(nn.Module):
    """A model whose forward is its `hidden`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model.hidden(*args)


class CompiledSteps:
    """`prefill`, `read` and `decode` with the signatures of `generate.step`, compiled where asked, each form once.

    For one cache and one state: a compiled step keeps the tensors that it was first called with.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        compile_decode: bool,
        compile_prefill: bool,
        capture_prefill: bool = False,
        prefill_chunk: int,
        cache_dir: Path | None,
        ledger: Ledger,
        report: Callable[[str], None],
    ) -> None:
        """capture_prefill: short chunks become graphs where there are any, which takes longer than one prompt saves.
        cache_dir: where compiled steps are kept; None keeps none. report: told of each hit and miss, in words.
        """
        self.model = model
        self.compile_decode, self.compile_prefill = compile_decode, compile_prefill
        self.prefill_chunk = prefill_chunk
        self.cache_dir = cache_dir
        self.captures = any(kernels.usable(p) for p in model.parameters() if p.is_floating_point())
        # A mixture of experts reads each row's experts for itself: many rows are for its other way.
        self.capture_prefill = capture_prefill and self.captures and not model.config.num_experts
        if compile_decode or compile_prefill or self.captures:
            let_compilers_keep(cache_dir)
        self.ledger, self.report = ledger, report
        self._decoders: dict[tuple[int, SamplingPlan | None], Callable[[Tensor], Tensor]] = {}
        self._decode_programs: dict[tuple[bool, SamplingPlan | None], Program] = {}
        self._prefill: Callable[..., Tensor] | None = None
        self._short: ShortPrefill | None = None
        self._readers: dict[bool, Callable[..., Tensor]] = {}
        self._graphs: Any = None

    def prepare(self, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None) -> None:
        """Compile, or load, what prompts and decoding rows `slots_B` will need."""
        if self.compile_prefill:
            self._prefill_of(cache)
        if self.capture_prefill:
            with self.ledger.phase("compile"):
                self._short_of(cache).prepare()
        if self.compile_decode or self.captures:
            self._decoder(cache, state, slots_B, plan)

    def decode(
        self, model: LanguageModel, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None
    ) -> Tensor:
        """`generate.step.decode`."""
        if not (self.compile_decode or self.captures):
            return step.decode(model, cache, state, slots_B, plan)
        return self._decoder(cache, state, slots_B, plan)(slots_B)

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
        if self.capture_prefill and ShortPrefill.takes(tokens_1T.shape[1], context):
            return self._short_of(cache)(tokens_1T, start_1, slots_1, last_1)
        if not self.compile_prefill:
            return step.prefill(model, cache, tokens_1T, start_1, slots_1, last_1, context)
        if tokens_1T.shape[1] == 1:  # a length of one would be compiled apart; what padding writes is overwritten
            tokens_1T, context = torch.cat((tokens_1T, tokens_1T), dim=1), context + 1
        return self._prefill_of(cache)(tokens_1T, start_1, slots_1, last_1, torch.tensor(context))

    def read(
        self,
        model: LanguageModel,
        cache: KVCache,
        tokens_BT: Tensor,
        start_B: Tensor,
        slots_B: Tensor,
        context: int,
    ) -> Tensor:
        """`generate.step.read`, compiled where anything is."""
        if not (self.compile_decode or self.compile_prefill):
            return step.read(model, cache, tokens_BT, start_B, slots_B, context)
        T = tokens_BT.shape[1]
        if T == 1:  # as in prefill; at the context's end there is no place for padding
            if context == cache.max_seq_len:
                return step.read(model, cache, tokens_BT, start_B, slots_B, context)
            tokens_BT, context = torch.cat((tokens_BT, tokens_BT), dim=1), context + 1
        x_BTD = self._reader(cache, tokens_BT.shape[0] > 1)(tokens_BT, start_B, slots_B, torch.tensor(context))
        return x_BTD[:, :T]

    def _reader(self, cache: KVCache, batched: bool) -> Callable[..., Tensor]:
        """Compiled for one row, or for any number of rows from two on; and for any length from two on."""
        if batched not in self._readers:
            tensors = self._tensors(cache)
            flat = tensors.flatten(cache)

            def traced(*inputs: Tensor) -> Tensor:
                model, its_cache, (tokens, start, slots, context) = tensors.restore(inputs)
                return step.read(model, its_cache, tokens, start, slots, context)

            rows = max(LEAST_LENGTHS, cache.num_slots)
            length = max(LEAST_LENGTHS, min(self.prefill_chunk, cache.max_seq_len))
            B, device = rows // 2 if batched else 1, cache.keys[0].device
            T = length // 2 + (length // 2 == B)  # of the same size they would be taken for the same
            tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
            start = torch.zeros(B, dtype=torch.int64, device=device)
            inputs = [*flat, tokens, start, start.clone(), torch.tensor(T)]
            dynamic: Dynamic = {len(flat): {1: "T"}}
            largest: Largest = {"T": length}
            if batched:
                dynamic = {len(flat): {0: "B", 1: "T"}, len(flat) + 1: {0: "B"}, len(flat) + 2: {0: "B"}}
                largest["B"] = rows
            with self.ledger.phase("compile"):
                program = self._program(
                    "--compile" if self.compile_decode else "--compile-prefill",
                    "scoring, batches" if batched else "scoring",
                    traced, inputs, dynamic, largest, repr(largest),
                )  # fmt: skip
            self._readers[batched] = lambda *rest: program([*flat, *rest])
        return self._readers[batched]

    def _decoder(
        self, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None
    ) -> Callable[[Tensor], Tensor]:
        key = (slots_B.shape[0], plan)
        if key not in self._decoders:
            flat = self._tensors(cache).flatten(cache, state)

            def eager(inputs: list[Tensor]) -> Tensor:
                with tracing(capturing=True):
                    return step.decode(self.model, cache, state, inputs[-1], plan)

            with self.ledger.phase("compile"):
                program = self._decode_program(cache, flat, slots_B, plan) if self.compile_decode else eager
                if slots_B.is_cuda:
                    self._decoders[key] = captured_decode(program, flat, slots_B, state, self._pool())
                else:
                    self._decoders[key] = lambda slots: program([*flat, slots])
        return self._decoders[key]

    def _decode_program(
        self, cache: KVCache, flat: list[Tensor], slots_B: Tensor, plan: SamplingPlan | None
    ) -> Program:
        """Compiled for one row, or for any number of rows from two on."""
        batched = slots_B.shape[0] > 1
        if (batched, plan) not in self._decode_programs:
            tensors = self._tensors(cache)

            def traced(*inputs: Tensor) -> Tensor:
                model, its_cache, rest = tensors.restore(inputs)
                its_state, (slots,) = tensors.restore_state(rest)
                return step.decode(model, its_cache, its_state, slots, plan)

            what = "decode, batches" if batched else "decode"
            largest = max(LEAST_LENGTHS, 2 * cache.num_slots)
            example = slots_B if not batched else slots_B.new_full((largest // 2,), cache.num_slots - 1)
            dynamic: tuple[Dynamic, Largest] = ({len(flat): {0: "B"}}, {"B": largest}) if batched else ({}, {})
            self._decode_programs[batched, plan] = self._program(
                "--compile", what, traced, [*flat, example], *dynamic, repr((batched, largest, plan))
            )
        return self._decode_programs[batched, plan]

    def _prefill_of(self, cache: KVCache) -> Callable[..., Tensor]:
        if self._prefill is None:
            tensors = self._tensors(cache)
            flat = tensors.flatten(cache)

            def traced(*inputs: Tensor) -> Tensor:
                model, its_cache, (tokens, start, slots, last, context) = tensors.restore(inputs)
                return step.prefill(model, its_cache, tokens, start, slots, last, context)

            length = max(LEAST_LENGTHS, min(self.prefill_chunk, cache.max_seq_len))
            tokens = torch.zeros(1, length // 2, dtype=torch.int64, device=cache.keys[0].device)
            one = torch.zeros(1, dtype=torch.int64, device=tokens.device)
            inputs = [*flat, tokens, one, one.clone(), one.clone(), torch.tensor(tokens.shape[1])]
            with self.ledger.phase("compile"):
                program = self._program(
                    "--compile-prefill", "prefill", traced, inputs, {len(flat): {1: "T"}}, {"T": length}, repr(length)
                )
            self._prefill = lambda *rest: program([*flat, *rest])
        return self._prefill

    def _short_of(self, cache: KVCache) -> ShortPrefill:
        if self._short is None:
            self._short = ShortPrefill(self.model, cache, self._pool())
        return self._short

    def _pool(self) -> Any:
        """Memory of all graphs: their replays follow one another, and what one gives is read before the next."""
        if self._graphs is None:
            self._graphs = torch.cuda.graph_pool_handle()
        return self._graphs

    def _tensors(self, cache: KVCache) -> Tensors:
        return Tensors(tuple(name for name, _ in self.model.named_parameters()), self.model, cache.max_seq_len)

    def _program(
        self,
        flag: str,
        what: str,
        function: Callable[..., Tensor],
        inputs: list[Tensor],
        dynamic: Dynamic,
        largest: Largest,
        form: str,
    ) -> Program:
        """The compiled `function`, out of the cache if it is there and whole."""
        device = inputs[0].device
        shapes = [(str(t.dtype), tuple(t.shape), t.stride()) for t in inputs]
        key = environment_key(device, form, repr(self.model.config), repr(self.model), repr(shapes))
        kept = None if self.cache_dir is None else kept_in(self.cache_dir) / f"{key}.pt2"
        why = "nothing is kept here"
        if kept is not None:
            began = time.perf_counter()
            if (program := load_kept(kept, device)) is not None:
                self.report(f"{what}: compiled before, loaded in {1000 * (time.perf_counter() - began):.0f} ms")
                return program
            why = "what was kept is damaged" if kept.exists() else "not compiled before"
        began = time.perf_counter()
        compiler = native_compiler()
        self.report(f"{what}: {why}; compiling, which takes a while")
        with tempfile.TemporaryDirectory(prefix="torchchat-", ignore_cleanup_errors=True) as directory:
            path = Path(directory) / "step.pt2"
            try:
                _backend(device).compile(function, inputs, dynamic, largest, path, compiler)
                program = _backend(device).load(path, device)
            except Exception as error:  # what compilers raise has nothing else in common
                raise UserError(
                    f"{failure(flag, compiler, error)}; leave {flag} out, or see all of it with TORCHCHAT_DEBUG=1"
                ) from error
            self.report(f"{what}: compiled in {time.perf_counter() - began:.1f} s")
            if kept is not None:
                self._keep(path, kept)
        return program

    def _keep(self, path: Path, kept: Path) -> None:
        try:
            keep_package(path, kept)
        except OSError as error:
            self.report(f"what was compiled is not kept: {kept.parent}: {error.strerror}; the next run compiles again")


def loads_packages() -> bool:
    """torch 2.11 crashes when it loads a package that calls operators of ours; 2.12 was not tried."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def _backend(device: torch.device) -> Backend:
    return PACKAGE if device.type == "cpu" and loads_packages() else ARTIFACT


def load_kept(path: Path, device: torch.device) -> Program | None:
    """A compiled step out of the cache; None if it is missing, damaged or does not load here."""
    try:
        if not is_whole(path):
            return None
        program = _backend(device).load(path, device)
        os.utime(path)
    except (OSError, RuntimeError):
        return None
    return program


def failure(what: str, compiler: str, error: Exception) -> str:
    """What to tell of a compiler's error. They are pages long: the first line with the word says the most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if " error: " in line), lines[0] if lines else "no reason given")
    return f"{what}: compiling with {compiler} failed: {type(error).__name__}: {shorten(telling, 200)}"
