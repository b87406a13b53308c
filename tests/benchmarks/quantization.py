"""What quantizing costs and gives: every scheme and ready-made recipe, on this machine.

Quality is the built-in model's, on stories that it never saw, beside the same model unquantized in the same precision.
Speed is that of one-token steps of a model of the registry whose numbers are random, quantized ones too: a step does
the same work on them. The last line on stdout is a JSON document.
"""

import argparse
import dataclasses
import gc
import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from cli.builder import Prepared, load_model, make_engine, meta_model, prepare
from cli.measure import GREEDY, ROOM, fill_cache, measure_decode, measure_machine
from cli.quantize import HELD_OUT, MAX_RECEIPT_TOKENS
from cli.random_weights import RANDOM_PERIOD, RandomParameter, idle_norms
from config.errors import UserError
from config.settings import BuildSettings, Setting
from generate.score import Resident, Windows, compare, perplexity
from generate.stats import Ledger, weight_bytes_per_token
from model.device import device_name, give_back_freed_memory
from model.loader import fill_parameters
from model.transformer import Transformer
from quant.apply import replace_modules
from quant.recipe import READY_MADE, read_recipe

UNQUANTIZED = "unquantized"
WINDOW = 512
SCHEMES: dict[str, dict[str, Any]] = {
    "linear:int8": {"linear:int8": {}},
    "linear:int8 32": {"linear:int8": {"groupsize": 32}},
    "linear:a8w8dq": {"linear:a8w8dq": {}},
    "linear:fp8": {"linear:fp8": {}},
    "linear:fp8dq": {"linear:fp8dq": {}},
    "linear:int4 32": {"linear:int4": {"groupsize": 32}},
    "linear:int4 64": {"linear:int4": {"groupsize": 64}},
    "linear:int4 128": {"linear:int4": {"groupsize": 128}},
    "linear:int4 256": {"linear:int4": {"groupsize": 256}},
    "linear:a8w4dq 32": {"linear:a8w4dq": {"groupsize": 32}},
    "linear:a8wxdq 8 bits": {"linear:a8wxdq": {"bitwidth": 8}},
    "linear:a8wxdq 4 bits": {"linear:a8wxdq": {"bitwidth": 4}},
    "linear:a8wxdq 3 bits": {"linear:a8wxdq": {"bitwidth": 3}},
    "linear:afpwx 6 bits": {"linear:afpwx": {"bitwidth": 6}},
    "linear:afpwx 4 bits": {"linear:afpwx": {"bitwidth": 4}},
    "linear:afpwx 3 bits": {"linear:afpwx": {"bitwidth": 3}},
    "linear:afpwx 2 bits": {"linear:afpwx": {"bitwidth": 2}},
    "embedding 8 bits": {"embedding": {"bitwidth": 8}},
    "embedding 4 bits, 32": {"embedding": {"bitwidth": 4, "groupsize": 32}},
    "embedding:wx 4 bits": {"embedding:wx": {"bitwidth": 4}},
}


def recipes() -> dict[str, str | None]:
    """Name -> recipe as it is spelled out. Ready-made ones that are the same are one."""
    found: dict[str, str | None] = {UNQUANTIZED: None}
    found |= {name: read_recipe(json.dumps(recipe), name).text for name, recipe in SCHEMES.items()}
    names: dict[str, list[str]] = {}
    for name in READY_MADE:
        names.setdefault(read_recipe(name, name).text, []).append(name)
    return found | {", ".join(same): text for text, same in names.items()}


@dataclass(frozen=True)
class Run:
    """What is measured how."""

    args: argparse.Namespace

    def prepared(self, model: str, recipe: str | None, **flags: bool) -> Prepared:
        device, dtype = Setting(self.args.device, "--device"), Setting(self.args.dtype, "--dtype")
        source = None if recipe is None else "the recipe"
        return prepare(BuildSettings(model, device, dtype, quantize=recipe, quantize_source=source, **flags))

    def original(self) -> tuple[Transformer, Windows]:
        """The built-in model, and the text that receipts are measured on."""
        known = self.prepared("default", None)
        assert known.tokenizer is not None
        texts = json.loads(HELD_OUT.read_text(encoding="utf-8"))["texts"]
        ids = [known.tokenizer.encode(text, bos=False) for text in texts]
        windows = Windows.of(ids, WINDOW, known.tokenizer.bos_id, MAX_RECEIPT_TOKENS)
        return load_model(known, WINDOW), windows

    def quality(self, recipe: str | None, original: Transformer, windows: Windows) -> dict[str, Any]:
        known = self.prepared("default", recipe)
        model = original if recipe is None else load_model(known, WINDOW)
        device, dtype = known.device.device, known.dtype.dtype
        found = compare(model, Resident(), original, Resident(), windows, device, dtype)
        measured, reference = perplexity(found.loss), perplexity(found.reference_loss)
        return {
            "tokens": found.tokens,
            "perplexity": measured,
            "perplexity_change": measured / reference - 1,
            "kl_divergence": found.divergence,
            "top1_agreement": found.agreement,
        }

    def speed(self, recipe: str | None) -> dict[str, Any]:
        """Of a model whose numbers are random: choosing them would take longer than all the rest."""
        known = self.prepared(self.args.model, recipe, random_weights=True)
        model = random_model(known)
        nbytes = weight_bytes_per_token(model)
        result: dict[str, Any] = {"weight_bytes_per_token": nbytes}
        for compiled in (False,) if self.args.no_compile else (False, True):
            settings = dataclasses.replace(known.settings, compile=compiled)
            mine = dataclasses.replace(known, settings=settings, ledger=Ledger(weight_bytes_per_token=nbytes))
            with tempfile.TemporaryDirectory(prefix="torchchat-bench-") as directory:
                engine = make_engine(mine, model, self.args.context + ROOM, self.args.keep or Path(directory))
                engine.prepare(GREEDY)
                fill_cache(engine.cache)
                rate = measure_decode(engine, self.args.context, 1, self.args.repeats, lambda: None)
            result["compiled_tok_s" if compiled else "eager_tok_s"] = rate.tok_s
            del engine
        return result


