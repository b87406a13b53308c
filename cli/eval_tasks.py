"""The tasks of an evaluation: finding them by name, loading their data, running lm-eval on them, with its remarks kept
to itself. Tasks are code from others: what they raise becomes one line. Knows no model.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from typing import Any

import datasets
from huggingface_hub import constants, get_session
from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks import TaskManager

from cli.console import status
from cli.eval import Asked
from cli.eval_model import EngineLM
from cli.hub_fetch import TRANSPORT_ERROR
from config.errors import UserError
from config.settings import shorten

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "model" / "default" / "tasks"
"""The tasks that need no network."""
OWN_NAMES = ("stories_text", "stories_endings")
LOGGERS = (
    *("lm_eval", "datasets", "huggingface_hub", "httpx", "evaluate", "fsspec", "filelock", "absl"),
    *("transformers", "torchao", "torch.utils._pytree"),  # some metrics bring these along
)
YAML = (".yaml", ".yml")
REACH_S = 5.0
"""So long Hugging Face may take to answer."""


class Tasks(TaskManager):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's tasks by name; those that were loaded are not loaded again."""

    loaded: dict[str, Any] | None = None

    def load(self, task_list: Any) -> Any:
        return super().load(task_list) if self.loaded is None else self.loaded


@dataclass(frozen=True)
class Chosen:
    """The names that were asked for, and the tasks they mean, loaded. remarks: what has no effect on them."""

    names: list[str]
    manager: Tasks
    remarks: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, Any]:
        assert self.manager.loaded is not None
        tasks: dict[str, Any] = self.manager.loaded["tasks"]
        return tasks


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """What the libraries write to stdout and to logs is left out, but for debugging; stdout is the report's."""
    if debug:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def choose(asked: Asked) -> Chosen:
    """Find and load what was asked for. Raises UserError for a name that is none, with those near it, and for data that
    cannot be had.
    """
    wanted = OWN_NAMES if asked.tasks is None else asked.tasks
    paths = [OWN, *([asked.include_path] if asked.include_path is not None else [])]
    manager = Tasks(include_path=paths, include_defaults=False)
    found = [_named(manager, name) for name in wanted]
    # Groups may have tasks in them that are lm-eval's.
    if not all(names and all(_is_single(manager, name) for name in names) for names in found):
        status("reading lm-eval's list of tasks")
        manager = Tasks(include_path=paths)
        found = [_named(manager, name) for name in wanted]
    for name, names in zip(wanted, found, strict=True):
        if not names:
            raise UserError(f"--tasks {shorten(name)}: there is no such task{_near(name, manager)}")
    names = list(dict.fromkeys(name for names in found for name in names))
    manager.loaded = _load_all(manager, names, "" if set(names) <= set(OWN_NAMES) else _why_offline())
    chosen = Chosen(names, manager)
    _check(chosen, asked)
    return chosen


def _named(manager: Tasks, name: str) -> list[str]:
    """The tasks and groups that a name or a pattern means; a file means itself."""
    if name.endswith(YAML):
        if not Path(name).is_file():
            raise UserError(f"--tasks {shorten(name)}: there is no such file")
        return [str(Path(name).resolve())]
    return list(manager.match_tasks([name]))


def _is_single(manager: Tasks, name: str) -> bool:
    return name in manager.all_subtasks or name.endswith(YAML)


