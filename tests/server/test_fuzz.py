"""Whatever is sent is answered or refused: never an error of our own, never one that is no JSON."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import RequestError
from server.messages import read_messages
from server.protocol import read_chat, read_completion, read_tokenize
from server.service import Served, Service
from server.tables import CHAT, COMPLETION, MESSAGE, TOKENIZE, TOOL
from server.worker import Worker
from tests.server.running import CHAT as MESSAGES

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
NAMED = st.dictionaries(
    st.sampled_from([*MESSAGE, *TOOL, "text", "name", "parameters", "arguments", "schema", "x"]), ANY
)
VALUE = ANY | NAMED | st.lists(NAMED, max_size=3)
GOOD = {
    "messages": st.just(MESSAGES),
    "prompt": st.sampled_from(["x", [5, 6], ["a", "b"], [[5], [6]]]),
    "max_tokens": st.just(5),
    "n": st.just(2),
    "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": st.sampled_from(["auto", "required", "none"]),
    "response_format": st.builds(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        st.dictionaries(st.sampled_from(["type", "properties", "items", "enum", "pattern", "$ref", "maxLength"]), ANY),
    ),
}
"""What gets past the first checks."""


def bodies(table):
    """A few fields of a table, now good, now anything; what is needed is there more often than not."""
    needed = {name: GOOD[name] for name in ("messages", "prompt") if name in table}
    names = st.lists(st.sampled_from(sorted(table)), max_size=5, unique=True)
    values = names.flatmap(lambda some: st.fixed_dictionaries({name: GOOD.get(name, VALUE) | VALUE for name in some}))
    return st.builds(lambda good, some: {**good, **some}, st.fixed_dictionaries(needed) | st.just({}), values)


@pytest.fixture(scope="module")
def service(built):
    prepared = built.prepared
    served = Served(prepared.name, built.engine, prepared.tokenizer, prepared.template, prepared.sampling)
    return Service(served, Worker.__new__(Worker))  # which nothing here asks anything of


def answered(read):
    """The result, or None where it was refused as it should be."""
    try:
        return read()
    except RequestError as error:
        refusal = error
    assert 400 <= refusal.status < 500
    json.dumps(refusal.body(), allow_nan=False)
    return None


FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FEW
@given(body=bodies(CHAT))
def test_chats(service, body):
    request = answered(lambda: read_chat(body, service.served.sampling))
    if request is not None:
        answered(lambda: service.chat(request))


@FEW
@given(body=bodies(COMPLETION))
def test_completions(service, body):
    request = answered(lambda: read_completion(body, service.served.sampling))
    if request is not None:
        answered(lambda: service.complete(request))


@FEW
@given(body=bodies(TOKENIZE))
def test_tokens(service, body):
    given = answered(lambda: read_tokenize(body))
    if given is not None:
        answered(lambda: service.render(given))


@FEW
@given(messages=st.lists(NAMED, max_size=3))
def test_messages(messages):
    answered(lambda: read_messages(messages))
