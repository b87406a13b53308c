"""Eager torchchat against eager Transformers: one machine, one process, the same random weights in the same memory.

Reading prompts and making tokens are timed in turn, ours and theirs, so that what disturbs one disturbs the other.
Theirs is its model with its cache and an argmax, without what its `generate` adds. The last line on stdout is a JSON
document.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import Tensor, nn

from cli.builder import Built, build, prepare
from cli.measure import decode_step_seconds, fill_cache, measure_machine, prefill_seconds, random_prompt
from config.errors import UserError
from config.registry import find
from config.settings import BuildSettings, Setting
from model.device import device_name, synchronize
from model.weight_names import WeightNames

MOST_DIFFERENT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
"""How far the logits may be apart, relative to their size, for the two to be the same model in a precision."""


def theirs(built: Built) -> Any:
    """Transformers' model, whose parameters are views of ours."""
    device = built.prepared.device.device
    entries = dict(find(built.prepared.name).config)
    config = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=built.prepared.dtype.dtype).eval()
    names = WeightNames(dict(model.named_parameters()), built.prepared.config)
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            start = 0
            for part in names.parts(name, parameter.shape[0]):
                module, _, leaf = part.name.rpartition(".")
                rows = parameter.data[start : start + part.rows]
                setattr(model.get_submodule(module), leaf, nn.Parameter(rows, requires_grad=False))
                start += part.rows
    model.tie_weights()
    # The one module that holds more than parameters; on the meta device its values were never made.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model


def difference(built: Built, model: Any, tokens: int) -> float:
    """How far the two models' logits after a prompt are apart: |a - b| / |b|."""
    ids = prompt_tensor(built, tokens)
    zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
    cache = built.engine.cache
    their_logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    our_logits = built.model(ids, zero, cache, zero, tokens, zero + tokens - 1)[0].float()
    return float((our_logits - their_logits).norm() / their_logits.norm())


def prompt_tensor(built: Built, tokens: int) -> Tensor:
    ids = random_prompt(tokens, built.prepared.config.vocab_size)
    return torch.tensor([ids], device=built.prepared.device.device)


def their_prefill_seconds(built: Built, model: Any, tokens: int) -> float:
    """As `prefill_seconds`: from token ids on the host to the first new one there.

    The output layer is called apart from their forward, with a row of its own. Their forward gives it a slice of all
    rows, for which torch on a CPU copies the whole output matrix first: seconds that are not theirs to answer for.
    """
    synchronize(built.prepared.device.device)
    began = time.perf_counter()
    ids = prompt_tensor(built, tokens)
    cache = transformers.DynamicCache(config=model.config)
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1].contiguous()).argmax(-1).item()
    return time.perf_counter() - began


class TheirDecode:
    """Steps of their model after a context that was read once."""

    def __init__(self, built: Built, model: Any, context: int) -> None:
        self.device, self.model, self.context = built.prepared.device.device, model, context
        self.ids = prompt_tensor(built, context)
        self.cache = transformers.DynamicCache(config=model.config)
        model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step_seconds(self, steps: int) -> float:
        """As `decode_step_seconds`, without reading a token on the host between the steps."""
        if (extra := self.cache.get_seq_length() - self.context) > 0:
            self.cache.crop(-extra)
        token = self._steps(self.ids[:, -1:], 3)
        synchronize(self.device)
        began = time.perf_counter()
        self._steps(token, steps).item()
        return (time.perf_counter() - began) / steps

    def _steps(self, token: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            logits = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        return token


def in_turn(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """The medians of both, run in turn `repeats` times after once for warm-up."""
    pairs = [(ours(), other()) for _ in range(repeats + 1)][1:]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def row(name: str, length: int, tokens: int, seconds: tuple[float, float]) -> dict[str, float]:
    """One comparison, shown and as JSON: rates of `tokens` tokens in these seconds, and ours over theirs."""
    our_tok_s, their_tok_s = (tokens / value for value in seconds)
    ratio = our_tok_s / their_tok_s
    phase = "read" if name == "tokens" else "after"
    print(f"{phase:<6}{length:>7,}{our_tok_s:>12,.1f}{their_tok_s:>14,.1f} tok/s{ratio:>8.2f}x", flush=True)
    return {name: length, "torchchat_tok_s": our_tok_s, "transformers_tok_s": their_tok_s, "ratio": ratio}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Build both, hold them against each other, and time them. Raises UserError."""
    settings = BuildSettings(
        model=args.model,
        device=Setting(args.device, "--device"),
        dtype=Setting(args.dtype, "--dtype"),
        max_seq_len=max(*args.prefill_tokens, *args.context) + args.steps + 8,
        random_weights=True,
    )
    built = build(prepare(settings))
    device, dtype = built.prepared.device.device, built.prepared.dtype
    model = theirs(built)
    apart = difference(built, model, min(args.prefill_tokens))
    if not apart < MOST_DIFFERENT[dtype.name]:
        raise UserError(f"the two do not compute the same: their logits are {apart:.1%} apart")
    machine = measure_machine(device, dtype.dtype)
    print(f"{built.prepared.name}, {dtype.name}, {device_name(device)}: logits {apart:.2%} apart")
    print(f"{'':<13}{'torchchat':>12}{'Transformers':>14}")
    prefill, decode = [], []
    for tokens in args.prefill_tokens:
        ours, other = (
            lambda tokens=tokens: prefill_seconds(built.engine, tokens),
            lambda tokens=tokens: their_prefill_seconds(built, model, tokens),
        )
        prefill.append(row("tokens", tokens, tokens, in_turn(ours, other, args.repeats)))
    fill_cache(built.engine.cache)
    for context in args.context:
        their_steps = TheirDecode(built, model, context)
        ours, other = (
            lambda context=context: decode_step_seconds(built.engine, context, 1, args.steps),
            lambda their_steps=their_steps: their_steps.step_seconds(args.steps),
        )
        decode.append(row("context", context, 1, in_turn(ours, other, args.repeats)))
    return {
        "machine": {
            "device": device.type,
            "name": device_name(device),
            "threads": torch.get_num_threads(),
            "copy_gb_s": machine.copy_gb_s,
            "read_gb_s": machine.read_gb_s,
            "matrix_tflop_s": machine.matrix_tflop_s,
        },
        "settings": {"model": built.prepared.name, "dtype": dtype.name, "repeats": args.repeats, "steps": args.steps},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "logits_apart": apart,
        "prefill": prefill,
        "decode": decode,
    }


def whole_numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("lengths are at least 1")
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llama3.2-1b", help="a name of the registry (default: %(default)s)")
    parser.add_argument("--device", default="fast", choices=("fast", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="fast", choices=("fast", "fast16", "bf16", "fp16", "fp32"))
    parser.add_argument("--prefill-tokens", type=whole_numbers, default=[128, 512], metavar="N,N,…")
    parser.add_argument("--context", type=whole_numbers, default=[128, 1024], metavar="N,N,…")
    parser.add_argument("--steps", type=int, default=16, help="decode steps timed together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="medians of so many runs (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.repeats) < 1:
        parser.error("--steps and --repeats are at least 1")
    try:
        # Our engine runs in inference mode by itself; theirs shall have no less.
        with torch.inference_mode():
            document = compare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