def _near(name: str, manager: Tasks) -> str:
    near = get_close_matches(name, manager.all_tasks, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "; without --tasks those that are built in are run"


def _why_offline() -> str:
    """Why what is on this machine must do; "" where Hugging Face answers. Without this, each file would be tried for
    half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)
    except TRANSPORT_ERROR:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached"
    return ""


def _load_all(manager: Tasks, names: list[str], why_offline: str) -> dict[str, Any]:
    """As `TaskManager.load` gives it, each name by itself, so that an error can name it."""
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        entry = manager.task_index.get(name)
        if entry is not None and (entry.cfg or {}).get("unsafe_code"):
            raise _runs_code(name)
        try:
            part = manager.load([name])
        except (ConnectionError, TRANSPORT_ERROR) as error:
            why = why_offline or "the connection to Hugging Face broke"
            raise UserError(
                f"{name}: its data are not on this machine, and {why}: {_first_line(error)}; what needs no network are "
                f"the tasks that are built in ({','.join(OWN_NAMES)}) and those of --include-path"
            ) from error
        except ImportError as error:
            raise UserError(f"{name}: needs packages that are not here: {_first_line(error)}") from error
        except Exception as error:  # a task is code from others, and may raise anything
            raise UserError(f"{name}: cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
        for kind, entries in loaded.items():
            entries |= part.get(kind, {})
    return loaded


def _runs_code(name: str) -> UserError:
    return UserError(f"{name}: runs code that the model writes, which torchchat does not do")


def _first_line(error: Exception) -> str:
    return shorten(next((line for line in str(error).splitlines() if line.strip()), "no reason given"), 200)


def _check(chosen: Chosen, asked: Asked) -> None:
    """What the flags say about tasks, now that these are known. Raises UserError."""
    tasks, wanted = chosen.tasks, asked.num_fewshot or 0
    for name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name}: asks about pictures or sounds, and torchchat reads text")
        if getattr(task, "UNSAFE_CODE", False):
            raise _runs_code(name)
    for name, numbers in (asked.samples or {}).items():
        if name not in tasks:
            raise UserError(f"--samples: {shorten(name)} is not among the tasks: {', '.join(tasks)}")
        if max(numbers) >= (count := len(tasks[name].eval_docs)):
            raise UserError(f"--samples: {name} has {count} questions, from 0 to {count - 1}, not {max(numbers)}")
    if asked.samples is not None and (left := [name for name in tasks if name not in asked.samples]):
        raise UserError(f"--samples: say which questions of {', '.join(left)} too, or leave it out of --tasks")
    for name, task in tasks.items() if wanted else ():
        if task.get_config("num_fewshot") == 0:
            chosen.remarks.append(f"--num-fewshot without effect on {name}, which has no examples")
        elif (most := _most_examples(task)) is not None and wanted > most:
            raise UserError(f"--num-fewshot {wanted}: {name} has {most} examples to choose from")
    if asked.gen_kwargs and not any(_generates(task) for task in tasks.values()):
        chosen.remarks.append("--gen-kwargs without effect: none of these tasks generates text")


def _most_examples(task: Any) -> int | None:
    """How many examples a question can have before it; None: only the task knows."""
    examples = task.fewshot_docs()
    if not isinstance(examples, Sized):
        return None
    # A question is no example of itself.
    of_its_own = task.get_config("fewshot_split") == (tested := task.get_config("test_split")) and tested is not None
    return len(examples) - of_its_own


def _generates(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


def evaluate(
    lm: EngineLM, chosen: Chosen, asked: Asked, tracker: EvaluationTracker
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """lm-eval's results, and each question with its answers where they are to be written. tracker: told of what is run,
    and how.
    """
    with _told(chosen.names), _without_waiting(needs_environment=asked.output_path is not None):
        results = evaluator.simple_evaluate(
            model=lm,
            model_args=lm.customization(),
            tasks=chosen.names,
            task_manager=chosen.manager,
            num_fewshot=asked.num_fewshot,
            batch_size=lm.rows,
            device=str(lm.device),
            limit=asked.limit,
            # Sorted: lm-eval takes questions in their own order, and counts on the numbers being in it too.
            samples=None if asked.samples is None else {name: sorted(of) for name, of in asked.samples.items()},
            log_samples=asked.log_samples,
            evaluation_tracker=tracker,
            system_instruction=asked.system_instruction,
            apply_chat_template=asked.apply_chat_template,
            fewshot_as_multiturn=asked.fewshot_as_multiturn,
            gen_kwargs=None if asked.gen_kwargs is None else dict(asked.gen_kwargs),
            random_seed=asked.seeds[0],
            numpy_random_seed=asked.seeds[1],
            torch_random_seed=asked.seeds[2],
            fewshot_random_seed=asked.seeds[3],
        )
    return results, results.pop("samples", None)


@contextlib.contextmanager
def _told(names: list[str]) -> Iterator[None]:
    """What tasks and lm-eval raise as UserError; our own mistakes, and what the machine raises, as they are."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a task is code from others, and may raise anything
        # What came through the model is not a task's.
        if any(Path(frame.filename) == ROOT / "cli" / "eval_model.py" for frame in extract_tb(error.__traceback__)):
            raise
        raise UserError(f"{', '.join(names)}: cannot be run: {type(error).__name__}: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_waiting(needs_environment: bool) -> Iterator[None]:
    """lm-eval asks git about the working directory, which complains where there is none, and pip and the compilers
    about themselves, which takes seconds and is for the files alone.
    """
    saved = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = lambda: get_commit_from_path(Path.cwd())
    if not needs_environment:
        evaluator.add_env_info = _nothing
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = saved


def _nothing(results: Mapping[str, Any]) -> None:
    """Adds nothing."""
