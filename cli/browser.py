"""The command `browser`: the server, and its page opened in the person's browser. Opens one; serving is not its own."""

import argparse
import os
import threading
import webbrowser

from cli.console import status
from cli.serving import PORT, add_serving_arguments, serve
from config.errors import UserError

PORTS_TRIED = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `server`."""
    add_serving_arguments(parser, default_port=f"{PORT}, or the next one that is free")
    parser.set_defaults(port=None)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; 0, or 1 when the engine failed. Raises UserError."""
    if args.port is None:
        args.port = PORT if args.explain else first_free_port(args.host)
    return serve(args, os.environ, show)


def first_free_port(host: str) -> int:
    """From PORT on. Raises UserError."""
    from server.http import bind

    for port in range(PORT, PORT + PORTS_TRIED):
        try:
            bind(host, port).close()
        except UserError:
            if port == PORT + PORTS_TRIED - 1:
                raise
        else:
            return port
    raise AssertionError("no port was tried")


def show(address: str) -> None:
    """Open the page; where that cannot be, say so. Returns at once: some browsers take their time to start."""
    threading.Thread(target=_open, args=(address,), name="browser", daemon=True).start()


def _open(address: str) -> None:
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        status(f"there is no browser here: open {address} in one")
        return
    # One that draws in a terminal would take this one; if that is meant, BROWSER names it.
    if type(browser) is webbrowser.GenericBrowser and not os.environ.get("BROWSER"):
        status(f"the only browser here draws in a terminal: open {address} in another one")
    elif not browser.open(address):
        status(f"the browser did not start: open {address} in one")
