"""How many requests are inside, and whether more may come in. Threads may share it."""

import threading
from collections.abc import Callable

from server.errors import overloaded, unavailable


class Door:
    """limit: so many are inside at the same time. on_empty: is called when the last one leaves a closed door."""

    def __init__(self, limit: int, on_empty: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.inside = 0
        self.closed = False
        self.on_empty = on_empty
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Raises RequestError: 503 once it is closed, 429 when the house is full."""
        if self.closed:
            raise unavailable("the server is ending and takes no requests any more")
        with self._lock:
            if self.inside >= self.limit:
                raise overloaded(self.limit)
            self.inside += 1

    def leave(self) -> None:
        with self._lock:
            self.inside -= 1
        if self.closed and self.is_empty:
            self.on_empty()

    def close(self) -> None:
        """Nobody comes in any more. A signal handler may call this: it takes no lock."""
        self.closed = True

    @property
    def is_empty(self) -> bool:
        return self.inside == 0
