"""One file of a repository on Hugging Face into the shared cache: in parts, from where it stopped, and whole only when
its digest is right. Knows HTTP and the cache's layout; not which files make a model.

huggingface_hub throws away what it has of a file that is cut off, and believes what arrives. Here the part stays as
`blobs/DIGEST.incomplete`, and becomes `blobs/DIGEST`, which others read, after it was checked.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, hf_raise_for_status

from cli.console import status
from config.errors import UserError

CHUNK = 1 << 20
TRIES = 5
"""So often without a byte more, and it is given up."""
LONGEST_WAIT_S = 120.0
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of httpx, or of the package that took its place: huggingface_hub knows which it uses."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. `digest`: its SHA-256, or the SHA-1 that git has it by."""

    name: str
    url: str
    size: int
    digest: str


class Stopped(Exception):
    """Somebody else failed, or the person has had enough; what there is stays."""


def partial_path(blob: Path) -> Path:
    """Where a file is until it is whole."""
    return blob.with_name(f"{blob.name}.incomplete")


def fetch(
    file: RemoteFile,
    blob: Path,
    lock: Path,
    headers: dict[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """The file to `blob`, unless it is there. `advance` hears of each byte that arrives, and of those that have to be
    fetched again as a negative number. Raises UserError, HfHubHTTPError, TRANSPORT_ERROR, OSError (a full disk),
    Stopped.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            advance(file.size)
            return
        partial = partial_path(blob)
        digest = _fill(file, partial, headers, advance, stop)
        if digest != file.digest:
            partial.unlink()
            raise UserError(
                f"{file.name}: what arrived is not the file that Hugging Face has (its digest is {digest[:12]}…, not "
                f"{file.digest[:12]}…); nothing of it was kept: try again, perhaps over another connection"
            )
        os.replace(partial, blob)


def _fill(
    file: RemoteFile,
    partial: Path,
    headers: dict[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> str:
    """The rest of a file to what is there of it; its digest."""
    failures = 0
    with partial.open("ab+") as opened:
        digest, done = _digest_so_far(file, opened)
        while done < file.size:
            before = done
            try:
                with _get(file, headers, done) as response:
                    if done and response.status_code != 206:  # it has all of it to give, or none
                        opened.truncate(0)
                        advance(-done)
                        digest, done = _new_digest(file), 0
                    hf_raise_for_status(response)
                    for chunk in response.iter_bytes():  # as it comes: what is gathered is lost when it breaks
                        if stop.is_set():
                            raise Stopped
                        if done + len(chunk) > file.size:
                            raise UserError(f"{file.name}: is longer than the {file.size:,} bytes that were announced")
                        opened.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        advance(len(chunk))
            except HfHubHTTPError as error:
                failures = failures + 1
                wait_as_asked(error, failures, stop)
            except TRANSPORT_ERROR:
                failures = 1 if done > before else failures + 1
                if failures >= TRIES:
                    raise
                _wait(2.0 ** (failures - 1), stop)
            else:
                failures = 0 if done > before else failures + 1
                if failures >= TRIES:
                    raise UserError(f"{file.name}: no more than {done:,} of its {file.size:,} bytes could be had")
    return digest.hexdigest()


def wait_as_asked(error: HfHubHTTPError, failures: int, stop: threading.Event | None = None) -> None:
    """For a server that is busy: as long as it asks for, or longer each time. Any other error is raised again."""
    code = error.response.status_code
    asked = error.response.headers.get("Retry-After", "")
    seconds = float(asked) if asked.isdecimal() else 2.0 ** (failures - 1)
    if code not in (408, 429, 500, 502, 503, 504) or failures >= TRIES or seconds > LONGEST_WAIT_S:
        raise error
    if seconds >= 1:
        status(f"Hugging Face is busy ({code}): trying again in {seconds:.0f} s")
    _wait(seconds, stop)


def _wait(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def _get(file: RemoteFile, headers: dict[str, str], start: int) -> Any:
    """The response from `start` on, as a context manager. The client sends the token to no other host."""
    # As it is, for a part of what is packed cannot be asked for.
    asked = {**headers, "Accept-Encoding": "identity"}
    if start:
        asked["Range"] = f"bytes={start}-"
    return get_session().stream("GET", file.url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _digest_so_far(file: RemoteFile, opened: Any) -> tuple[_Hash, int]:
    """Of what is there of the file, and how many bytes that are; the end is where writing goes on."""
    digest, done = _new_digest(file), 0
    opened.seek(0)
    while chunk := opened.read(CHUNK):
        digest.update(chunk)
        done += len(chunk)
    if done > file.size:
        opened.truncate(0)
        return _new_digest(file), 0
    return digest, done


def _new_digest(file: RemoteFile) -> _Hash:
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # as git names what it keeps
