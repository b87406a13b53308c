"""The command `eval` finds what lm-eval finds with Transformers, on the same weights; its files, its report, and its
answers to what cannot be."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cli import console, ledger
from cli.main import main
from model.default.corpus import TINY_SOURCES, is_held_out, read_corpus
from model.device import Bandwidth
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
TASKS = ROOT / "model" / "default" / "tasks"
ON_CPU = ("--device", "cpu", "--dtype", "fp32")
COUNT = 6

DATA = f'''
import datasets

WORDS = "the cat sat on a mat and saw two dogs run far".split()

def words(first, count):
    return " ".join(WORDS[(first + 5 * i * i) % len(WORDS)] for i in range(count))

def docs(**metadata):
    rows = [
        {{
            "question": words(n, (3, 9, 40)[n % 3]),
            "choices": [words(n + 3 * k, 1 + (n + k) % 4) for k in range(4)],
            "letters": ["A", "B", "C", "D"],
            "answer": n % 4,
            "text": words(n, (2, 15, 60)[n % 3]),
        }}
        for n in range({COUNT})
    ]
    return {{"test": datasets.Dataset.from_list(rows)}}
'''
COMMON = """
custom_dataset: !function data.docs
test_split: test
fewshot_split: test
metadata:
  version: 1.0
"""
YAML = {
    "tiny_choices": COMMON
    + """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
""",
    "tiny_letters": COMMON
    + """
output_type: multiple_choice
description: "Which letter comes next? "
doc_to_text: "{{question[:9]}}:"
doc_to_choice: letters
doc_to_target: answer
target_delimiter: ""
num_fewshot: 2
fewshot_config:
  sampler: first_n
""",
    "tiny_text": COMMON
    + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    "tiny_answers": COMMON
    + """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{question}}"
generation_kwargs:
  until: ["a", "\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without BOS: Transformers takes no heed of the flag that adds it where a tokenizer.json has no rule for it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", bos=False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "data.py").write_text(DATA)
    for name, text in YAML.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    return directory


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """lm-eval asks pip about all packages for each file of results, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "torch in a test")
        yield


@pytest.fixture
def run(capsys, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Run:
    """A command in this process; the machine's bandwidth is taken as known."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(warm))
    monkeypatch.setattr(ledger, "known_bandwidth", lambda device, directory, say: Bandwidth(20.0, 10.0))
    console.cache_dir_or_say.cache_clear()

    def run(*argv: object) -> Done:
        capsys.readouterr()
        return Done(main(["eval", *map(str, argv)]), *capsys.readouterr())

    return run


