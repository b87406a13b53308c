"""Steps as CUDA graphs: a replay costs the host one launch, where it takes longer to issue the kernels of a small step
than the GPU to run them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from generate.backends import Program
from generate.step import DecodeState, LanguageModel, prefill_rows
from model.kv_cache import KVCache
from model.tracing import tracing

LENGTHS = (16, 32, 64, 128, 256)
"""Chunks of up to so many tokens have a graph of their own, into which shorter ones are padded."""
MOST_PAIRS = 2**18
"""Tokens times context: each row reads the context for itself, which for more than this costs more than is won."""


def captured(
    run: Callable[[], Tensor], device: torch.device, pool: Any, undo: Callable[[], None]
) -> Callable[[], Tensor]:
    """Replays of `run`, which always give the same tensor. pool: of memory that graphs share which never run at once.

    undo: takes back what a run changes, since it runs for warming up before it is captured, which runs nothing.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
            undo()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def captured_decode(
    program: Program, flat: list[Tensor], slots_B: Tensor, state: DecodeState, pool: Any
) -> Callable[[Tensor], Tensor]:
    """A decode step, its slots the last input of `program`, as one graph."""
    slots = slots_B.clone()
    held = [state.tokens, state.positions, state.seen]
    saved = [tensor.clone() for tensor in held]

    def undo() -> None:  # each time: the second run must not be one position further, past the end of the cache
        for tensor, before in zip(held, saved, strict=True):
            tensor.copy_(before)

    replay = captured(lambda: program([*flat, slots]), slots.device, pool, undo)

    def step(slots_B: Tensor) -> Tensor:
        slots.copy_(slots_B)
        return replay()

    return step


class ShortPrefill:
    """`generate.step.prefill` of short chunks, one graph for each of `LENGTHS`."""

    def __init__(self, model: LanguageModel, cache: KVCache, pool: Any) -> None:
        self._model, self._cache, self._pool = model, cache, pool
        self._replays: dict[int, Callable[[], Tensor]] = {}
        device = cache.keys[0].device
        self._tokens_1T = torch.zeros(1, LENGTHS[-1], dtype=torch.int64, device=device)
        self._start_1, self._slots_1, self._last_1 = torch.zeros(3, 1, dtype=torch.int64, device=device).unbind(0)

    @staticmethod
    def takes(length: int, context: int) -> bool:
        """Whether a chunk of `length` tokens that ends at `context` is short enough."""
        return length <= LENGTHS[-1] and length * context <= MOST_PAIRS

    def prepare(self) -> None:
        """Capture all graphs."""
        for length in LENGTHS:
            self._replay(length)

    def __call__(self, tokens_1T: Tensor, start_1: Tensor, slots_1: Tensor, last_1: Tensor) -> Tensor:
        """The logits of the token after the chunk, float32 [1, V]."""
        length = tokens_1T.shape[1]
        replay = self._replay(next(most for most in LENGTHS if length <= most))
        self._tokens_1T[:, :length] = tokens_1T
        for held, given in ((self._start_1, start_1), (self._slots_1, slots_1), (self._last_1, last_1)):
            held.copy_(given)
        return replay()

    def _replay(self, length: int) -> Callable[[], Tensor]:
        if length not in self._replays:
            self._replays[length] = self._capture(length)
        return self._replays[length]

    def _capture(self, length: int) -> Callable[[], Tensor]:
        """While it is captured all rows are at the first position of slot 0, which then holds again what it held."""
        held = self._cache.kept(0, 0, 1)

        def run() -> Tensor:
            with tracing(capturing=True):
                tokens_1T = self._tokens_1T[:, :length]
                return prefill_rows(self._model, self._cache, tokens_1T, self._start_1, self._slots_1, self._last_1)

        for tensor in (self._start_1, self._slots_1, self._last_1):
            tensor.zero_()
        return captured(run, self._tokens_1T.device, self._pool, lambda: self._cache.put(held, [0], 0))
