"""What a package says to programs without Python and without JSON: `runner.txt` and `vocabulary.txt`, as lines of
words. Knows a prepared model and its tensors; not the package.
"""

from collections.abc import Iterable, Sequence

from cli.builder import Prepared, eos_ids
from config.errors import UserError
from model.export import FORMAT, NATIVE, Metadata
from model.kv_cache import KVCache
from model.saved import Layout
from model.tokenizer_base import Tokenizer
from model.tokenizer_sentencepiece import SentencePieceTokenizer

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FIRST, ANSWER, SECOND = "zqfirstq", "zqanswerq", "zqsecondq"
"""Messages that stand for any, to see what a chat format puts around them."""
Part = int | str


def runner_lines(prepared: Prepared, facts: Metadata, cache: KVCache, layout: Layout, names: Sequence[str]) -> str:
    """runner.txt. names: of the weights, in the order in which the entry points take them."""
    slots, kv_heads, length, head_dim = cache.keys[0].shape
    sampling = prepared.sampling
    lines = [
        f"torchchat-package {FORMAT}",
        f"form {facts.form}",
        f"torch {facts.torch}",
        f"device {facts.device}",
        _line("instructions", facts.instructions),
        f"dtype {TORCH_NAMES[facts.dtype]}",
        f"layers {len(cache.keys)}",
        f"cache {slots} {kv_heads} {length} {head_dim}",
        f"vocab {prepared.config.vocab_size}",
        f"prefill_chunk {facts.prefill_chunk}",
        f"max_num_seqs {facts.max_num_seqs}",
        *(_line("frequencies", [len(f), *(f"{x:.9g}" for x in f.tolist())]) for f in cache.frequencies),
        *(f"library {name.removeprefix(NATIVE)}" for name in facts.code if name.startswith(NATIVE)),
    ]
    for name in names:
        dtype, shape = layout.tensors[name]
        size = dtype.itemsize
        for n in shape:
            size *= n
        lines.append(_line("weight", [name, str(dtype).removeprefix("torch."), layout.offsets[name], size, *shape]))
    lines.append(_line("eos", sorted(eos_ids(prepared))))
    lines.append(
        f"sampling temperature {sampling.temperature:g} top_k {sampling.top_k} top_p {sampling.top_p:g} "
        f"min_p {sampling.min_p:g} repetition_penalty {sampling.repetition_penalty:g}"
    )
    if prepared.tokenizer is not None:
        lines += [*_tokenizer_lines(prepared.tokenizer), *_chat_lines(prepared)]
    return "\n".join(lines) + "\n"


def vocabulary_lines(prepared: Prepared) -> str | None:
    """vocabulary.txt; None for a tokenizer that these lines cannot describe."""
    tokenizer = prepared.tokenizer
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    return "".join(f"{kind} {score:.9g} {data.hex()}\n" for kind, score, data in tokenizer.pieces())


def _tokenizer_lines(tokenizer: Tokenizer) -> list[str]:
    bos = "none" if tokenizer.bos_id is None else tokenizer.bos_id
    lines = [f"bos {bos}", f"add_bos {int(tokenizer.add_bos)}"]
    if not isinstance(tokenizer, SentencePieceTokenizer):
        kind = "tiktoken" if type(tokenizer).__name__.startswith("Tiktoken") else "huggingface"
        return [*lines, f"tokenizer {kind}"]
    facts = tokenizer.facts()
    return [
        *lines,
        f"tokenizer sentencepiece-{facts.kind}",
        f"tokenizer_normalizer {facts.normalizer}",
        f"tokenizer_strips_spaces {int(facts.strips_spaces)}",
        f"tokenizer_prefix {int(facts.prefix)}",
        *([f"unknown {facts.unknown}"] if facts.unknown is not None else []),
    ]


def _chat_lines(prepared: Prepared) -> list[str]:
    """What stands before, between and behind messages; nothing where that depends on what they say."""
    tokenizer, template = prepared.tokenizer, prepared.template
    if tokenizer is None or template is None or template.plain:
        return []
    first, answer, second = ({"role": role, "content": text} for role, text in
                             (("user", FIRST), ("assistant", ANSWER), ("user", SECOND)))  # fmt: skip
    try:
        text = template.text([first, answer, second])
        begin, rest = text.split(FIRST)
        after_user, rest = rest.split(ANSWER)
        after_answer, after_second = rest.split(SECOND)
        trimmed = template.text([{"role": "user", "content": f" {FIRST} "}])
        alone = template.text([first])
        if after_second != after_user or alone != begin + FIRST + after_user:
            return []
    except (UserError, ValueError):  # a template that refuses such messages, or shows one of them twice
        return []
    if trimmed not in (alone, f"{begin} {FIRST} {after_user}"):
        return []
    return [
        _line("chat_begin", _parts(tokenizer, begin)),
        _line("chat_after_user", _parts(tokenizer, after_user)),
        _line("chat_after_answer", _parts(tokenizer, after_answer)),
        f"chat_trim {int(trimmed == alone)}",
        *(f"stop {text.encode().hex()}" for text in template.stop),
    ]


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    """Ids of special tokens, and literal text as its bytes after an equals sign."""
    parts = tokenizer.split_specials(text)
    return [f"={part.encode().hex()}" if isinstance(part, str) else str(part) for part in parts if part != ""]


def _line(key: str, words: Iterable[object]) -> str:
    return " ".join([key, *map(str, words)])
