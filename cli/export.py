"""The command `export`: a model taken along, as a package of compiled code and weights, or as a directory of weights.
Checks what is asked for and shows what came of it; `cli.exporting` and `cli.saving` do it. Imports torch only once the
flags are known to be good.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cli.console import describe_build, human_bytes, status
from cli.hub import locate
from cli.options import add_model_arguments, build_settings, whole_number
from cli.quantize import checked_output
from config.errors import UserError
from config.registry import EXPORTED_ENDING, PTE_ENDING
from config.settings import BuildSettings, Setting

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from cli.builder import Prepared
    from cli.exporting import Exported

MOST_SEQUENCES = 256
PACKAGED = ("cpu", "cuda")
"""Devices that a package can be for."""
PACKAGE_FLAG, SNAPSHOT_FLAG = "--output-aoti-package-path", "--output-snapshot-path"
PTE_FLAG = "--output-pte-path"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `export`: those that customize, but for compiling, which exporting is."""
    add_model_arguments(parser, ("device", "dtype", "quantize", "max_seq_len"))
    group = parser.add_argument_group("what is written")
    group.add_argument(
        PACKAGE_FLAG,
        metavar=f"FILE{EXPORTED_ENDING}",
        type=Path,
        help="one file with compiled code, weights and tokenizer, which every command takes as MODEL and runs without "
        "compiling",
    )
    group.add_argument(
        "--max-num-seqs",
        metavar="N",
        type=whole_number(1, MOST_SEQUENCES),
        help="how many sequences such a file can run at a time, as a server does (default: 1)",
    )
    group.add_argument(
        SNAPSHOT_FLAG,
        metavar="DIR",
        type=Path,
        help="a directory with the customized weights as safetensors, which loads like that of any model; it must be "
        "new, or empty",
    )
    group.add_argument(
        PTE_FLAG,
        metavar=f"FILE{PTE_ENDING}",
        type=Path,
        help="one file for ExecuTorch with XNNPACK, in fp32, which generate and chat take as --pte-path; it needs the "
        "extra [executorch]",
    )
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print one JSON document on stdout and nothing else there"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 once all that was asked for is there. Raises UserError, and OSError as the disk does."""
    settings = build_settings(args, os.environ)
    package, snapshot = args.output_aoti_package_path, args.output_snapshot_path
    if args.output_pte_path is not None:
        return _run_pte(args, settings)
    if package is None and snapshot is None:
        raise UserError(
            f"what is to be written? {PACKAGE_FLAG} names a file for the compiled model, {PTE_FLAG} one for "
            f"ExecuTorch, {SNAPSHOT_FLAG} a directory for the weights alone"
        )
    if package is None and (args.max_seq_len is not None or args.max_num_seqs is not None):
        given = "--max-seq-len" if args.max_seq_len is not None else "--max-num-seqs"
        raise UserError(f"{given} is without effect on weights alone: leave it out, or give {PACKAGE_FLAG}")
    package = None if package is None else checked_file(package, PACKAGE_FLAG, EXPORTED_ENDING)
    snapshot = None if snapshot is None else checked_output(snapshot, SNAPSHOT_FLAG)
    locate(settings.model)  # a wrong name is told at once

    # Torch from here on.
    from cli.builder import context_length, prepare
    from cli.explain_report import show_explanation
    from cli.exporting import check_can_export, export
    from cli.saving import save_snapshot

    prepared = prepare(settings, needs_tokenizer=False)
    _check_is_original(prepared, snapshot)
    num_seqs = args.max_num_seqs or 1
    if package is not None:
        check_can_export(prepared, package)
    if args.explain:
        length = context_length(prepared) if package is not None else 0
        return show_explanation(prepared, length, num_seqs, as_json=args.json)
    status(describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan))
    for remark in prepared.remarks():
        status(remark)
    snapshot_bytes = None if snapshot is None else save_snapshot(prepared, snapshot)
    if snapshot_bytes is not None and not args.json:
        print(f"{snapshot}: {human_bytes(snapshot_bytes)} of weights")
    made = None if package is None else export(prepared, package, num_seqs)
    if args.json:
        print(json.dumps(_document(prepared, package, made, snapshot, snapshot_bytes, num_seqs)))
    elif package is not None and made is not None:
        _show(package, made)
    return 0