def random_model(prepared: Prepared) -> Transformer:
    """The model with any numbers in the place of its own; those of quantized weights are as many bits as theirs."""
    dtype, device = prepared.dtype.dtype, prepared.device.device
    model = meta_model(prepared.config)
    if prepared.plan is not None:
        replace_modules(model, prepared.plan, dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(RANDOM_PERIOD, generator=generator)
    bytes_ = torch.randint(256, (RANDOM_PERIOD,), generator=generator, dtype=torch.uint8)
    patterns = {
        dtype: (noise * 0.02).to(device, dtype),
        torch.float8_e4m3fn: noise.to(torch.float8_e4m3fn).to(device),
        torch.uint8: bytes_.to(device),
        torch.int8: bytes_.view(torch.int8).to(device),
    }
    values = idle_norms(model)

    def source(name: str, meta: nn.Parameter) -> RandomParameter:
        pattern = patterns.get(meta.dtype, patterns[dtype])  # what is not quantized is float32 on the meta device
        return RandomParameter(pattern, meta.shape, 2e-4 if name.endswith(".scale") else values.get(id(meta)))

    fill_parameters(model, source)
    return model


def row(name: str, measured: dict[str, Any]) -> str:
    def cell(key: str, form: str, factor: float = 1.0) -> str:
        return format(measured[key] * factor, form) if key in measured else "-"

    cells = [
        cell("perplexity", ".3f"), cell("perplexity_change", "+.2%"), cell("kl_divergence", ".4f"),
        cell("top1_agreement", ".1%"), cell("weight_bytes_per_token", ",.0f", 1e-6), cell("eager_tok_s", ".1f"),
        cell("compiled_tok_s", ".1f"),
    ]  # fmt: skip
    return f"{name:<24}" + "".join(f"{text:>11}" for text in cells)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, a row each. Raises UserError."""
    run = Run(args)
    known_names, keys = recipes(), args.only or [""]
    wanted = {
        name: text
        for name, text in known_names.items()
        if any(name == key or (key not in known_names and name.startswith(key)) for key in keys)
    }
    if not wanted:
        raise UserError(f"--only {', '.join(keys)}: there are {'; '.join(known_names)}")
    known = run.prepared(args.model, None, random_weights=True)
    device, dtype = known.device.device, known.dtype
    machine = measure_machine(device, dtype.dtype)
    print(f"{device_name(device)}, {dtype.name}, reads {machine.read_gb_s:.1f} GB/s; speed: {args.model}", flush=True)
    heads = ("perplexity", "change", "KL", "top-1", "MB a token", "eager", "compiled")
    print(" " * 24 + "".join(f"{head:>11}" for head in heads), flush=True)
    reference = None if args.no_quality else run.original()
    results: dict[str, dict[str, Any]] = {}
    for name, recipe in wanted.items():
        results[name] = {} if reference is None else run.quality(recipe, *reference)
        if not args.no_speed:
            results[name] |= run.speed(recipe)
        gc.collect()
        give_back_freed_memory()
        print(row(name, results[name]), flush=True)
    return {
        "machine": {
            "device": device.type,
            "name": device_name(device),
            "threads": torch.get_num_threads(),
            "copy_gb_s": machine.copy_gb_s,
            "read_gb_s": machine.read_gb_s,
        },
        "settings": {"model": args.model, "dtype": dtype.name, "context": args.context, "repeats": args.repeats},
        "versions": {"torch": torch.__version__, "torchao": version("torchao"), "python": platform.python_version()},
        "recipes": results,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.2-1b", help="whose shapes are timed (default: %(default)s)")
    parser.add_argument("--device", default="fast", choices=("fast", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--context", type=int, default=128, help="tokens before those that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many runs (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", metavar="KEY", help="the row KEY, or those that begin so; may be repeated"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what is compiled there, for another run")
    parser.add_argument("--no-compile", action="store_true", help="time eager steps alone")
    parser.add_argument("--no-quality", action="store_true", help="leave out perplexity, KL divergence and top-1")
    parser.add_argument("--no-speed", action="store_true", help="leave out tokens a second")
    args = parser.parse_args()
    if min(args.context, args.repeats) < 1:
        parser.error("--context and --repeats are at least 1")
    try:
        document = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
