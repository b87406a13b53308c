"""The command `browser`: which port, and what happens where there is no browser."""

import contextlib
import socket
import webbrowser
from collections.abc import Iterator

import pytest

from cli import browser
from cli.main import main
from cli.serving import PORT


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    """Something listens on this port: we, or whoever does already."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            ours.bind(("127.0.0.1", port))
            ours.listen()
        yield


class Remembering(webbrowser.BaseBrowser):
    def __init__(self, works: bool = True) -> None:
        super().__init__("remembering")
        self.works, self.opened = works, []

    def open(self, url, new=0, autoraise=True):
        self.opened.append(url)
        return self.works


@pytest.fixture
def served(monkeypatch):
    """In place of serving: what it was asked for. It is ready at once."""
    calls = []

    def serve(args, environ, on_ready):
        calls.append(args)
        on_ready("http://127.0.0.1:1/")
        for thread in [t for t in browser.threading.enumerate() if t.name == "browser"]:
            thread.join(60)
        return 0

    monkeypatch.setattr(browser, "serve", serve)
    return calls


def use(monkeypatch, found) -> None:
    def get(using=None):
        if found is None:
            raise webbrowser.Error("none")
        return found

    monkeypatch.setattr(webbrowser, "get", get)


def test_the_page_is_opened(served, monkeypatch, capsys):
    person = Remembering()
    use(monkeypatch, person)
    assert main(["browser"]) == 0
    assert person.opened == ["http://127.0.0.1:1/"]
    assert "open" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "there is no browser here: open http://127.0.0.1:1/ in one"),
        (Remembering(works=False), "the browser did not start: open http://127.0.0.1:1/ in one"),
        (webbrowser.GenericBrowser("false"), "draws in a terminal: open http://127.0.0.1:1/ in another one"),
    ],
)
def test_without_a_browser_it_says_so_and_serves(served, monkeypatch, capsys, found, said):
    use(monkeypatch, found)
    monkeypatch.delenv("BROWSER", raising=False)
    assert main(["browser"]) == 0
    assert said in capsys.readouterr().err
    assert len(served) == 1


def test_a_port_that_is_given_is_the_one(served, monkeypatch):
    use(monkeypatch, Remembering())
    main(["browser", "--port", "4321"])
    main(["browser", "--port", "0"])
    assert [args.port for args in served] == [4321, 0]


def test_a_port_that_is_taken_is_passed_over(served, monkeypatch):
    use(monkeypatch, Remembering())
    with listening(PORT):
        main(["browser"])
    assert served[0].port > PORT


def test_a_wrong_host_is_one_line(served, capsys):
    assert main(["browser", "--host", "192.0.2.1"]) == 2
    assert capsys.readouterr().err.startswith("torchchat: error: --host 192.0.2.1")
