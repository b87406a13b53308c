"""An exported model as MODEL: which settings it fixes, whether it runs here, and its weights and steps. Nothing of it
is traced or compiled. Knows packages and settings; `cli.exporting` makes them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from cli.console import cache_dir_or_say, warn
from config.cache import atomic_write
from config.errors import UserError
from config.registry import EXPORTED_ENDING
from config.settings import BuildSettings, Setting, shorten
from generate.artifacts import step_sources
from generate.backends import ARTIFACT, Program, load_package
from generate.exported import AOTINDUCTOR, ExportedSteps
from model.environment import Environment
from model.export import ARTIFACTS, FILES, NATIVE, PROGRAMS, Package, open_package
from model.native import load_op_library
from model.transformer import Transformer
from quant import native

if TYPE_CHECKING:  # it imports this module
    from cli.pte import Pte

QUANTIZED_OPS = "quantized.so"
MADE_HERE = "exported.txt"
"""Digests of packages that were exported by this user on this machine, in the cache directory."""
MOST_REMEMBERED = 1000


@contextmanager
def contents(settings: BuildSettings, path: Path | None) -> Iterator[tuple[BuildSettings, Path | None, Package | None]]:
    """For a model at `path`: the settings that it leaves open, where its small files are, and its package if it is
    exported. The files of a package are there for as long as this is open. Raises UserError.
    """
    if path is None or path.suffix != EXPORTED_ENDING:
        yield settings, path, None
        return
    package = open_package(path)
    settings = fixed(settings, package)
    check_runs_here(package)
    package.check_code()
    try:
        with package.unpacked(FILES) as directory:
            yield settings, directory, package
    except OSError as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from error


def fixed(settings: BuildSettings, package: "Package | Pte") -> BuildSettings:
    """The settings that the package, or program of ExecuTorch's, was exported with. Raises UserError for a flag that
    asks for others, and says so where the environment does.
    """
    facts = package.metadata
    name = package.path.name
    held = {
        "device": f"for {facts.device}" if settings.device.value not in ("fast", facts.device) else None,
        "dtype": f"in {facts.dtype}",
        "quantize": "unquantized" if facts.recipe is None else "quantized",
        "compile": "compiled",
        "compile_prefill": "compiled",
        "max_seq_len": f"with a context of {facts.max_seq_len}",
    }
    for setting, value in held.items():
        source = settings.source(setting)
        if source == Setting.source or value is None:
            continue
        if source.startswith("TORCHCHAT_"):
            warn(f"{source} is without effect: {name} was exported {value}")
        else:
            raise UserError(
                f"{source}: {name} was exported {value}, which stays so: leave it out, or export the model again"
            )
    return dataclasses.replace(
        settings,
        device=Setting(facts.device, name),
        dtype=Setting(facts.dtype, name),
        compile=True,
        compile_prefill=True,
        quantize=None,
        quantize_source=None,
        max_seq_len=facts.max_seq_len,
        max_num_seqs=min(settings.max_num_seqs, facts.max_num_seqs),
        sources={**settings.sources, **dict.fromkeys(("compile", "compile_prefill", "max_seq_len", "quantize"), name)},
    )


def check_runs_here(package: Package) -> None:
    """Raises UserError for another torch, processor or GPU, and for sources whose kernels it calls by name."""
    facts = package.metadata
    device = torch.device(facts.device)
    if facts.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{package.path}: was exported for cuda, and torch sees no GPU here: export it for cpu")
    runs_python = facts.form != AOTINDUCTOR
    needed = Environment(
        facts.torch, facts.python, facts.cuda, facts.platform, tuple(facts.instructions), facts.capability
    )
    why = needed.missing(Environment.here(device, runs_python))
    if why is None and runs_python and facts.source != step_sources():
        why = "from other sources of torchchat than these, whose kernels it calls"
    if why is not None:
        raise UserError(f"{package.path}: was exported {why}: export the model again here")


def sequences_of(package: Package, wanted: int | None, flag: str = "--max-num-seqs") -> int:
    """How many sequences run at a time. Raises UserError for more than the package was exported for."""
    most = package.metadata.max_num_seqs
    if wanted is not None and wanted > most:
        many = f"{most} sequence{'s' * (most > 1)} at a time"
        raise UserError(
            f"{flag} {wanted}: {package.path.name} was exported for {many}: ask for no more, or export it with "
            f"--max-num-seqs {wanted}"
        )
    return most if wanted is None else wanted


def load_model(package: Package, model: Transformer, device: torch.device) -> Transformer:
    """Gives `model`, which is on the meta device, the weights of the package, which on a CPU are not read before they
    are used; and registers the ops that its steps call. Raises UserError.
    """
    weights = package.weights()
    expected = dict(model.named_parameters())
    dtype_of = {name: parameter.dtype for name, parameter in expected.items()}
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))[0]
        raise UserError(f"{package.path}: is damaged: its weights are not its model's ({odd}); export the model again")
    # On the meta device an unquantized weight has torch's default dtype, whatever it will be.
    for name, weight in weights.items():
        plain = dtype_of[name] == torch.float32
        if weight.shape != expected[name].shape or not (plain or weight.dtype == dtype_of[name]):
            raise UserError(f"{package.path}: is damaged: {name} has another shape or type than its model asks for")
    loaded = {id(expected[name]): nn.Parameter(weight.to(device), requires_grad=False)
              for name, weight in weights.items()}  # fmt: skip
    for module in list(model.modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, loaded[id(parameter)])
    with package.unpacked(NATIVE) as directory:
        for name in package.names(NATIVE):
            library = directory / name.removeprefix(NATIVE)
            load_op_library(library)
            if library.name == QUANTIZED_OPS:
                native.use(library)
    return model


def steps(package: Package, model: Transformer, device: torch.device) -> ExportedSteps:
    """The compiled steps. Raises UserError where they do not load."""
    try:
        if package.metadata.form == AOTINDUCTOR:
            names = {name.removeprefix(PROGRAMS).partition("/")[0] for name in package.names(PROGRAMS)}
            programs: dict[str, Program] = {name: load_package(package.path, device, name) for name in sorted(names)}
        else:
            with package.unpacked(ARTIFACTS) as directory:
                programs = {path.name: ARTIFACT.load(path, device) for path in sorted(directory.iterdir())}
    except (RuntimeError, OSError) as error:
        reason = shorten(str(error).strip().partition("\n")[0], 200)
        raise UserError(f"{package.path}: its code does not load here: {reason}; export the model again") from error
    return ExportedSteps(model, programs)


def remarks(package: Package) -> list[str]:
    """What a person should know of a package before it runs."""
    facts = package.metadata
    lines = [f"{package.path.name} was exported from {facts.model} with torch {facts.torch}, {facts.created}"]
    if package.digest not in _made_here():
        lines.append(
            f"{package.path.name} was not exported here: it is a program, which runs as you do; use it if you trust "
            "whoever made it"
        )
    return lines


def remember(package: Package) -> None:
    """That this user made it, if that can be kept."""
    directory = cache_dir_or_say()
    if directory is not None:
        known = [*_made_here(), package.digest][-MOST_REMEMBERED:]
        with contextlib.suppress(OSError):
            atomic_write(directory / MADE_HERE, "".join(f"{digest}\n" for digest in known).encode())


def _made_here() -> list[str]:
    directory = cache_dir_or_say()
    try:
        return [] if directory is None else (directory / MADE_HERE).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []
