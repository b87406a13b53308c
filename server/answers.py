"""What a sequence gave -> OpenAI's chunks, and chunks -> a whole answer. One producer: an answer that is not streamed
is the fold of the chunks that it would have had. Knows shapes; neither engines nor HTTP.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from generate.sequence import RequestOutput, TokenLogprobs
from server.tools import ToolParser

LEAST_LOGPROB = -9999.0
Chunk = dict[str, Any]
"""One entry of `choices`."""


class Names(Protocol):
    """How tokens are shown."""

    def name(self, token: int) -> str: ...

    def name_bytes(self, token: int) -> bytes: ...


class Choice(Protocol):
    """One answer of a request, while it is made."""

    def push(self, output: RequestOutput) -> list[Chunk]:
        """The chunks that a step's output makes."""


class ChatChoice:
    """One answer in a chat. ends: tokens that are no part of it. parser: finds calls of functions in it; None: there
    are none to be found.
    """

    def __init__(self, index: int, names: Names, ends: frozenset[int], parser: ToolParser | None = None) -> None:
        self._index, self._names, self._ends, self._parser = index, names, ends, parser
        self._begun = False

    def push(self, output: RequestOutput) -> list[Chunk]:
        chunks = []
        if not self._begun:
            self._begun = True
            only_calls = self._parser is not None and self._parser.forced
            chunks.append(self._chunk({"role": "assistant", "content": None if only_calls else ""}))
        last = output.finish_reason is not None
        deltas: list[dict[str, Any]] = []
        if self._parser is None:
            deltas = [{"content": output.text}] if output.text else []
        else:
            deltas = self._parser.push(output.text, output.token_ids, last=last)
        logprobs = [one for one in output.logprobs if one.token_id not in self._ends]
        if logprobs:
            deltas = deltas or [{"content": ""}]
            entries = [self._entry(one) for one in logprobs]
            chunks.append(self._chunk(deltas[0], {"content": entries, "refusal": None}))
            deltas = deltas[1:]
        chunks += [self._chunk(delta) for delta in deltas]
        if last:
            called = self._parser is not None and self._parser.called and output.finish_reason == "stop"
            chunks.append(self._chunk({}, finish_reason="tool_calls" if called else output.finish_reason))
        return chunks

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> Chunk:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _entry(self, one: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._named(one.token_id, one.logprob),
            "top_logprobs": [self._named(token, logprob) for token, logprob in one.top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._names.name_bytes(token)
        return {"token": self._names.name(token), "logprob": finite(logprob), "bytes": list(data)}


class CompletionChoice:
    """One answer of the older API, in which the prompt, `echo`, may come first. ends: tokens that are no part of it."""

    def __init__(self, index: int, names: Names, ends: frozenset[int], echo: str = "") -> None:
        self._index, self._names, self._ends, self._echo = index, names, ends, echo
        self._offset = len(echo)

    def push(self, output: RequestOutput) -> list[Chunk]:
        text, self._echo = self._echo + output.text, ""
        logprobs = self._logprobs([one for one in output.logprobs if one.token_id not in self._ends])
        if not (text or logprobs or output.finish_reason):
            return []
        return [{"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}]

    def _logprobs(self, found: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not found:
            return None
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in found:
            name = self._names.name(one.token_id)
            result["tokens"].append(name)
            result["token_logprobs"].append(finite(one.logprob))
            result["top_logprobs"].append({self._names.name(token): finite(p) for token, p in reversed(one.top)})
            result["text_offset"].append(self._offset)
            self._offset += len(name)
        return result


def finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN: OpenAI's least is -9999."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def fold_chat(chunks: Iterable[Chunk], count: int) -> list[dict[str, Any]]:
    """The whole answers that streamed chunks make up."""
    texts: list[list[str]] = [[] for _ in range(count)]
    calls: list[dict[int, dict[str, Any]]] = [{} for _ in range(count)]
    logprobs: list[list[Any]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    asked = [False] * count
    for chunk in chunks:
        i, delta = chunk["index"], chunk["delta"]
        texts[i].append(delta.get("content") or "")
        for call in delta.get("tool_calls", ()):
            _add_call(calls[i], call)
        if chunk["logprobs"] is not None:
            asked[i] = True
            logprobs[i] += chunk["logprobs"]["content"]
        reasons[i] = chunk["finish_reason"] or reasons[i]
    choices = []
    for i in range(count):
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts[i]), "refusal": None}
        if calls[i]:
            message["content"] = message["content"] or None
            message["tool_calls"] = [calls[i][at] for at in sorted(calls[i])]
        told = {"content": logprobs[i], "refusal": None} if asked[i] else None
        choices.append({"index": i, "message": message, "logprobs": told, "finish_reason": reasons[i]})
    return choices


def fold_completion(chunks: Iterable[Chunk], count: int) -> list[dict[str, Any]]:
    """The whole answers that streamed chunks make up."""
    choices: list[dict[str, Any]] = [
        {"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(count)
    ]
    texts: list[list[str]] = [[] for _ in range(count)]
    for chunk in chunks:
        choice = choices[chunk["index"]]
        texts[chunk["index"]].append(chunk["text"])
        choice["finish_reason"] = chunk["finish_reason"] or choice["finish_reason"]
        if chunk["logprobs"] is not None:
            if choice["logprobs"] is None:
                choice["logprobs"] = {name: [] for name in chunk["logprobs"]}
            for name, values in chunk["logprobs"].items():
                choice["logprobs"][name] += values
    for choice, pieces in zip(choices, texts, strict=True):
        choice["text"] = "".join(pieces)
    return choices


def _add_call(calls: dict[int, dict[str, Any]], delta: Mapping[str, Any]) -> None:
    call = calls.setdefault(delta["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function", {})
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
