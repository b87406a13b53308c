"""The command itself: its messages, its exit codes and how it ends, as processes."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli.main import main
from tests.server.running import CHAT, PATIENCE_S

ROOT = Path(__file__).parent.parent.parent


class Process:
    """`torchchat server` with some flags; `port` once it listens."""

    def __init__(self, *flags, program=(str(ROOT / "torchchat.py"),), **variables):
        self.process = subprocess.Popen(
            [sys.executable, *program, "server", "--port", "0", *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        self.lines = []
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._listens.wait(PATIENCE_S)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", "\n".join(self.lines))
        assert found, self.lines
        self.port = int(found[1])

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if "listening on" in line:
                self._listens.set()
        self._listens.set()

    def request(self, body=None, path="/v1/chat/completions", **headers):
        """The response, of which only the head was read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, data, {"Content-Type": "application/json", **headers}
        )
        return connection.getresponse()

    def end(self):
        """The exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture
def start():
    started = []

    def begin(*flags, **variables):
        started.append(Process(*flags, **variables))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


def test_a_server_from_beginning_to_end(start):
    """Says what it is and where; answers; finishes a stream after SIGTERM, and nothing new begins; ends with 0."""
    server = start("--dtype", "fp32", "--max-num-seqs", "2", "--max-queue", "3", "--verbose", TORCHCHAT_API_KEY="sk-1")
    told = "\n".join(server.lines)
    assert "default · cpu" in told
    assert "fp32 (--dtype) · eager · unquantized" in told
    assert "2 answers at a time" in told
    assert "(the key is asked for)" in told
    assert server.request(path="/v1/models").status == 401
    key = {"Authorization": "Bearer sk-1"}
    facts = json.load(server.request(path="/v1/customization", **key))
    assert (facts["dtype"], facts["max_num_seqs"], facts["compiled"]) == ("fp32", 2, False)
    assert facts["bytes_per_token"] > 1e6
    assert facts["bandwidth"] > 1e6
    ask = {"messages": CHAT, "stream": True, "max_tokens": 300, "ignore_eos": True}
    stream = server.request(ask, **key)
    assert stream.status == 200
    first = stream.readline()
    server.process.send_signal(signal.SIGTERM)
    rest = stream.read()
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert rest.count(b'"content":"') > 100
    assert server.end() == 0
    assert any(re.search(r"POST /v1/chat/completions 200 in [\d.]+ s, 300 tokens", line) for line in server.lines)
    assert not any("Traceback" in line for line in server.lines)
    assert "sk-1" not in "\n".join(server.lines)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_second_signal_ends_it_at_once(start):
    server = start("--max-num-seqs", "2")
    ask = {"messages": CHAT, "stream": True, "max_tokens": 900, "ignore_eos": True, "n": 100}
    stream = server.request(ask)
    assert stream.readline()
    server.process.send_signal(signal.SIGINT)
    while server.request(path="/health").status != 503:  # it has heard
        pass
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 128 + signal.SIGINT
    with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
        assert not stream.read().rstrip().endswith(b"[DONE]")
    assert not any("Traceback" in line for line in server.lines)


BROKEN = """
import sys
from cli.main import main
from generate.engine import Engine

def fails(self, work):
    raise RuntimeError("every prompt fails")

Engine._issue_prefill = fails
sys.exit(main())
"""


def test_a_server_whose_engine_is_dead_ends_with_1(start):
    server = start("--max-num-seqs", "2", program=("-c", BROKEN))
    codes = [json.load(server.request({"messages": CHAT}))["error"]["code"] for _ in range(8)]
    assert codes == ["engine_failure"] * 8
    assert server.end() == 1
    assert server.lines[-1] == "torchchat: error: the engine failed again and again"


def test_help_waits_for_nothing():
    script = "import sys; from cli.main import main; main(['server', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "--max-queue" in done.stdout
    assert not {"torch", "flask", "waitress", "llguidance", "server"} & set(done.stdout.splitlines()[-1].split())


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["server", "--port", str(port)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"--port {port}: something else listens on 127.0.0.1 there already" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535"),
        (["--port", "-1"], "--port"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--cors-origin", "example.com"], "--cors-origin example.com"),
        (["--api-key", "two words"], "the API key"),
        (["--api-key", ""], "the API key"),
        (["--max-num-seqs", "1000", "--max-seq-len", "99999"], "--max-seq-len"),
        (["nonsense-model"], "nonsense-model"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, flags, said):
    assert main(["server", "--port", "0", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_what_would_be_built_can_be_explained(capsys):
    assert main(["server", "--explain", "--max-num-seqs", "4"]) == 0
    assert "4" in capsys.readouterr().out
