"""Who gets a place, who loses it and when: disconnects, refusals, failing steps, the end. No test waits for time to
pass: the engine's steps wait at a gate.
"""

import json
import socket
import time

import pytest
import torch

from config.settings import SamplingParams
from tests.server.running import CHAT, PATIENCE_S, read_events, running

LONG = {"messages": CHAT, "max_tokens": 500, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def server(built):
    with running(built) as started:
        yield started


def tokens_of(server):
    """Read and generated so far; the servers of all tests count together."""
    ledger = server.engine.ledger
    return ledger.prefill_tokens, ledger.decode_tokens


def gone(server):
    """Whether nothing is left of any request."""
    return server.door.is_empty and not server.engine.has_unfinished


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_while_its_answer_is_made_frees_its_place(server, stream):
    before = tokens_of(server)
    server.gate.close()
    connection = server.connect("/v1/chat/completions", {**LONG, "stream": stream})
    server.gate.step(5)
    assert server.worker.running == 1
    connection.close()
    server.until(lambda: server.worker._inbox)  # noticed while the engine does nothing at all
    server.gate.open()
    server.until(lambda: gone(server))
    assert tokens_of(server)[1] - before[1] <= 5


def test_a_client_that_goes_while_its_prompt_is_read_frees_its_place(server):
    before = tokens_of(server)
    server.engine.scheduler.prefill_chunk = 8
    server.gate.close()
    prompt = [{"role": "user", "content": "the cat and the dog " * 40}]
    connection = server.connect("/v1/chat/completions", {**LONG, "messages": prompt, "stream": True})
    server.gate.step(2)
    assert len(server.engine.scheduler.prefilling) == 1
    connection.close()
    server.until(lambda: server.worker._inbox)
    server.gate.open()
    server.until(lambda: gone(server))
    assert tokens_of(server) == (before[0] + 24, before[1])  # the step that waited was done


def test_a_client_that_goes_while_it_waits_leaves_the_queue(server):
    server.gate.close()
    connections = [server.connect("/v1/chat/completions", LONG)]
    server.gate.wait()
    connections += [server.connect("/v1/chat/completions", LONG) for _ in range(5)]
    server.until(lambda: server.door.inside == 6)
    server.until(lambda: len(server.worker._inbox) == 5)
    server.gate.step()
    assert (server.worker.running, server.worker.waiting) == (1, 5)
    server.gate.step(3)
    assert (server.worker.running, server.worker.waiting) == (4, 2)
    connections.pop().close()
    server.until(lambda: server.worker._inbox)
    server.gate.step()
    assert (server.worker.running, server.worker.waiting) == (4, 1)
    for connection in connections:
        connection.close()
    server.until(lambda: len(server.worker._inbox) == 5)
    server.gate.open()
    server.until(lambda: gone(server))
    assert server.ask("GET", "/health")[0] == 200


def test_over_the_limit_is_429_and_health_answers_all_the_same(server):
    server.gate.close()
    connections = [server.connect("/v1/chat/completions", {**LONG, "max_tokens": 3}) for _ in range(8)]
    server.until(lambda: server.door.inside == 8)
    for _ in range(20):
        status, headers, found = server.ask("POST", "/v1/chat/completions", LONG)
        assert status == 429
        assert int(headers["retry-after"]) > 0
        assert found["error"]["code"] == "rate_limit_exceeded"
        assert found["error"]["type"] == "rate_limit_error"
    assert server.ask("GET", "/health")[0] == 200
    assert server.ask("GET", "/v1/models")[0] == 200
    assert b"torchchat_requests_inside 8.0" in server.ask("GET", "/metrics")[2]
    server.gate.open()
    for connection in connections:  # and none of those that were taken is lost
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    server.until(lambda: gone(server))
    assert server.post("/v1/chat/completions", {**LONG, "max_tokens": 3})[0] == 200


def test_a_client_that_never_reads_stalls_nobody(server):
    connection = server.connect("/v1/chat/completions", {**LONG, "stream": True, "max_tokens": 400})
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    assert server.post("/v1/chat/completions", {**LONG, "max_tokens": 5})[0] == 200
    server.until(lambda: not server.engine.has_unfinished)
    connection.close()
    server.until(lambda: gone(server))


def test_a_client_that_takes_nothing_is_let_go_at_last(server):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        server.until(server.http._channels)
        (channel,) = server.http._channels()
        seen = []

        def is_stuck():  # nothing is answered any more, as nothing that was answered can be sent
            seen.append((len(channel.requests), channel.total_outbufs_len))
            return len(seen) > 20 and len(set(seen[-20:])) == 1 and seen[-1][1] > 0

        server.until(is_stuck)

        def long_after():
            channel.last_activity = 0
            server.http.maintenance(time.time())

        server.http.pull_trigger(long_after)
        server.until(lambda: not channel.connected)
    assert server.ask("GET", "/health")[0] == 200


# ---- Steps that fail ----


def texts_of(server, *asks):
    """Asks all at once, one step apart, and gives status and body of each."""
    server.gate.close()
    connections = []
    for ask in asks:
        connections.append(server.connect("/v1/completions", {"temperature": 0, "max_tokens": 20, **ask}))
        if len(connections) == 1:
            server.gate.wait()
        else:
            server.until(lambda: server.worker._inbox)
        server.gate.step(2)
    return connections


def read(connection):
    """Status and document of an answer."""
    connection.settimeout(PATIENCE_S)
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1])
    while len(body) < length:
        body += connection.recv(65536)
    connection.close()
    return int(head.split()[1]), json.loads(body)


