"""Text out of tokens as they come: characters held back until they are whole, stop strings found across tokens. Knows
bytes, not the tokenizer that made them.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """One sequence's text. However the bytes are split into pieces, the texts returned join to the same whole.

    Bytes that are not UTF-8 become U+FFFD, one for each maximal invalid part, as in `bytes.decode(errors="replace")`.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        assert all(stop)
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """Whether a stop string was completed; nothing comes after it, and it is itself never part of the text."""

    def push(self, data: bytes) -> str:
        """The text that `data` makes certain: whole characters that cannot be the beginning of a stop string."""
        return self._take(self._utf8.decode(data))

    def finish(self) -> str:
        """What was still held back, once nothing more will come."""
        text = self._take(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        if not self._stop:
            return text
        # The stop string that is complete first wins, so that the split into tokens makes no difference.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = len(text) - self._longest_beginning(text)
        self._held = text[keep:]
        return text[:keep]

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
