"""A server for `serving.py` to measure: torchchat's own, also around random weights of a known model's shapes, for
which there is no tokenizer. Its tokens are then numbers, written as such.

stdout: a JSON document a line: what the engine did alone before it served, the address, and what it did alone after.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cli.builder import Prepared, build, prepare
from cli.console import describe_build, status
from cli.measure import GREEDY, random_prompt
from cli.options import Parser, build_settings
from cli.serving import add_serving_arguments, serve_built, with_room
from config.errors import UserError
from generate.engine import Engine
from model.chat_template import load_chat_template
from server.http import bind
from server.security import Access


class Numbers:
    """A `Tokenizer` of as many tokens as a model has, each of which is its number."""

    bos_id, add_bos, named, special_pieces = None, False, {}, ()
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return self.encode_parts([text])

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """A word that is no number is token 0."""
        words = [word for part in parts for word in str(part).split()]
        return [int(word) % self.vocab_size if word.isdecimal() else 0 for word in words]

    def split_specials(self, text: str) -> list[str | int]:
        return [text]

    def special_id(self, piece: str) -> int | None:
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids, start=True).decode()

    def decode_bytes(self, ids: Sequence[int], *, start: bool = False) -> bytes:
        text = "".join(f" {token}" for token in ids).encode()
        return text.removeprefix(b" ") if start else text


def with_numbers(prepared: Prepared) -> Prepared:
    """What is prepared for random weights, with what a server needs besides."""
    tokenizer = Numbers(prepared.config.vocab_size)
    with tempfile.TemporaryDirectory() as nothing:
        template = load_chat_template(Path(nothing), tokenizer, prepared.config, prepared.name)
    return dataclasses.replace(prepared, tokenizer=tokenizer, template=template)


def alone(engine: Engine, prompt_tokens: int, max_tokens: int, runs: int) -> list[dict[str, float]]:
    """What `generate` does, `runs` times: seconds from a prompt of token ids to the first token, and to the last."""
    params = dataclasses.replace(GREEDY, max_new_tokens=max_tokens)
    found = []
    for _ in range(runs):
        prompt = random_prompt(prompt_tokens, engine.vocab_size)
        engine.forget()
        began = time.perf_counter()
        times = [time.perf_counter() - began for _ in engine.generate(prompt, params)]
        found.append({"first_s": times[0], "whole_s": times[-1]})
    return found


def say(document: object) -> None:
    print(json.dumps(document), flush=True)


def main() -> int:
    parser = Parser(prog="serving_server", description=__doc__)
    add_serving_arguments(parser)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--alone", type=int, default=3, help="how often the engine runs alone, before and after")
    args = parser.parse(sys.argv[1:])
    settings = dataclasses.replace(build_settings(args, os.environ), random_weights=args.random_weights)
    prepared = prepare(settings)
    prepared, room = with_room(with_numbers(prepared) if args.random_weights else prepared, args.max_num_seqs)
    listener = bind(args.host, args.port)
    built = build(prepared, serves=True)
    status(describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan))
    status(room)
    began = time.perf_counter()
    built.engine.prepare(GREEDY)  # no more: all clients are greedy, and a GPU's compiler takes its time for each form
    lengths = (args.prompt_tokens, args.max_tokens)
    alone(built.engine, *lengths, 1)
    ready = {"prepare_s": time.perf_counter() - began, "vocab_size": prepared.config.vocab_size}
    say({**ready, "alone": alone(built.engine, *lengths, args.alone)})
    code = serve_built(
        built, Access.of(args.host, args.cors_origin, args.api_key), listener, args, lambda url: say({"address": url})
    )
    say({"alone": alone(built.engine, *lengths, args.alone)})
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
