"""Whether a step is being traced to be compiled: then custom ops stand for what the compiler must not look into."""

from collections.abc import Iterator
from contextlib import contextmanager

_tracing = False


def is_tracing() -> bool:
    return _tracing


@contextmanager
def tracing() -> Iterator[None]:
    """While this is open, the model writes itself down for a compiler."""
    global _tracing
    _tracing = True
    try:
        yield
    finally:
        _tracing = False
