"""Whether a step is being written down, for a compiler or a CUDA graph, rather than run: then custom ops stand for what
a compiler must not look into, and whatever waits for the host is out of place.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_tracing = False
_capturing = False
_portable = False


def is_tracing() -> bool:
    return _tracing


def is_capturing() -> bool:
    """Whether it is a CUDA graph that the step is written down for: no compiler will join the small operations."""
    return _capturing


def is_portable() -> bool:
    """Whether the step is written down for ExecuTorch, whose runtime has none of our ops."""
    return _portable


@contextmanager
def portable() -> Iterator[None]:
    """While this is open, the model writes itself down for ExecuTorch."""
    global _portable
    _portable = True
    try:
        yield
    finally:
        _portable = False


@contextmanager
def tracing(capturing: bool = False) -> Iterator[None]:
    """While this is open, the model writes itself down: for a compiler, or where `capturing`, for a CUDA graph."""
    global _tracing, _capturing
    _tracing, _capturing = True, capturing
    try:
        yield
    finally:
        _tracing = _capturing = False
