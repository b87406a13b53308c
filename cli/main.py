"""The command table and what happens around a command: parsing, errors as one line, exit codes. Imports no torch.

Exit codes: 0 done, 1 the machine failed (a full disk), 2 the person can mend it, 130 Ctrl-C, 141 the reader went away.
"""

import io
import os
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from importlib import import_module

from cli.console import print_error
from cli.options import Parser, did_you_mean, with_hint
from config import __version__
from config.errors import UserError

COMMANDS = {
    "chat": ("converse with a model, in a terminal or by script", "cli.chat"),
    "generate": ("write text from a prompt", "cli.generate"),
    "server": ("serve a model over HTTP, with OpenAI's API", "cli.server"),
    "browser": ("converse with a model on a page in your browser", "cli.browser"),
    "quantize": ("write a quantized model to a directory", "cli.quantize"),
    "eval": ("measure what a model knows, with lm-eval's tasks", "cli.eval"),
    "export": ("compile a model into one file that runs elsewhere", "cli.export"),
    "bench": ("measure loading, compiling, prefill and decode on this machine", "cli.bench"),
    "list": ("show the models that are known and those that are here", "cli.list"),
    "download": ("fetch a model from Hugging Face", "cli.download"),
    "where": ("print the path of a model that is here", "cli.where"),
    "remove": ("delete a model that was downloaded", "cli.remove"),
}
"""Name -> (one line of help, the module that runs it: `add_arguments(parser)` and `run(args) -> int`)."""

PACKAGES = (
    *("torch", "numpy", "safetensors", "sentencepiece", "tiktoken", "tokenizers", "jinja2", "psutil"),
    *("huggingface_hub", "gguf", "prompt_toolkit", "rich", "flask", "waitress", "prometheus_client"),
    *("llguidance", "torchao", "lm_eval"),
)
"""What must be installed, as pyproject.toml has it."""

DESCRIPTION = """\
Run a language model on the machine you have, customized four ways: compilation, quantization, precision, device.
Without a MODEL a small one that ships with torchchat is used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit code."""
    debug = os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0")
    for name in ("stdout", "stderr"):
        if vars(sys)[name] is None:  # closed by whoever started us: what is said there is for nobody
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" rather than a traceback
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print_error(str(error))
        return 2
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:  # our own mistake
            raise
        if debug:
            traceback.print_exc()
        print_error(
            f"{error.name} is not installed for {sys.executable}: `make demo` makes an environment with all that is "
            "needed, and .venv/bin/torchchat is then the program; or pip install -e . in an environment of your own"
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered must not raise again when the interpreter flushes it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a file that may not be read: its own text says which
        if debug:
            traceback.print_exc()
        print_error(str(error))
        return 1
    return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        return _run_without_command(argv)
    name = argv[0]
    help_line, module_name = COMMANDS[name]
    _let_threads_sleep(os.environ)
    runner = import_module(module_name)
    parser = Parser(
        prog=f"torchchat {name}",
        usage=f"torchchat {name} [MODEL] [options]",
        description=help_line[0].upper() + help_line[1:] + ".",
    )
    runner.add_arguments(parser)
    try:
        args = parser.parse(argv[1:])
    except SystemExit as stop:  # argparse has shown the help
        return int(stop.code or 0)
    return int(runner.run(args))


def _let_threads_sleep(environ: MutableMapping[str, str]) -> None:
    """Before torch is imported: a thread that waits for the others goes to sleep after about a millisecond.

    GNU OpenMP's own 300,000 turns are many milliseconds, in which a waiting thread keeps the processor from the one it
    waits for. The built-in model on 2 cores, one of them used by another program: 5 tokens a second with that, 30 with
    20,000 turns; on both cores alone 275 and 255, and a model of a billion parameters the same. Fewer turns lose more.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "20000")


def _run_without_command(argv: list[str]) -> int:
    see = "torchchat --help lists what there is"
    if not argv:
        raise UserError(f"which command? one of {', '.join(COMMANDS)}; {see}")
    first = argv[0]
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        print(f"torchchat {__version__}")
        return 0
    if first.startswith("-"):
        raise UserError(f"the command comes before its options, as in: torchchat {next(iter(COMMANDS))} {first}; {see}")
    raise UserError(with_hint(f"unknown command {first!r}{did_you_mean(first, COMMANDS)}", see))


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {line}" for name, (line, _) in COMMANDS.items())
    return f"""\
usage: torchchat COMMAND [MODEL] [options]

{DESCRIPTION}

commands:
{commands}

options:
  -h, --help  show this, or with a COMMAND before it all options of that command
  --version   show the version

environment:
  TORCHCHAT_CACHE_DIR  where compiled code and measurements are kept between runs
  TORCHCHAT_MODELS_DIR a directory of models, which are known by the names of their directories
  TORCHCHAT_DEBUG=1    show a traceback with every error
  TORCHCHAT_DEVICE, TORCHCHAT_DTYPE, …  defaults for options; each command's help names them"""
