"""Where things are kept between runs, and how a file gets there whole. Does not know what is kept.

What is kept includes compiled code that is loaded again, so the directory must be the user's own: nobody else may
write in it.
"""

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cache_location(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that `cache_dir` would use: `TORCHCHAT_CACHE_DIR`, else the platform's place for caches.

    None when there is no home directory to put it in. Touches nothing.
    """
    if chosen := environ.get("TORCHCHAT_CACHE_DIR"):
        return Path(chosen).absolute()
    xdg = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: a relative path is invalid and is ignored
        return Path(xdg) / "torchchat"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "torchchat"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The cache directory, created with mode 0700; None if it cannot be had or is not safely ours.

    An existing directory is never changed unless it is empty (a shared one named by mistake must not become private):
    it is used if it belongs to this user, is writable, and is not writable by anybody else.
    """
    path = cache_location(environ)
    if path is None:
        return None
    try:
        _make_private_dir(path)
        status = path.stat()
        if stat.S_IMODE(status.st_mode) != 0o700 and status.st_uid == os.getuid() and not any(path.iterdir()):
            path.chmod(0o700)
            status = path.stat()
    except OSError:
        return None
    ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if ours and os.access(path, os.R_OK | os.W_OK | os.X_OK) else None


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` (mode 0600) so that a reader sees the old file or the new one, never a part.

    Missing directories are made with mode 0700. An OSError passes through and leaves no temporary file.
    """
    _make_private_dir(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=".tmp")  # mkstemp: 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_whole(path: Path) -> bool:
    """Whether the file is as `keep` left it. Raises OSError for one that cannot be read."""
    digest = path.with_suffix(".sha256").read_bytes()
    return hashlib.sha256(path.read_bytes()).hexdigest().encode() == digest


def keep(data: bytes, path: Path, most: int) -> None:
    """Keep `data` as `path`, beside it its digest, and of all files of its kind there the `most` used last. Raises
    OSError.
    """
    atomic_write(path, data)
    atomic_write(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode())
    kept = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda other: other.stat().st_mtime)
    for old in kept[:-most]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)


def _make_private_dir(path: Path) -> None:
    """`mkdir -p` with mode 0700 for each directory that was missing, whatever the umask."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        _make_private_dir(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