def _run_pte(args: argparse.Namespace, settings: BuildSettings) -> int:
    """`run` for ExecuTorch: always in fp32 on the CPU, one sequence at a time, and so by itself."""
    others = {PACKAGE_FLAG: args.output_aoti_package_path, SNAPSHOT_FLAG: args.output_snapshot_path}
    for flag, value in {**others, "--max-num-seqs": args.max_num_seqs}.items():
        if value is not None:
            raise UserError(
                f"{PTE_FLAG} is in fp32, for the CPU and one sequence at a time: leave out {flag}, or export twice"
            )
    for setting, value in ((settings.device, "cpu"), (settings.dtype, "fp32")):
        if setting.value not in ("fast", value):
            raise UserError(f"{setting.source} {setting.value}: {PTE_FLAG} writes for {value} alone: leave it out")
    output = checked_file(args.output_pte_path, PTE_FLAG, PTE_ENDING)
    locate(settings.model)

    # Torch from here on.
    from cli.builder import context_length, prepare
    from cli.explain_report import show_explanation
    from cli.exporting_pte import check_can_export, export_pte

    fixed = dataclasses.replace(settings, device=Setting("cpu", PTE_FLAG), dtype=Setting("fp32", PTE_FLAG))
    prepared = prepare(fixed, needs_tokenizer=False)
    _check_is_original(prepared, None)
    check_can_export(prepared, output)
    if args.explain:
        return show_explanation(prepared, context_length(prepared), 1, as_json=args.json)
    status(describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan))
    made = export_pte(prepared, output)
    if args.json:
        recipe = prepared.settings.quantize
        described = {"model": prepared.name, "quantize": None if recipe is None else json.loads(recipe)}
        print(json.dumps({"settings": described, "pte": {"path": str(output), **vars(made)}}))
        return 0
    print(f"{output}: {human_bytes(made.file_bytes)}")
    status(
        f"lowered in {made.lower_s:.1f} s; {made.tokens} tokens are those of the eager model, and their logits "
        f"within {made.difference:.2g} of its own; torchchat generate --pte-path {output}"
    )
    return 0


def _check_is_original(prepared: "Prepared", snapshot: Path | None) -> None:
    if prepared.package is not None:
        raise UserError(f"{prepared.path}: is exported already; name the model that it was exported from")
    if snapshot is not None and prepared.stored is not None:
        raise UserError(
            f"{SNAPSHOT_FLAG}: {prepared.path} is such a directory already ({prepared.stored.recipe.text}): copy it, "
            f"or name the original, {prepared.stored.source}"
        )


def checked_file(path: Path, flag: str, ending: str) -> Path:
    """Where the file will be, once it is sure that it can be put there. Raises UserError."""
    where = f"{flag} {path}"
    try:
        output = path.expanduser().resolve()
        if output.suffix != ending:
            raise UserError(f"{where}: give it a name that ends in {ending}, by which it is known")
        if output.exists() and not output.is_file():
            raise UserError(f"{where}: is no file; name a new one")
        if not output.parent.is_dir():
            raise UserError(f"{where}: there is no directory {output.parent} to put it in")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: cannot be a file: {error}") from error
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {output.parent} is not writable")
    return output


def _show(package: Path, made: "Exported") -> None:
    print(
        f"{package}: {human_bytes(made.file_bytes)}, of which {human_bytes(made.weight_bytes)} are weights and "
        f"{human_bytes(made.code_bytes)} code"
    )
    status(
        f"compiled in {made.compile_s:.1f} s; {made.tokens} tokens are those of the eager model, and their logits "
        f"within {made.difference:.2g} of its own; torchchat generate {package}"
    )


def _document(
    prepared: "Prepared",
    package: Path | None,
    made: "Exported | None",
    snapshot: Path | None,
    snapshot_bytes: int | None,
    num_seqs: int,
) -> dict[str, object]:
    """What --json prints; its keys are a promise."""
    recipe = prepared.settings.quantize
    return {
        "settings": {
            "model": prepared.name,
            "device": prepared.device.device.type,
            "dtype": prepared.dtype.name,
            "quantize": None if recipe is None else json.loads(recipe),
            "max_num_seqs": num_seqs,
        },
        "aoti_package": None if made is None else {"path": str(package), **vars(made)},
        "snapshot": None if snapshot is None else {"path": str(snapshot), "weight_bytes": snapshot_bytes},
    }
