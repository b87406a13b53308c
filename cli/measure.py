"""What `bench` measures and how: the machine itself, the reading of prompts, the making of tokens. Drives an Engine as
everything else does; knows no flags and prints nothing.

Rates are medians of repeats after a warm-up, of whole steps as a user waits for them: the engine's own work is inside.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from config.settings import SamplingParams
from generate.engine import Engine
from generate.sequence import Sequence
from model.device import measure_bandwidth, synchronize
from model.kv_cache import KVCache
from model.moe_experts import ExpertLinear
from model.products import linear
from model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
WARMUP_STEPS = 3
BLOCK_S = 0.5
BLOCK_STEPS = (8, 64)
"""At least and at most so many decode steps are timed together, within these about BLOCK_S seconds."""
ROOM = WARMUP_STEPS + BLOCK_STEPS[1] + 2
"""Positions after a context that its measurement uses, if they are there; LEAST_ROOM if they are not."""
LEAST_ROOM = WARMUP_STEPS + 3
MATRIX_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 2048}
MATRIX_SECONDS = 0.5
"""For so long matrices are multiplied, and once at least."""


@dataclass(frozen=True)
class Machine:
    """What the hardware gives to anybody: memory in GB/s (1e9 bytes), square matrices in TFLOP/s (1e12)."""

    copy_gb_s: float
    read_gb_s: float
    matrix_tflop_s: float


@dataclass(frozen=True)
class PrefillRate:
    """A prompt of `tokens` tokens took `seconds` until its first new token was there."""

    tokens: int
    seconds: float
    flops: int

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflop_s(self) -> float:
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class DecodeRate:
    """A step that gives `batch` sequences of `context` tokens one more each took `step_s` and read the weights once."""

    context: int
    batch: int
    step_s: float
    weight_bytes: int

    @property
    def tok_s(self) -> float:
        return self.batch / self.step_s

    @property
    def weight_gb_s(self) -> float:
        return self.weight_bytes / self.step_s / 1e9


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Memory bandwidth, and matrix products of `dtype` as a model makes them: the best of several. Takes seconds."""
    bandwidth = measure_bandwidth(device)
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, spent = float("inf"), 0.0
    while spent < MATRIX_SECONDS:
        synchronize(device)
        began = time.perf_counter()
        linear(a, b)
        synchronize(device)
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds), spent + seconds
    del a, b
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Machine(bandwidth.copy_gb_s, bandwidth.read_gb_s, 2 * size**3 / best / 1e12)


def measure_prefill(engine: Engine, tokens: int, flops: int, repeats: int, on_run: Callable[[], None]) -> PrefillRate:
    """Reads a random prompt `repeats` times after once for warm-up; `on_run` is called after each."""
    seconds = []
    for _ in range(repeats + 1):
        seconds.append(prefill_seconds(engine, tokens))
        on_run()
    return PrefillRate(tokens, statistics.median(seconds[1:]), flops)


def prefill_seconds(engine: Engine, tokens: int) -> float:
    """Seconds from the arrival of a random prompt until its first new token is there."""
    prompt = random_prompt(tokens, engine.vocab_size)
    engine.forget()
    synchronize(engine.device)
    began = time.perf_counter()
    sequence = engine.add(prompt, replace(GREEDY, max_new_tokens=1))
    while not sequence.finished:
        engine.step()
    return time.perf_counter() - began


def measure_decode(engine: Engine, context: int, batch: int, repeats: int, on_run: Callable[[], None]) -> DecodeRate:
    """Makes tokens after a context of `context`, in `repeats` blocks of steps that each begin at that depth.

    The context is not read but taken as read: the cache holds random keys and values (`fill_cache`), whose cost is the
    same. Each block is warmed up; how many steps it has is decided by the first, which is not counted.
    """
    assert context + LEAST_ROOM <= engine.cache.max_seq_len
    room = engine.cache.max_seq_len - context - WARMUP_STEPS - 2
    steps = min(BLOCK_STEPS[0], room)
    step_s = []
    for repeat in range(repeats + 1):
        step_s.append(decode_step_seconds(engine, context, batch, steps))
        if repeat == 0:
            steps = min(max(BLOCK_STEPS[0], min(int(BLOCK_S / step_s[0]), BLOCK_STEPS[1])), room)
        on_run()
    return DecodeRate(context, batch, statistics.median(step_s[1:]), engine.ledger.weight_bytes_per_token)


def decode_step_seconds(engine: Engine, context: int, batch: int, steps: int) -> float:
    """Seconds a step, of `steps` steps in a row after a context that is taken as read, once warmed up."""
    prompt = random_prompt(context, engine.vocab_size)
    sequences = [engine.add(prompt, GREEDY) for _ in range(batch)]
    for sequence in sequences:
        sequence.num_prefilled = context - 1
    while not all(sequence.token_ids for sequence in sequences):
        engine.step()
    _step(engine, sequences, WARMUP_STEPS)
    # On CUDA a step is in flight at both ends, so that just as many are inside.
    began = time.perf_counter()
    _step(engine, sequences, steps)
    seconds = time.perf_counter() - began
    for sequence in sequences:
        engine.cancel(sequence)
    synchronize(engine.device)
    return seconds / steps


def _step(engine: Engine, sequences: list[Sequence], steps: int) -> None:
    """Step until each sequence has `steps` tokens more."""
    last = sequences[-1]
    wanted = len(last.token_ids) + steps
    while len(last.token_ids) < wanted:
        engine.step()
    assert not last.finished


def fill_cache(cache: KVCache) -> None:
    """Random keys and values at every position: a context that nobody had to read."""
    with torch.no_grad():
        noise = torch.randn_like(cache.keys[0])
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(noise)


def random_prompt(tokens: int, vocab_size: int) -> list[int]:
    """Token ids, the same each time."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(vocab_size, (tokens,), generator=generator).tolist()
    return ids


def prefill_flops(model: Transformer, tokens: int) -> int:
    """Floating-point operations in the matrix products of reading `tokens` tokens: 2 for each weight and token (of the
    output layer for one token; of experts those that a token is sent to), and for each layer 4 * N * H for each pair of
    a token and one that it attends to.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    with torch.device("meta"):  # the model itself may be quantized: as many products, of other numbers
        modules = list(Transformer(config).modules())
    weights = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear)) - head
    for module in modules:
        if isinstance(module, ExpertLinear):
            weights += module.weight.numel() // module.num_experts * module.chosen
    pairs = 0
    for layer in config.layers:
        window = config.sliding_window if layer.attention == "sliding" else None
        seen = tokens if window is None else min(tokens, window)
        pairs += seen * (seen + 1) // 2 + (tokens - seen) * seen
    return 2 * (weights * tokens + head) + 4 * config.num_attention_heads * config.head_dim * pairs


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU within what its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistic = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistic["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):  # another system, or the old kind of control groups
        pass
    return max(free, 0)
