"""Who may ask: hosts, origins, keys. Knows headers, no routes.

A page on another site can make a browser send requests here, and with a name that it points at this machine (DNS
rebinding) even read the answers. So a Host is an address or a name that is known to be ours, and an Origin is the
page's own or one that was allowed.
"""

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from config.errors import UserError
from server.errors import RequestError

ANY = "*"


@dataclass(frozen=True)
class Access:
    """key: None lets everybody in. origins: of other sites' pages that may ask; "*": all."""

    names: frozenset[str]
    origins: frozenset[str] = frozenset()
    key: str | None = None

    @classmethod
    def of(cls, host: str, origins: Iterable[str] = (), key: str | None = None) -> "Access":
        """For a server on `host`. Raises UserError."""
        checked = frozenset(_origin(origin) for origin in origins)
        own = socket.gethostname().lower()
        names = {"localhost", host.lower(), own, f"{own}.local"}
        names |= {urlsplit(origin).hostname or "" for origin in checked}
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise UserError("the API key must be printable ASCII without spaces, as headers carry it")
        return cls(frozenset(names - {""}), checked, key)

    def check_host(self, host: str | None) -> None:
        """Raises RequestError."""
        name = _hostname(host or "")
        if name in self.names or name.endswith(".localhost") or _is_address(name):
            return
        raise RequestError(
            403,
            f"the host {name[:100]!r} is not known to be this server; --cors-origin https://NAME lets it in",
            code="host_not_allowed",
        )

    def check_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether it is another site's page, which may ask. Raises RequestError if it may not."""
        if origin is None:
            return False
        scheme, _, netloc = origin.partition("://")
        if scheme in ("http", "https") and netloc and netloc.lower() == (host or "").lower():
            return False
        if ANY in self.origins or origin.lower() in self.origins:
            return True
        raise RequestError(
            403,
            f"pages of {origin[:100]!r} may not ask this server; --cors-origin lets them in",
            code="origin_not_allowed",
        )

    def check_key(self, authorization: str | None) -> None:
        """Raises RequestError. Takes the same time however much of the key is right."""
        if self.key is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode()):
            return
        why = "the API key is wrong" if authorization else "this server asks for an API key: Authorization: Bearer KEY"
        raise RequestError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _origin(text: str) -> str:
    if text == ANY:
        return text
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and not parts.query
        parts.port  # noqa: B018 (raises for one that is no number)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--cors-origin {text}: write it as https://NAME or http://NAME:PORT, or * for all")
    return f"{parts.scheme}://{parts.netloc}".lower()


def _hostname(host: str) -> str:
    """Without the port, and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
