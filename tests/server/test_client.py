"""OpenAI's own client against the server: every feature, streamed and not."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
import torch

from cli.builder import make_engine
from config.settings import SamplingParams
from generate.adjust import logprobs
from model.kv_cache import KVCache
from server import service
from tests.server.running import CHAT, read_events, running

NAME = "default"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER_TOOL = {"type": "function", "function": {"name": "sing"}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server):
    return server.openai()


@pytest.fixture
def chat(client):
    """Asks, and gives the whole completion."""

    def ask(**options):
        return client.chat.completions.create(
            **{"model": NAME, "messages": CHAT, "max_tokens": 12, "seed": 5, **options}
        )

    return ask


def text_of(completion, index=0):
    return completion.choices[index].message.content


ASKS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "filters": {"temperature": 1.3, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.02}},
    "several": {"n": 3},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": -0.5, "extra_body": {"repetition_penalty": 1.2}},
    "stop": {"stop": [" time", "zzz"], "temperature": 0},
    "stop in a token": {"stop": "pon", "temperature": 0},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "n": 2},
    "bias": {"logit_bias": {"300": 100, "301": 100}},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 30},
    "required": {"tools": [TOOL, OTHER_TOOL], "tool_choice": "required", "max_tokens": 300},
    "plain with tools": {"tools": [TOOL]},
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_streamed_is_unstreamed(client, chat, ask):
    """The same answers, reasons and log-probabilities, whichever way they come."""
    whole = chat(**ask)
    stream = client.chat.completions.create(
        model=NAME,
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": True},
        **{"max_tokens": 12, "seed": 5, **ask},
    )
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    used = chunks[-1].usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )
    for choice in whole.choices:
        ours = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert ours[0].delta.role == "assistant"
        assert not ours[0].delta.content
        assert all(one.delta.role is None for one in ours[1:])
        assert [one.finish_reason for one in ours] == [None] * (len(ours) - 1) + [choice.finish_reason]
        assert ours[-1].delta.content is None
        assert "".join(one.delta.content or "" for one in ours) == (choice.message.content or "")
        told = [entry for one in ours if one.logprobs for entry in one.logprobs.content]
        assert told == (choice.logprobs.content if choice.logprobs else [])
        calls = [call for one in ours for call in one.delta.tool_calls or ()]
        arguments = "".join(call.function.arguments for call in calls)
        assert arguments == "".join(call.function.arguments for call in choice.message.tool_calls or ())


def test_a_stream_as_it_is_on_the_wire(server):
    status, headers, data = server.ask(
        "POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 3, "stream": True, "temperature": 0}
    )
    events = read_events(data)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert events[-1] is None
    assert all("usage" not in event for event in events[:-1])
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}


def test_the_helper_of_the_client_reads_streams(client, chat):
    for ask in ({"max_tokens": 400}, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300}):
        ask = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, **ask}
        with client.chat.completions.stream(model=NAME, **ask) as events:
            for _ in events:
                pass
            message = events.get_final_completion().choices[0].message
        whole = chat(**ask).choices[0].message
        assert (message.content or None) == whole.content
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        assert calls == [(call.function.name, call.function.arguments) for call in whole.tool_calls or ()]


def test_the_same_seed_is_the_same_text_and_another_one_is_not(chat):
    texts = {seed: text_of(chat(seed=seed, temperature=1.5, max_tokens=20)) for seed in (1, 2, 3)}
    assert len(set(texts.values())) == 3
    assert text_of(chat(seed=2, temperature=1.5, max_tokens=20)) == texts[2]
    several = chat(seed=1, n=3, temperature=1.5, max_tokens=20)
    assert [text_of(several, i) for i in range(3)] == [texts[1], texts[2], texts[3]]


def test_without_a_seed_each_answer_is_new(client):
    texts = {
        text_of(client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=20, temperature=2))
        for _ in range(3)
    }
    assert len(texts) > 1


def test_what_is_served_is_what_the_engine_makes(chat, built):
    params = SamplingParams(temperature=1.1, top_k=50, max_new_tokens=25, seed=77)
    engine = make_engine(built.prepared, built.model, 1024, None, serves=True)
    sequence = engine.add(built.prepared.template.render(CHAT), params, new_text=True)
    text = ""
    while not sequence.finished:
        text += "".join(output.text for output in engine.step())
    ask = {"temperature": 1.1, "max_tokens": 25, "seed": 77}
    neutral = {"top_k": 50, "min_p": 0, "repetition_penalty": 1}
    assert text_of(chat(**ask, extra_body=neutral)) == text


def test_many_at_once_get_what_each_gets_alone(client, chat):
    asks = [
        {"seed": i, "max_tokens": 6 + 3 * i, "temperature": 1.2, "messages": [*CHAT, *CHAT[: i % 2]]} for i in range(8)
    ]
    alone = [text_of(chat(**ask)) for ask in asks]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda ask: text_of(chat(**ask)), asks)] == alone


def test_streams_that_are_paced_lose_nothing(chat, server, monkeypatch):
    """Beyond some dozens of answers each write of one carries what several steps gave it."""
    asks = [{"seed": i, "max_tokens": 24, "temperature": 1.0} for i in range(4)]
    alone = [[event.choices for event in chat(**ask, stream=True)] for ask in asks]
    monkeypatch.setattr(service, "PACED_FROM", 0)
    monkeypatch.setattr(service, "PACE_S", 0.02)
    with ThreadPoolExecutor(4) as pool:
        streams = pool.map(lambda ask: [event.choices for event in chat(**ask, stream=True)], asks)
        assert [*streams] == alone
    body = {"messages": CHAT, "max_tokens": 24, "temperature": 1.0, "seed": 0, "stream": True}
    with server.connect("/v1/chat/completions", body) as connection:
        writes = []
        while not (writes and writes[-1].endswith(b"0\r\n\r\n")):
            writes.append(connection.recv(1 << 16))
    assert b"".join(writes).count(b"data: ") == len(alone[0]) + 1
    assert len(writes) < len(alone[0])


def test_stop_texts_across_tokens(chat):
    whole = text_of(chat(temperature=0, max_tokens=40))
    for stop in ("upon a", "ce up", whole[10:25]):
        cut = chat(temperature=0, max_tokens=40, stop=stop)
        assert text_of(cut) == whole[: whole.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_how_long_answers_are(chat):
    assert chat(max_completion_tokens=3, max_tokens=openai.omit).usage.completion_tokens == 3
    assert chat(max_tokens=7).choices[0].finish_reason == "length"
    ends = chat(messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=400)
    assert ends.choices[0].finish_reason == "stop"
    length = ends.usage.completion_tokens
    more = chat(
        messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=400,
        extra_body={"min_tokens": length + 5},
    )  # fmt: skip
    assert more.usage.completion_tokens > length + 4
    on = chat(
        messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=length + 9,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (length + 9, "length")


def test_log_probabilities_are_the_models(chat, built):
    """Of each token, by the model alone: computed anew from the whole text."""
    found = chat(logprobs=True, top_logprobs=4, max_tokens=8, temperature=1.2, extra_body={"repetition_penalty": 1.5})
    tokenizer, model = built.prepared.tokenizer, built.model
    prompt = built.prepared.template.render(CHAT)
    entries = found.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().lstrip() == text_of(found)
    vocabulary = [tokenizer.decode_bytes((token,)) for token in range(tokenizer.vocab_size)]
    said = [
        len(vocabulary) - 1 - vocabulary[::-1].index(bytes(entry.bytes)) for entry in entries
    ]  # not the single bytes
    cache = KVCache.create(built.prepared.config, 1, 128, torch.device("cpu"), torch.float32)
    tokens = torch.tensor([[*prompt, *said]])
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        logits = model(tokens, zero, cache, zero, tokens.shape[1])[0, len(prompt) - 1 : -1]
    table = logprobs(logits, torch.tensor(said), 4).tolist()
    for entry, row in zip(entries, table, strict=True):
        assert entry.logprob == pytest.approx(row[0], abs=1e-3)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(row[1:5], abs=1e-3)
        assert all(bytes(one.bytes).decode(errors="replace") == one.token for one in entry.top_logprobs)


def test_penalties_and_biases_change_what_comes(chat):
    plain = text_of(chat(temperature=0, max_tokens=60))
    assert text_of(chat(temperature=0, max_tokens=60, frequency_penalty=2, presence_penalty=2)) != plain
    forbidden = chat(temperature=0, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
    assert plain.startswith(forbidden)


@pytest.mark.parametrize("seed", range(3))
def test_what_keeps_to_a_schema_is_valid_by_it(chat, seed):
    format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    found = chat(response_format=format, max_tokens=200, seed=seed, temperature=1.5)
    assert found.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(text_of(found)), SCHEMA)


def test_a_schema_for_each_of_several_answers_and_for_completions(chat, client):
    format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    found = chat(response_format=format, max_tokens=200, n=3, temperature=1.5)
    for choice in found.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    done = client.completions.create(
        model=NAME, prompt="A pet: ", max_tokens=200, seed=1, extra_body={"response_format": format}
    )
    jsonschema.validate(json.loads(done.choices[0].text), SCHEMA)


def test_required_and_named_tools_are_called(chat):
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        found = chat(tools=[TOOL, OTHER_TOOL], tool_choice=choice, max_tokens=300, seed=3).choices[0]
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        (call,) = found.message.tool_calls
        if choice != "required":
            assert call.function.name == "get_weather"
        if call.function.name == "get_weather":
            jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])


def test_the_result_of_a_call_goes_back_in(chat):
    call = chat(tools=[TOOL], tool_choice="required", max_tokens=300).choices[0].message.tool_calls[0]
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "grey"}'},
    ]
    longer = chat(messages=messages, tools=[TOOL], max_tokens=5)
    assert longer.usage.completion_tokens == 5
    assert longer.usage.prompt_tokens > chat(tools=[TOOL], max_tokens=1).usage.prompt_tokens


def test_a_prompt_that_was_read_is_counted_as_cached(chat):
    story = [{"role": "user", "content": "Tell me of the " + "cat and the dog and the " * 20}]
    first, second = chat(messages=story, max_tokens=2), chat(messages=story, max_tokens=2)
    assert first.usage.prompt_tokens_details.cached_tokens < 40
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1


# ---- The older API ----


def test_prompts_of_every_kind(client, built):
    tokenizer = built.prepared.tokenizer
    texts = ["Once upon", "The dog"]
    ids = [tokenizer.encode(text, bos=True) for text in texts]

    def complete(prompt):
        options = {"max_tokens": 6, "temperature": 0}
        return [choice.text for choice in client.completions.create(model=NAME, prompt=prompt, **options).choices]

    alone = [*complete(texts[0]), *complete(texts[1])]
    assert complete(texts) == alone
    assert complete(ids[0]) == alone[:1]
    assert complete(ids) == alone
    assert complete("")[0]


def test_completions_streamed_and_echoed(client):
    options = {"model": NAME, "prompt": ["Once upon", "The dog"], "n": 2, "max_tokens": 6, "seed": 4, "echo": True}
    whole = client.completions.create(**options)
    texts = [""] * 4
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert [text[:7] for text in texts] == ["Once up", "Once up", "The dog", "The dog"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    only = client.completions.create(model=NAME, prompt="Once upon", max_tokens=0, echo=True)
    assert (only.choices[0].text, only.usage.completion_tokens) == ("Once upon", 0)


def test_log_probabilities_of_completions(client, chat):
    found = client.completions.create(model=NAME, prompt="Once upon", max_tokens=6, temperature=0, logprobs=2).choices[
        0
    ]
    told = found.logprobs
    assert "".join(told.tokens) == found.text
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(6)]
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top, key=top.get) == token
        assert math.isclose(top[token], logprob)


# ---- The rest ----


def test_models_and_what_they_are(client, server):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"
    status, _, facts = server.ask("GET", "/v1/customization")
    assert status == 200
    assert (facts["model"], facts["dtype"], facts["context_length"]) == (NAME, "fp32", 1024)
    assert facts["sampling"]["temperature"] == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["/models/my llama?", "org/model@main", "../x", "模型"])
def test_models_of_every_name(built, name):
    with running(built, name=name) as server:
        client = server.openai()
        assert [model.id for model in client.models.list()] == [name]
        assert client.models.retrieve(name).id == name
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name


def test_tokens_and_back(server, built):
    text = "The cat said: hello ☃"
    status, found = server.post("/tokenize", {"prompt": text})
    assert status == 200
    assert found["count"] == len(found["tokens"])
    assert found["tokens"] == built.prepared.tokenizer.encode(text, bos=True)
    assert server.post("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": text})
    rendered = server.post("/tokenize", {"messages": CHAT})[1]["tokens"]
    assert rendered == built.prepared.template.render(CHAT)
    shorter = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})[1]["tokens"]
    assert shorter == found["tokens"][1:]


def test_figures_for_prometheus(server, chat):
    def figures():
        lines = server.ask("GET", "/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = figures()
    used = chat(max_tokens=9).usage
    server.until(lambda: server.door.is_empty)
    after = figures()

    def grown(name):
        return after[f"torchchat_{name}"] - before.get(f"torchchat_{name}", 0.0)

    assert grown("generated_tokens_total") == used.completion_tokens == 9
    assert grown("prompt_tokens_total") == used.prompt_tokens
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("time_per_output_token_seconds_count") == 8
    assert grown('requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert after["torchchat_running"] == after["torchchat_waiting"] == 0


def test_tokens_that_end_an_answer_are_no_part_of_it(chat, built):
    """Neither of its text nor of its log-probabilities."""
    plain = chat(temperature=0, max_tokens=6, logprobs=True).choices[0].logprobs.content
    vocabulary = [built.prepared.tokenizer.decode_bytes((token,)) for token in range(built.engine.vocab_size)]
    fourth = len(vocabulary) - 1 - vocabulary[::-1].index(bytes(plain[3].bytes))
    cut = chat(temperature=0, max_tokens=6, logprobs=True, extra_body={"stop_token_ids": [fourth]})
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].logprobs.content == plain[:3]
    assert cut.usage.completion_tokens == 4
    ended = chat(messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=400, logprobs=True).choices[0]
    assert ended.finish_reason == "stop"
    assert "".join(entry.token for entry in ended.logprobs.content).lstrip() == ended.message.content
