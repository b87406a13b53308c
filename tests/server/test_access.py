"""Who may ask: keys, hosts, origins; and what is refused before anything is read."""

import http.client
import socket

import openai
import pytest

from config.errors import UserError
from server.security import Access
from server.tables import MAX_DEPTH
from tests.server.running import CHAT, running

KEY = "sk-a-secret"
ASK = {"messages": CHAT, "max_tokens": 1}
GUARDED = ["/v1/models", "/v1/models/default", "/v1/customization", "/metrics", "/version", "/openapi.json", "/nothing"]


@pytest.fixture(scope="module")
def guarded(built):
    with running(built, key=KEY, origins=("https://chat.example:8443",)) as server:
        yield server


def test_a_key_guards_everything_but_health_and_the_page(guarded):
    for path in GUARDED:
        assert guarded.ask("GET", path)[0] == 401, path
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert guarded.ask("POST", path, ASK)[0] == 401, path
    assert guarded.ask("GET", "/health")[0] == 200
    assert guarded.ask("GET", "/")[0] == 200
    assert guarded.ask("GET", "/static/main.js")[0] == 200
    assert guarded.door.is_empty


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"]
)
def test_wrong_keys(guarded, header):
    status, headers, found = guarded.ask("GET", "/v1/models", headers={"Authorization": header.encode("utf-8")})
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert (found["error"]["type"], found["error"]["code"]) == ("authentication_error", "invalid_api_key")
    assert KEY not in str(found)


def test_the_right_key(guarded):
    assert guarded.openai(KEY).chat.completions.create(model="default", messages=CHAT, max_tokens=1).choices
    assert guarded.ask("GET", "/v1/models", headers={"Authorization": f"bearer {KEY}"})[0] == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.openai("another").models.list()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("app.localhost", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("chat.example", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_hosts(guarded, host, status):
    """A name that somebody points at this machine is not this server's."""
    assert guarded.ask("GET", "/health", headers={"Host": host})[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("https://chat.example:8443", 200),
        ("https://chat.example", 403),
        ("http://chat.example:8443", 403),
        ("http://localhost:9", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_origins(guarded, origin, status):
    headers = {"Host": "localhost", "Origin": origin, "Authorization": f"Bearer {KEY}"}
    found, told, _ = guarded.ask("POST", "/v1/chat/completions", ASK, headers)
    assert found == status
    allowed = origin if origin == "https://chat.example:8443" else None
    assert told.get("access-control-allow-origin") == allowed


def test_another_sites_page_asks_first(guarded):
    headers = {"Origin": "https://chat.example:8443", "Access-Control-Request-Method": "POST"}
    status, told, _ = guarded.ask("OPTIONS", "/v1/chat/completions", headers=headers)
    assert status == 204
    assert told["access-control-allow-origin"] == "https://chat.example:8443"
    assert "authorization" in told["access-control-allow-headers"].lower()
    assert told["vary"] == "Origin"
    assert guarded.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})[0] == 403


def test_names_and_keys_that_are_none():
    for origin in ("example.com", "ftp://x", "https://", "https://x/path", "https://x:y", ""):
        with pytest.raises(UserError, match="--cors-origin"):
            Access.of("127.0.0.1", [origin])
    for key in ("", "with space", "é", "line\nbreak"):
        with pytest.raises(UserError, match="API key"):
            Access.of("127.0.0.1", key=key)
    assert Access.of("127.0.0.1", ["*"]).check_origin("https://any.example", "localhost")


def test_the_page_may_load_nothing_of_others(server):
    for path in ("/", "/static/main.js"):
        headers = server.ask("GET", path)[1]
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"]
)
def test_no_other_file_is_served(server, path):
    assert server.ask("GET", path)[0] == 404


# ---- What is no request ----


def test_paths_and_methods(server):
    for method, path, status, code in [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/default", 405, "method_not_allowed"),
    ]:
        found, _, told = server.ask(method, path, {} if method == "POST" else None)
        assert (found, told["error"]["code"]) == (status, code), path
        assert set(told["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"x"', 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"temperature": Infinity}', 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
        (b'{"metadata": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", 400, "invalid_json"),
    ],
    ids=["none", "half", "list", "text", "no utf-8", "nan", "infinity", "digits", "deep", "too deep"],
)
def test_bodies(server, body, status, code):
    for path in ("/v1/chat/completions", "/tokenize"):
        found, _, told = server.ask("POST", path, body)
        assert (found, told["error"]["code"]) == (status, code)


def test_types_of_bodies(server):
    for kind, status in [("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("", 415),
                         ("application/json; charset=utf-8", 200), ("APPLICATION/JSON", 200)]:  # fmt: skip
        assert server.ask("POST", "/tokenize", b'{"prompt": "x"}', {"Content-Type": kind})[0] == status, kind


def test_headers_that_are_too_large(server):
    status, _, told = server.ask("GET", "/health", headers={"X-Long": "x" * 40_000})
    assert (status, told["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("length", [(8 << 20) + 1, 99999999999])
def test_a_body_that_is_announced_too_large_is_not_waited_for(server, length):
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data.startswith(b"HTTP/1.1 413")
    assert b'"code": "body_too_large"' in data


def test_a_body_that_is_just_small_enough_is_read(server):
    body = {**ASK, "metadata": {"x": "y" * ((8 << 20) - 200)}}
    assert server.post("/v1/chat/completions", body)[0] == 200


def test_what_is_no_http(server):
    for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
            connection.sendall(sent)
            data = connection.recv(65536)
            assert data.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
            assert b'"error"' in data or b'"error"' in connection.recv(65536)


def test_several_requests_on_one_connection(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for path, status in [("/health", 200), ("/nothing", 404), ("/version", 200)] * 3:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_an_error_of_ours_tells_nothing_of_us(server, monkeypatch, capfd):
    def broken(tokens):
        raise KeyError("/secret/path")

    monkeypatch.setattr(type(server.engine.tokenizer), "decode", lambda self, tokens: broken(tokens))
    status, found = server.post("/detokenize", {"tokens": [5]})
    assert (status, found["error"]["type"], found["error"]["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in str(found)
    assert "Traceback" not in str(found)
    assert "/secret/path" in capfd.readouterr().err