@pytest.fixture
def evaluate(run: Run, tiny: Path, tasks: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """The JSON document, and of each task the log-likelihoods or texts of each question as the files have them."""

    def evaluate(*argv: object, names: str = ",".join(YAML)) -> tuple[dict[str, Any], dict[str, Any]]:
        where = ("--tasks", names, "--include-path", tasks, "--output-path", tmp_path, "--log-samples", "--json")
        done = run(tiny, *ON_CPU, *where, *argv)
        assert done.code == 0, done.err
        document = json.loads(done.out)
        files = [Path(file) for file in document["files"]]
        assert sorted(file.suffix for file in files) == sorted([".json"] + [".jsonl"] * len(document["results"]))
        samples: dict[str, Any] = {}
        for file in files:
            if file.suffix == ".jsonl":
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                name = file.name.removeprefix("samples_").rpartition("_")[0]
                samples[name] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
        return document, samples

    return evaluate


@pytest.fixture(scope="module")
def theirs(tiny: Path, tasks: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's results with its own model of Transformers', and what that answered to each question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import sanitize_list

    manager = TaskManager(include_path=tasks, include_defaults=False)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        # One at a time: in a batch it reads on after the end of a text until all have ended.
        model = HFLM(pretrained=str(tiny), device="cpu", dtype="float32", batch_size=1)
        results = simple_evaluate(model=model, tasks=list(YAML), task_manager=manager, bootstrap_iters=0)
    samples = {
        name: [sanitize_list(line["resps"]) for line in sorted(lines, key=lambda line: line["doc_id"])]
        for name, lines in results["samples"].items()
    }
    return results, samples


def numbers(samples: Any) -> list[float]:
    """The log-likelihoods of a task's questions, one after the other."""
    rows = [response[0] for question in samples for response in question]
    return [float(row[0] if isinstance(row, list | tuple) else row) for row in rows]


def same(ours: dict[str, Any], theirs: dict[str, Any], within: float = 1e-3) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert len(ours[name]) == len(theirs[name])
        if name == "tiny_answers":
            assert ours[name] == theirs[name]
        else:
            assert numbers(ours[name]) == pytest.approx(numbers(theirs[name]), abs=within, rel=0)


def metrics(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, found in results["results"].items()
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_every_answer_is_that_of_lm_eval_with_transformers(evaluate, theirs):
    results, samples = theirs
    assert len(numbers(samples["tiny_choices"])) == 4 * COUNT
    document, one = evaluate("--batch-size", 1)
    same(one, samples)
    greedy = [[response[0][1] for response in question] for question in samples["tiny_letters"]]
    assert [[response[0][1] for response in question] for question in one["tiny_letters"]] == greedy
    assert metrics(document) == pytest.approx(metrics(results), abs=1e-4)
    assert set(metrics(document)) >= {"tiny_choices acc,none", "tiny_text bits_per_byte,none"}
    many_document, many = evaluate("--batch-size", 8)
    same(many, one, within=1e-4)
    assert metrics(many_document) == pytest.approx(metrics(document), abs=1e-6)
    assert document["stats"]["requests"] == 4 * COUNT * 2 + COUNT * 2
    assert 0 < document["stats"]["tokens_computed"] < document["stats"]["tokens"]
    assert document["stats"]["requests_cut"] > 0  # of lm-eval's, too: they are the same


def test_the_built_in_model_is_scored_as_by_lm_eval_with_transformers(run, tmp_path):
    """It has a tokenizer of SentencePiece's and begins texts with BOS."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    model = HFLM(pretrained=str(TASKS.parent), device="cpu", dtype="float32", batch_size=2)
    names = ["stories_text", "stories_endings"]
    results = simple_evaluate(model=model, tasks=names, task_manager=manager, limit=4, bootstrap_iters=0)
    done = run(*ON_CPU, "--limit", 4, "--json", "--output-path", tmp_path, "--log-samples")
    document = json.loads(done.out)
    assert metrics(document) == pytest.approx(metrics(results), rel=1e-4)
    for name in names:
        (file,) = (Path(file) for file in document["files"] if f"samples_{name}_" in file)
        lines = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
        expected = [line["resps"] for line in results["samples"][name]]
        assert numbers(lines) == pytest.approx(numbers(expected), abs=1e-3, rel=0)


# Slow: it compiles.
@pytest.mark.slow
def test_what_is_quantized_answers_otherwise_and_compiled_alike(evaluate, theirs):
    names, recipe = "tiny_choices", ("--quantize", '{"linear:int4": {"groupsize": 32}}')
    document, quantized = evaluate(*recipe, "--batch-size", 8, names=names)
    assert "linear:int4" in document["settings"]["quantize"]
    ours, original = numbers(quantized[names]), numbers(theirs[1][names])
    assert max(abs(a - b) for a, b in zip(ours, original, strict=True)) > 0.01
    assert ours == pytest.approx(original, rel=0.5)
    document, compiled = evaluate(*recipe, "--batch-size", 8, "--compile", names=names)
    same(compiled, quantized)
    assert document["settings"]["compile"] is True
    assert document["stats"]["compile_s"] > 0


def test_questions_are_chosen_by_count_share_and_number(evaluate):
    choices, letters = "tiny_choices", "tiny_letters"
    _, all_of_them = evaluate(names=choices)
    for flags, expected in (
        (("--limit", 2), [0, 1]),
        (("--limit", 0.5), [0, 1, 2]),
        (("--samples", '{"tiny_choices": [4, 1]}'), [1, 4]),
    ):
        document, some = evaluate(*flags, names=choices)
        same(some, {choices: [all_of_them[choices][i] for i in expected]}, within=1e-4)
        assert document["n-samples"][choices]["effective"] == len(expected)
    with_examples, other = evaluate("--num-fewshot", 0, names=letters)
    assert with_examples["n-shot"][letters] == 0
    assert numbers(other[letters]) != numbers(evaluate(names=letters)[1][letters])


def test_sampling_follows_its_seed_and_settings(evaluate):
    names, kwargs = "tiny_answers", "do_sample=true,temperature=1.5,max_gen_toks=8,until=['zz']"
    _, greedy = evaluate(names=names)
    _, first = evaluate("--gen-kwargs", kwargs, "--seed", "0,0,7,0", names=names)
    _, again = evaluate("--gen-kwargs", kwargs, "--seed", "0,0,7,0", "--batch-size", 2, names=names)
    _, other = evaluate("--gen-kwargs", kwargs, "--seed", 8, names=names)
    assert first == again
    assert first != other
    assert first != greedy
    as_json = '{"do_sample": true, "temperature": 1.5, "max_gen_toks": 8, "until": ["zz"]}'
    assert evaluate("--gen-kwargs", as_json, "--seed", 7, names=names)[1] == first


def test_chat_formats_are_those_of_transformers(evaluate, theirs, tiny, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = {"num_fewshot": 1, "system_instruction": "Be short.", "limit": 2}
    model = HFLM(pretrained=str(tiny), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    flags = ("--num-fewshot", 1, "--system-instruction", "Be short.", "--limit", 2, "--apply-chat-template")
    for multiturn in (True, False):
        results = simple_evaluate(
            model=model, tasks=["tiny_letters"], task_manager=manager, apply_chat_template=True,
            fewshot_as_multiturn=multiturn, bootstrap_iters=0, **options,
        )  # fmt: skip
        ours = evaluate(*flags, *(() if multiturn else ("--no-fewshot-as-multiturn",)), names="tiny_letters")[1]
        lines = sorted(results["samples"]["tiny_letters"], key=lambda line: line["doc_id"])
        expected = [float(response[0][0]) for line in lines for response in line["resps"]]
        assert numbers(ours["tiny_letters"]) == pytest.approx(expected, abs=1e-3, rel=0)


def test_the_report_ends_with_what_ran_and_how_fast(run, tiny, tasks):
    done = run(tiny, *ON_CPU, "--include-path", tasks, "--tasks", "tiny_l*", "--quantize", '{"linear:int8": {}}')
    assert done.code == 0, done.err
    table, _, end = done.out.partition("\n\n")
    assert table.splitlines()[0].split("|")[1].strip() == "Tasks"
    assert "|tiny_letters|" in table
    names = [line.split()[0] for line in end.splitlines()]
    kernels = [] if "compile" not in names else ["compile"]  # those of quantized weights, the first time
    expected = ["model", "device", "dtype", "quantized", "compiled", "context", *kernels, "requests", "tokens"]
    assert names == expected
    assert "cpu (--device)" in end
    assert "fp32 (--dtype)" in end
    assert "int8" in end
    assert "a second" in end
    assert "tok/s" in end


def test_the_files_are_those_of_lm_eval(evaluate, tmp_path):
    document, _ = evaluate(names="tiny_text")
    (file,) = (Path(file) for file in document["files"] if file.endswith(".json"))
    assert file.parent == tmp_path / "tiny"
    written = json.loads(file.read_text())
    assert written["results"]["tiny_text"] == pytest.approx(document["results"]["tiny_text"])
    assert written["model_name"] == "tiny"
    assert written["config"]["model_args"] == document["settings"]
    assert written["config"]["batch_size"] == 8
    assert written["pretty_env_info"] == "torch in a test"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--limit", "0"), "--limit must be a whole number of questions, or a share between 0 and 1, not '0'"),
        (("--limit", "2.5"), "--limit must be a whole number of questions, or a share between 0 and 1, not '2.5'"),
        (("--limit", "3", "--samples", '{"a": [1]}'), "--limit and --samples both choose questions: leave one out"),
        (("--samples", "[1]"), "[1]: neither a JSON object nor a file of one"),
        (("--samples", '{"a": [-1]}'), "a: must be a list of different numbers from 0 on"),
        (("--samples", '{"stories_endings": [0]}'), "say which questions of stories_text too, or leave it out"),
        (("--log-samples",), "--log-samples writes files: say where with --output-path"),
        (("--fewshot-as-multiturn",), "it needs --apply-chat-template"),
        (("--include-path", "nowhere"), "--include-path nowhere: is not a directory"),
        (("--output-path", f"{__file__}/x"), f"{__file__} is not a directory"),
        (("--output-path", __file__), "name a directory, or a file that ends in .json"),
        (("--gen-kwargs", "temperature"), "takes NAME=VALUE, with commas between them"),
        (("--gen-kwargs", "{"), "{: is not JSON"),
        (("--seed", "1,2"), "--seed: takes one number or 4, not 2"),
        (("--batch-size", "many"), "--batch-size must be a whole number from 1 to 1024, not 'many'"),
        (("--tasks", ","), "--tasks names no task"),
        (("--tasks", "none.yaml"), "--tasks none.yaml: there is no such file"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_wrong_flags_are_one_line(run, tiny, argv, line):
    done = run(tiny, *ON_CPU, *argv)
    assert done.code == 2
    assert done.out == ""
    (said,) = (text for text in done.err.splitlines() if "error: " in text)
    assert line.replace("--limit must", "--limit: must").replace("--batch-size must", "--batch-size: must") in said


def test_tasks_that_cannot_be_run_are_one_line(run, tiny, tasks, tmp_path):
    (tmp_path / "data.py").write_text("raise OSError('no such thing\\nat all')")
    (tmp_path / "broken.yaml").write_text(f"task: broken\n{YAML['tiny_text']}")
    for name, given in {
        "strange": "generation_kwargs:\n  until: []\n  guidance_scale: 2",
        "long": "generation_kwargs:\n  max_gen_toks: 500",
        "empty": "",
        "code": "unsafe_code: true",
    }.items():
        text = YAML["tiny_answers" if given else "tiny_choices"].partition("generation_kwargs")[0]
        (tasks / f"other_{name}.yaml").write_text(f"task: other_{name}\n{text}\n{given}".replace("choices", "nothing"))
    here = ("--include-path", tasks, "--tasks")
    for argv, line in (
        (("--include-path", tmp_path, "--tasks", "broken"), "broken: cannot be loaded: OSError: no such thing"),
        ((*here, "other_strange"), "asks for guidance_scale; known are do_sample, until, max_gen_toks, temperature"),
        ((*here, "other_long"), "a task asks for 500 new tokens, and the context holds 128 with the question"),
        ((*here, "tiny_text", "--samples", '{"tiny_text": [0, 6]}'), "tiny_text has 6 questions, from 0 to 5, not 6"),
        ((*here, "tiny_letters", "--num-fewshot", 6), "--num-fewshot 6: tiny_letters has 5 examples to choose from"),
        ((*here, "other_code"), "other_code: runs code that the model writes, which torchchat does not do"),
        ((*here, "other_empty"), "other_empty: cannot be loaded: ValueError"),
        ((*here, "tiny_text", "--samples", '{"tiny": [0]}'), "--samples: tiny is not among the tasks: tiny_text"),
    ):
        done = run(tiny, *ON_CPU, *argv)
        assert done.code == 2, done.err
        assert line in [text for text in done.err.splitlines() if "error: " in text][-1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory in which nobody can write")
def test_results_that_cannot_be_written_are_one_line(run, tiny, tasks):
    argv = ("--include-path", tasks, "--tasks", "tiny_text", "--output-path", "/proc/self/results.json")
    done = run(tiny, *ON_CPU, *argv)
    assert done.code in (1, 2)  # as root the attempt is made
    assert done.out == ""
    assert "error: --output-path /proc/self" in done.err.splitlines()[-1]


def test_flags_without_effect_are_said(run, tiny, tasks):
    argv = ("--include-path", tasks, "--tasks", "tiny_letters", "--gen-kwargs", "temperature=1")
    assert "--gen-kwargs without effect: none of these tasks generates text" in run(tiny, *ON_CPU, *argv).err


def as_a_person(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "torchchat.py"), "eval", *argv],
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=480,
    )


def test_the_tasks_that_are_built_in_run_without_network(tmp_path, warm):
    """The model that is built in chooses the right ending far more often than by chance; nobody else says a word."""
    environ = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCHCHAT_CACHE_DIR": str(warm)}
    done = as_a_person("--json", "--limit", "24", "--device", "cpu", **environ)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert results["stories_endings"]["acc,none"] > 0.6
    assert 0.5 < results["stories_text"]["bits_per_byte,none"] < 1
    assert set(results["stories_text"]) >= {"word_perplexity,none", "byte_perplexity,none"}
    assert all(line.startswith("torchchat: ") for line in done.stderr.splitlines())


# Slow: lm-eval knows fifteen thousand tasks, and reads them all.
@pytest.mark.slow
def test_an_unknown_task_is_one_line_with_names_near_it(warm):
    done = as_a_person("--tasks", "stories_text,helaswag", TORCHCHAT_CACHE_DIR=str(warm))
    assert done.returncode == 2
    assert done.stdout == ""
    (_, line) = done.stderr.splitlines()
    assert "error: --tasks helaswag: there is no such task; did you mean hellaswag" in line


@pytest.mark.parametrize("said", [True, False])
def test_data_that_are_not_here_are_one_line(run, tiny, tmp_path, monkeypatch, said):
    import datasets
    from huggingface_hub import constants

    (tmp_path / "away.yaml").write_text("task: away\ndataset_path: somebody/something\ntest_split: test\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", said)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", said)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = run(tiny, *ON_CPU, "--include-path", tmp_path, "--tasks", "away")
    assert done.code == 2
    assert done.out == ""
    why = "HF_HUB_OFFLINE is set" if said else "http://127.0.0.1:9 cannot be reached"
    (line,) = done.err.splitlines()
    assert f"error: away: its data are not on this machine, and {why}" in line
    assert "somebody/something" in line


def test_the_text_that_is_built_in_was_held_out():
    from model.default.tasks.stories import endings, held_out

    texts = [e.messages[0][1] for e in read_corpus() if e.source in TINY_SOURCES and is_held_out(e)]
    assert sorted(held_out()["test"]["text"]) == sorted(texts)
    questions = endings()["test"]
    assert len(questions) >= 60
    assert len(set(questions["story"])) == len(questions)
    for question in questions:
        assert len(set(question["endings"])) == 4
        assert 0 <= question["answer"] < 4
        assert (question["story"] + "".join(question["endings"])).isascii()
    counts = [list(questions["answer"]).count(place) for place in range(4)]
    assert max(counts) - min(counts) <= 1
