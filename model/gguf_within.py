"""What a GGUF file has within that lies beside the weights of other models, for those who do not know which of the two
they have. Imports what reads such files only where there is one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint import find_gguf


def files_within(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer, by their names; none for a model that is not GGUF or that brings none."""
    if (file := find_gguf(path)) is None:
        return {}
    from model.gguf_file import read_gguf
    from model.tokenizer_gguf import has_gguf_tokenizer, tokenizer_files

    return tokenizer_files(read_gguf(file)).documents() if has_gguf_tokenizer(file) else {}


def sampling_within(path: Path) -> Mapping[str, Any] | None:
    """The sampling that the file recommends, as a generation_config.json does; None for a model that is not GGUF."""
    if (file := find_gguf(path)) is None:
        return None
    from model.gguf_file import read_gguf
    from model.tokenizer_gguf import sampling_document

    return sampling_document(read_gguf(file))


def templates_within(path: Path) -> tuple[Path, dict[str, str]] | None:
    """The file, and the chat templates in it by name; None for a model that is not GGUF or that brings none."""
    if (file := find_gguf(path)) is None:
        return None
    from model.gguf_file import read_gguf
    from model.tokenizer_gguf import chat_templates

    templates = chat_templates(read_gguf(file))
    return (file, templates) if templates else None


def types_within(path: Path) -> list[str]:
    """The types of quantized weights, those of the most bytes first; none for a model that is not GGUF."""
    if (file := find_gguf(path)) is None:
        return []
    from model.gguf_file import read_gguf

    return read_gguf(file).quantized_types()
