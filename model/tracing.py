"""Whether a step is being written down, for a compiler or a CUDA graph, rather than run: then custom ops stand for what
a compiler must not look into, and whatever waits for the host is out of place.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_tracing = False


def is_tracing() -> bool:
    return _tracing


@contextmanager
def tracing() -> Iterator[None]:
    """While this is open, the model writes itself down."""
    global _tracing
    _tracing = True
    try:
        yield
    finally:
        _tracing = False
