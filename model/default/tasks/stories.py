"""The data of the tasks here, as lm-eval asks for them. Is loaded by its path, apart from the program."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets

FOLDER = Path(__file__).parent


def held_out(**metadata: Any) -> dict[str, datasets.Dataset]:
    """TinyStories that the built-in model has not seen: {"text"}."""
    with gzip.open(FOLDER / "held_out.jsonl.gz", "rt", encoding="utf-8") as lines:
        return _test_split(lines.read())


def endings(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Beginnings of stories with four endings: {"story", "endings", "answer": the number of the right one}."""
    return _test_split((FOLDER / "endings.jsonl").read_text(encoding="utf-8"))


def _test_split(lines: str) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines.splitlines()])}
