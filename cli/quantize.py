"""The command `quantize`: a model in a directory of its own, quantized, with a receipt of what that cost. Checks what
is asked for and shows what came of it; `cli.saving` does it. Imports torch only once the flags are known to be good.
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.console import human_bytes, status, warn
from cli.hub import locate
from cli.options import add_model_arguments, build_settings
from config.errors import UserError
from config.settings import BuildSettings

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from cli.builder import Prepared
    from cli.saving import Sizes
    from quant.receipt import Receipt

HELD_OUT = Path(__file__).resolve().parent.parent / "model" / "default" / "held_out.json"
MAX_TEXT_BYTES = 64 << 20
MAX_RECEIPT_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `quantize`. What decides how steps run is none of them: nothing is run."""
    add_model_arguments(parser, ("device", "dtype", "quantize"))
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="the directory to make; it must be new, or empty"
    )
    group.add_argument(
        "--no-receipt",
        action="store_true",
        help="leave out the quality receipt: perplexity, KL divergence, top-1 agreement, beside the unquantized model",
    )
    group.add_argument(
        "--receipt-text",
        metavar="FILE",
        type=Path,
        help=f"measure the receipt on this UTF-8 text, on {MAX_RECEIPT_TOKENS:,} tokens at most (default: ten stories "
        "that the built-in model never saw)",
    )
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print one JSON document on stdout and nothing else there"
    )


@dataclass(frozen=True)
class ReceiptText:
    """What a receipt is measured on."""

    name: str
    sha256: str
    texts: tuple[str, ...]


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 once the directory is there. Raises UserError."""
    settings = _settings(args)
    output = checked_output(args.output)
    text = _receipt_text(args)
    locate(settings.model)  # a wrong name is told at once

    # Torch from here on.
    from cli.builder import out_of_memory, prepare
    from cli.explain_report import show_explanation
    from cli.saving import job_of, save

    prepared = prepare(settings, needs_tokenizer=False)
    if text is not None and prepared.tokenizer is None:
        if args.receipt_text is not None:
            raise UserError(f"--receipt-text {args.receipt_text}: {prepared.name} has no tokenizer to read it with")
        text = None
        warn(f"no quality receipt: {prepared.name} has no tokenizer to read a text with")
    job = job_of(prepared, output, text)
    assert prepared.plan is not None
    if args.explain:
        return show_explanation(prepared, 0, compares=text is not None, as_json=args.json)
    device, dtype = prepared.device, prepared.dtype
    status(
        f"{settings.model} · {device.device.type} ({device.why}) · {dtype.name} ({dtype.why}) · "
        f"{prepared.plan.describe()}"
    )
    for remark in prepared.remarks():
        status(remark)
    for partial in sorted(output.parent.glob(f".{output.name}.*.partial")):
        warn(f"{partial} is left from a run that was interrupted, unless it still runs: it may be removed")
    began = time.perf_counter()
    with out_of_memory(prepared, 0):
        sizes, receipt = save(job)
    _show(args, prepared, output, sizes, receipt, time.perf_counter() - began)
    return 0


def checked_output(path: Path, flag: str = "--output") -> Path:
    """Where the directory will be, once it is sure that it can be put there. Raises UserError."""
    where = f"{flag} {path}"
    try:
        output = path.expanduser().resolve()
        if output.exists() and not output.is_dir():
            raise UserError(f"{where}: is a file; name a new directory")
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{where}: is not empty; name a new directory, or empty it")
        if output.is_dir() and (output == Path.cwd() or os.path.ismount(output)):
            raise UserError(f"{where}: is in use itself; name a new directory in it")
        if not output.parent.is_dir():
            raise UserError(f"{where}: there is no directory {output.parent} to make it in")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: cannot be a directory: {error}") from error
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {output.parent} is not writable")
    return output


def _settings(args: argparse.Namespace) -> BuildSettings:
    remarks: list[str] = []
    settings = build_settings(args, os.environ, remarks.append)
    if settings.quantize is None:
        given = args.quantize is not None or os.environ.get("TORCHCHAT_QUANTIZE")
        why = "the recipe quantizes nothing, so that there is nothing to write" if given else "a recipe is needed"
        raise UserError(f"--quantize: {why}; give one, such as --quantize cpu (see docs/quantization.md)")
    for remark in remarks:
        warn(remark)
    return settings


def _receipt_text(args: argparse.Namespace) -> ReceiptText | None:
    if args.receipt_text is None:
        if args.no_receipt:
            return None
        document = json.loads(HELD_OUT.read_text(encoding="utf-8"))
        return ReceiptText(document["name"], hashlib.sha256("\0".join(document["texts"]).encode()).hexdigest(),
                           tuple(document["texts"]))  # fmt: skip
    where = f"--receipt-text {args.receipt_text}"
    if args.no_receipt:
        raise UserError(f"{where} and --no-receipt contradict each other; leave one out")
    try:
        with args.receipt_text.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8 text") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise UserError(f"{where}: cannot be read: {error}") from error
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"{where}: is over {MAX_TEXT_BYTES >> 20} MB; a part of it is enough")
    return ReceiptText(args.receipt_text.name, hashlib.sha256(data).hexdigest(), (text,))


def _show(
    args: argparse.Namespace, prepared: "Prepared", output: Path, sizes: "Sizes", receipt: "Receipt | None", s: float
) -> None:
    from model.device import peak_memory_bytes

    plan, peak = prepared.plan, peak_memory_bytes(prepared.device.device)
    assert plan is not None
    if args.json:
        document: dict[str, Any] = {
            "output": str(output),
            "settings": {
                "model": prepared.name,
                "device": prepared.device.device.type,
                "dtype": prepared.dtype.name,
                "quantize": json.loads(prepared.settings.quantize or "{}"),
            },
            "weight_bytes": plan.nbytes,
            "unquantized_bytes": plan.original_nbytes,
            "file_bytes": sizes.file_bytes,
            "quantize_s": sizes.quantize_s,
            "receipt_s": sizes.receipt_s,
            "total_s": s,
            "peak_memory_bytes": peak,
            "receipt": receipt.document() if receipt is not None else None,
        }
        print(json.dumps(document))
        return
    print(f"{output}: {human_bytes(plan.nbytes)} of weights, {human_bytes(plan.original_nbytes)} unquantized")
    for line in receipt.lines() if receipt is not None else ():
        print(f"  {line}")
    status(
        f"quantized in {sizes.quantize_s:.1f} s"
        + (f", measured in {sizes.receipt_s:.1f} s" if receipt is not None else "")
        + f", {human_bytes(peak)} of memory at the peak; torchchat generate {args.output}"
    )