def fail_in(server, monkeypatch, name, error):
    """The next prefill or decode raises this, once it has begun."""
    real = server.engine.__dict__[name]

    def failing(*args):
        monkeypatch.setattr(server.engine, name, real)
        raise error

    monkeypatch.setattr(server.engine, name, failing)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB at 0x7f00"), "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (ValueError("secret/path"), "engine_failure"),
    ],
    ids=["gpu memory", "cpu memory", "anything"],
)
def test_a_prompt_that_fails_fails_alone(server, monkeypatch, error, code, capfd):
    alone = server.post("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 20})[1]
    (first,) = texts_of(server, {"prompt": "Once upon a time"})
    fail_in(server, monkeypatch, "prefill_fn", error)
    second = server.connect("/v1/completions", {"prompt": "The dog was", "max_tokens": 20})
    server.until(lambda: server.worker._inbox)
    server.gate.open()
    status, found = read(second)
    assert (status, found["error"]["code"], found["error"]["type"]) == (500, code, "server_error")
    assert "secret" not in json.dumps(found)
    assert "0x7f" not in json.dumps(found)
    assert "Traceback" not in json.dumps(found)
    assert "Traceback" in capfd.readouterr().err  # for whoever runs the server
    status, found = read(first)
    assert (status, found["choices"]) == (200, alone["choices"])
    assert server.ask("GET", "/health")[0] == 200
    again = server.post("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 20})[1]
    assert again["choices"] == alone["choices"]


PROMPTS = ("Once upon a time", "The dog was very", "One day, a girl named")


def three(server):
    """What each of three prompts gets alone, and the connections on which they are answered together."""
    ask = {"temperature": 0, "max_tokens": 20}
    alone = [server.post("/v1/completions", {"prompt": prompt, **ask})[1]["choices"] for prompt in PROMPTS]
    connections = texts_of(server, *({"prompt": prompt} for prompt in PROMPTS))
    assert len(server.engine.scheduler.running) == 3
    return alone, connections


def fail_when(server, monkeypatch, is_wrong):
    """Decode steps of such slots fail."""
    real = server.engine.decode_fn

    def failing(model, cache, state, slots, plan):
        if is_wrong(set(slots.tolist())):
            raise torch.OutOfMemoryError("full")
        return real(model, cache, state, slots, plan)

    monkeypatch.setattr(server.engine, "decode_fn", failing)


@pytest.mark.parametrize("guilty", range(3))
def test_a_decode_step_that_fails_ends_the_request_that_makes_it_fail(server, monkeypatch, guilty):
    alone, connections = three(server)
    slot = server.engine.scheduler.running[guilty].slot
    fail_when(server, monkeypatch, lambda slots: slot in slots)
    server.gate.open()
    answers = [read(connection) for connection in connections]
    assert [status for status, _ in answers] == [500 if i == guilty else 200 for i in range(3)]
    assert all(found.get("choices", alone[i]) == alone[i] for i, (_, found) in enumerate(answers))
    server.until(lambda: gone(server))


def test_what_is_too_much_together_ends_the_newest(server, monkeypatch):
    alone, connections = three(server)
    everyone = {sequence.slot for sequence in server.engine.scheduler.running}
    fail_when(server, monkeypatch, lambda slots: slots >= everyone)
    server.gate.open()
    answers = [read(connection) for connection in connections]
    assert [status for status, _ in answers] == [200, 200, 500]
    assert [found["choices"] for _, found in answers[:2]] == alone[:2]


def test_a_failure_that_passes_ends_nobody(server, monkeypatch):
    alone, connections = three(server)
    fail_in(server, monkeypatch, "decode_fn", torch.OutOfMemoryError("full"))
    server.gate.open()
    assert [read(connection)[1]["choices"] for connection in connections] == alone


def test_a_token_that_was_made_and_lost_ends_its_request(server, monkeypatch):
    """After it, nothing would be what it is without the failure."""
    server.gate.close()
    connection = server.connect("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 20})
    server.gate.step(3)
    real = server.engine.decode_fn

    def failing(*args):
        real(*args)
        raise ValueError("too late")

    monkeypatch.setattr(server.engine, "decode_fn", failing)
    server.gate.open()
    assert read(connection)[0] == 500


def test_a_failure_in_the_middle_of_a_stream_is_an_event(server, monkeypatch):
    server.gate.close()
    connection = server.connect("/v1/chat/completions", {**LONG, "stream": True})
    server.gate.step(4)
    fail_when(server, monkeypatch, lambda slots: True)
    server.gate.open()
    data = b""
    while piece := connection.recv(65536):
        data += piece
    lines = [line for line in data.decode().splitlines() if line.startswith("data: ")]
    events = read_events("\n\n".join(lines).encode())
    assert events[-1] is None
    assert events[-2]["error"]["code"] == "out_of_memory"
    assert events[-3]["choices"][0]["delta"]["content"]


def test_an_engine_that_fails_every_time_is_dead(server, monkeypatch):
    def failing(*args):
        raise RuntimeError("broken")

    died = []
    server.worker.on_death = lambda: died.append(1)
    monkeypatch.setattr(server.engine, "prefill_fn", failing)
    codes = [server.post("/v1/chat/completions", LONG)[1]["error"]["code"] for _ in range(8)]
    assert codes == ["engine_failure"] * 8
    server.until(lambda: died)
    assert died == [1]
    assert server.ask("GET", "/health")[::2] == (503, {"status": "dead"})
    assert server.post("/v1/chat/completions", LONG)[0] == 503


# ---- The end ----


def test_what_runs_is_finished_before_the_end_and_nothing_new_begins(server):
    server.gate.close()
    stream = server.connect("/v1/chat/completions", {**LONG, "max_tokens": 50, "stream": True})
    server.gate.step(3)
    server.door.close()
    server.http.end(lambda: server.door.is_empty)
    status, headers, found = server.ask("POST", "/v1/chat/completions", LONG)
    assert (status, found["error"]["code"]) == (503, "unavailable")
    assert "retry-after" in headers
    assert server.ask("GET", "/health")[::2] == (503, {"status": "draining"})
    assert server.thread.is_alive()
    server.gate.open()
    data = b""
    while piece := stream.recv(65536):
        data += piece
    assert data.count(b"data: ") == 53  # the role, each token, the reason, [DONE]
    assert data.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
    server.thread.join(PATIENCE_S)
    assert not server.thread.is_alive()


def test_a_default_of_the_model_is_used_where_a_request_says_nothing(built):
    with running(built, sampling=SamplingParams(temperature=0, max_new_tokens=4)) as server:
        found = [server.post("/v1/chat/completions", {"messages": CHAT})[1] for _ in range(2)]
        assert found[0]["choices"] == found[1]["choices"]
        assert found[0]["usage"]["completion_tokens"] == 4
