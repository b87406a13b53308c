"""What a prepared model will need: bytes of weights, of the cache, at the peak. Reads shapes and headers of files,
loads no weights and shows nothing.

What tensors take is exact. What the process takes beside them was measured (Linux, torch 2.13, two threads), each as
the growth of its peak over what was there before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from torch import nn

from cli import measure
from cli.builder import PREFILL_CHUNK, Prepared, meta_model, stored_model
from cli.quantize import MAX_RECEIPT_TOKENS
from generate.scheduler import slots_needed
from generate.score import CHUNK_NUMBERS
from generate.stats import weight_bytes_per_token
from model.config import ModelConfig
from model.kv_cache import KVCache, bytes_read
from model.loader import NOT_MAPPED, Mapped, weight_sources
from model.moe_experts import ExpertLinear
from model.transformer import Transformer
from quant.apply import replace_modules
from quant.convert import BLOCK_NUMBERS

FIRST_STEP_BYTES = 25_000_000
"""Libraries, threads and code that the first matrix products of a process bring along on a CPU."""
TORCHAO_BYTES = 88_000_000
"""Importing torchao."""
COMPILER_BYTES = 190_000_000
"""What the compiler takes in the process while it compiles a step, and part of it afterwards. A step that is kept from
an earlier run takes nothing.
"""
QUANTIZING_BYTES = {"optimized": 19, "plain": 13}
"""For each of the weights that go through torchao at once, what that takes meanwhile, itself included: where scales
are searched for (4 bits and fewer, without zero points), and where not.
"""
SAMPLING_BYTES = 32
"""For each entry of the vocabulary and sequence: logits, scaled, noise, scores."""


@dataclass(frozen=True)
class Needs:
    """Bytes. On a GPU all are those allocated on it, and `process` is 0."""

    weights: int
    weights_per_token: int
    """Of weights, that making a token reads."""
    max_seq_len: int
    """0 where the model is only written to a file."""
    slots: int
    """Sequences that there is room for in the cache."""
    cache: int
    """Keys and values of `max_seq_len` positions for each of them."""
    cache_read_first: int
    """Of keys and values, that making the first token of a text reads."""
    cache_read_full: int
    """The same when the context is full."""
    process: int
    """What the process has without any of it."""
    quantizer: int
    """What quantizing leaves: an imported library."""
    loading: int
    """At the peak of loading, or writing, with the weights that are there; beside process and quantizer."""
    mapped: int
    """Of `loading`, pages of files, which the system takes back when it needs them."""
    running: int
    """Weights, a full cache, and what a chunk of a prompt takes meanwhile; beside process and quantizer. Of a model
    that is written, what measuring its receipt takes.
    """
    compiler: int
    """What compiling takes on top of the peak, if it is not kept from an earlier run."""
    free: int
    """What there is, beside what the process has already."""

    @property
    def peak(self) -> int:
        return self.process + self.quantizer + max(self.loading, self.running)

    @property
    def more(self) -> int:
        """What must be free."""
        return self.quantizer + max(self.loading - self.mapped, self.running)

    @property
    def fits(self) -> bool:
        return self.more <= self.free


def planned_model(prepared: Prepared) -> Transformer:
    """The model as it will be, on the meta device."""
    model = meta_model(prepared.config).to(prepared.dtype.dtype)
    if prepared.plan is not None:
        replace_modules(model, prepared.plan, prepared.dtype.dtype)
    return model


def needs_of(prepared: Prepared, max_seq_len: int, num_seqs: int = 1, *, compares: bool = False) -> Needs:
    """What `num_seqs` sequences of `max_seq_len` positions need; with `max_seq_len` 0, what writing the model to a file
    needs, a weight at a time, and if it `compares`, measuring the receipt. Raises UserError as loading does for files
    that do not fit the configuration.
    """
    config, device, dtype = prepared.config, prepared.device.device, prepared.dtype.dtype
    model = planned_model(prepared)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    on_cpu, quantizes = device.type == "cpu", prepared.plan is not None and prepared.stored is None
    loading, mapped = _loading(prepared, model, keep=max_seq_len > 0)
    package = prepared.package
    compiles = max_seq_len > 0 and package is None and (prepared.settings.compile or prepared.settings.compile_prefill)
    slots = slots_needed(num_seqs if package is None else package.metadata.max_num_seqs) if max_seq_len else 0
    cache = KVCache.create(config, slots, max_seq_len, "meta", dtype).nbytes
    running = _comparing(prepared, model) if compares else 0
    if max_seq_len:
        running = weights + cache + _step(prepared, model, max_seq_len, num_seqs)
    return Needs(
        weights=weights,
        weights_per_token=weight_bytes_per_token(model),
        max_seq_len=max_seq_len,
        slots=slots,
        cache=cache,
        cache_read_first=bytes_read(config, 1, dtype),
        cache_read_full=bytes_read(config, max_seq_len, dtype),
        process=psutil.Process().memory_info().rss if on_cpu else 0,
        quantizer=TORCHAO_BYTES if quantizes and on_cpu else 0,
        loading=loading,
        mapped=mapped,
        running=running,
        compiler=COMPILER_BYTES if on_cpu and compiles else 0,
        free=measure.free_memory(device),
    )


def _step(prepared: Prepared, model: Transformer, context: int, num_seqs: int) -> int:
    """What a chunk that ends a context takes while it is read."""
    config, device, dtype = prepared.config, prepared.device.device, prepared.dtype.dtype
    tokens = min(PREFILL_CHUNK[device.type], context)
    size = step_bytes(config, tokens, context, dtype.itemsize, device.type)
    size += SAMPLING_BYTES * config.vocab_size * num_seqs
    if device.type != "cpu":
        return size
    # oneDNN lays a 16-bit weight out anew for a product with many rows.
    anew = max(map(_weight_at_once, model.layers.modules())) if dtype.itemsize == 2 else 0
    return size + FIRST_STEP_BYTES + anew


def _weight_at_once(module: nn.Module) -> int:
    """Bytes of a plain weight that one product takes."""
    if isinstance(module, ExpertLinear):
        return module.weight.nbytes // module.num_experts
    return module.weight.nbytes if isinstance(module, nn.Linear) else 0


def _comparing(prepared: Prepared, model: Transformer) -> int:
    """About what measuring a receipt takes: both models' output layers, logits of both in float32 and of one as they
    come, and a layer's work on all the text (`generate.score`).
    """
    config, dtype = prepared.config, prepared.dtype.dtype
    original = config.vocab_size * config.hidden_size * dtype.itemsize
    quantized = sum(parameter.nbytes for parameter in model.lm_head.parameters())
    work = step_bytes(config, MAX_RECEIPT_TOKENS, MAX_RECEIPT_TOKENS, dtype.itemsize, prepared.device.device.type)
    logits = 3 * 4 * min(CHUNK_NUMBERS, MAX_RECEIPT_TOKENS * config.vocab_size)
    return original + quantized + logits + work + FIRST_STEP_BYTES


def step_bytes(config: ModelConfig, tokens: int, context: int, itemsize: int, device_type: str) -> int:
    """About what one layer takes beside its weights and the cache while it reads `tokens` tokens that end a context of
    `context`: the wider of its two halves, as model/transformer.py computes them.
    """
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    feed_forward = tokens * (2 * D + 4 * F)
    if any(layer.experts for layer in config.layers):
        feed_forward = max(feed_forward, tokens * _of_experts(config, itemsize, device_type))
    attention = tokens * (2 * D + 3 * (N + 2 * K) * H)
    if context > tokens:  # keys and values out of the cache, once more for each head that shares them, and a mask
        attention += 2 * context * H * (K + (N if N > K else 0)) + tokens * context * 2
    return max(feed_forward, attention) * itemsize


def _of_experts(config: ModelConfig, itemsize: int, device_type: str) -> int:
    """Numbers for each token in a mixture of experts, as model/moe_experts.py computes them: on a GPU all experts at
    once, else one after the other, in the worst case one that all tokens were sent to.
    """
    D, F, C = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    single = 4 // itemsize  # sums are float32
    if device_type == "cuda":
        return 2 * D + C * max(D + 5 * F, F + 2 * D + 2 * D * single)
    return 2 * D + C * F + max(D + 4 * F, F + D + 2 * D * single)


def _loading(prepared: Prepared, model: Transformer, keep: bool) -> tuple[int, int]:
    """The peak of weights that are there already and files that are mapped, and the part of it that is mapped. Without
    `keep` no module's weights stay.
    """
    there, peak, at_peak, stay = 0, 0, 0, 0
    seen: set[int] = set()
    mapped_of = dict(_mapped(prepared))
    for name, module in model.named_modules():
        there = there if keep else 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                there += parameter.nbytes
        for mapped in mapped_of.get(name, ()):
            stay += mapped.at_once if mapped.stays else 0
            now = stay if mapped.stays else stay + mapped.at_once
            on_host = now if prepared.device.device.type == "cpu" else 0
            if there + on_host > peak:
                peak, at_peak = there + on_host, on_host
        meanwhile = there + _quantizing(prepared, name)
        if meanwhile > peak:
            peak, at_peak = meanwhile, 0
    return peak, at_peak


def _quantizing(prepared: Prepared, name: str) -> int:
    """What quantizing a module takes meanwhile, beside the numbers that come of it."""
    assignment = None if prepared.plan is None or prepared.stored is not None else prepared.plan.assignment(name)
    if assignment is None or assignment.shares is not None:
        return 0
    (N, K), args = assignment.shape, assignment.args
    way = "optimized" if args.bits <= 4 and not args.has_weight_zeros else "plain"
    return QUANTIZING_BYTES[way] * min(N * K, BLOCK_NUMBERS[prepared.device.device.type])


def _mapped(prepared: Prepared) -> Iterator[tuple[str, list[Mapped]]]:
    """Of each module what reading its parameters maps."""
    if prepared.settings.random_weights or prepared.package is not None:  # a package's weights themselves are mapped
        return
    assert prepared.path is not None
    if prepared.stored is not None:
        model, source_of = stored_model(prepared, prepared.path)
    else:
        model = meta_model(prepared.config)
        source_of = weight_sources(model, prepared.path, prepared.device.device, prepared.dtype.dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {id(parameter): parameter for parameter in module.parameters(recurse=False)}
        new = {key: parameter for key, parameter in own.items() if key not in seen}
        seen |= set(new)
        yield name, [source_of(names[key], parameter).mapped for key, parameter in new.items()] or [NOT_MAPPED]
