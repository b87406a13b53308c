"""Checked reading of a JSON object: every wrong type or number is one line that names the file and the key.

Knows no model; it remembers which keys were asked for, so that the rest can be refused by name.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from config.errors import UserError

# Nothing that exists comes near these; they keep a damaged file from asking for absurd amounts of memory.
MAX_INTEGER = 2**31 - 1
_LIMITS = {"num_hidden_layers": 4096, "n_layers": 4096, "num_attention_heads": 4096, "n_heads": 4096, "head_dim": 4096}


def shown(value: object) -> str:
    """The value as it would be quoted in a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """One JSON object of the file `where`; `defaults` are the values of the keys that it leaves out.

    `prefix` names the object inside its file ("rope_scaling."). Every method raises UserError.
    """

    def __init__(
        self, data: Mapping[str, object], where: str, defaults: Mapping[str, object] | None = None, prefix: str = ""
    ) -> None:
        self.data = data
        self.where = where
        self.defaults = defaults or {}
        self.prefix = prefix
        self.used: set[str] = set()

    def error(self, key: str, problem: str) -> UserError:
        """The error that `key` has `problem`, for the caller to raise."""
        return UserError(f"{self.where}: {self.prefix}{key} {problem}")

    def get(self, key: str) -> object:
        """The value as it stands in the file, or its default, or None."""
        self.used.add(key)
        return self.data[key] if key in self.data else self.defaults.get(key)

    def _required(self, key: str) -> object:
        value = self.get(key)
        if value is None:
            raise self.error(key, "is null" if key in self.data else "is missing")
        return value

    def integer(self, key: str, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; true and 8.0 are not whole numbers."""
        value = self._required(key)
        maximum = _LIMITS.get(key, MAX_INTEGER)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, f"is {shown(value)}, not a whole number from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """The same, or None where the key is missing or null."""
        return None if self.get(key) is None else self.integer(key, minimum)

    def number(self, key: str, above: float = -math.inf) -> float:
        """A finite number greater than `above`."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is {shown(value)}, not a number")
        if not (abs(value) < 1e300 and value > above):
            limit = "" if above == -math.inf else f" above {above:g}"
            raise self.error(key, f"is {shown(value)}, not a finite number{limit}")
        return float(value)

    def optional_number(self, key: str, above: float = -math.inf) -> float | None:
        """The same, or None where the key is missing or null."""
        return None if self.get(key) is None else self.number(key, above)

    def flag(self, key: str) -> bool:
        """true or false; a missing or null key without a default is false."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, f"is {shown(value)}, not true or false")
        return value

    def sequence(self, key: str) -> Sequence[object] | None:
        """A list, or None where the key is missing or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, (list, tuple)):
            raise self.error(key, f"is {shown(value)}, not a list")
        return value

    def positive_numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` finite numbers above zero."""
        values = self.sequence(key)
        if values is None:
            raise self.error(key, "is missing")
        if len(values) != length:
            raise self.error(key, f"has {len(values)} numbers, not {length} (half of the rotary dimensions)")
        items = Fields({f"{key}[{i}]": value for i, value in enumerate(values)}, self.where, prefix=self.prefix)
        return tuple(items.number(f"{key}[{i}]", above=0.0) for i in range(length))

    def section(self, key: str, defaults: Mapping[str, object] | None = None) -> "Fields | None":
        """The object under `key`, or None where it is missing or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"is {shown(value)}, not an object")
        return Fields(value, self.where, defaults, prefix=f"{self.prefix}{key}.")

    def choice(self, key: str, allowed: Collection[object]) -> object:
        """A value that must be one of `allowed`. True and 1 are different here."""
        value = self.get(key)
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            listed = ", ".join(shown(choice) for choice in allowed)
            raise self.error(key, f"is {shown(value)}; only {listed} can be run here")
        return value

    def refuse_unread(self, harmless: Collection[str], what: str) -> None:
        """Refuse the first key that nothing asked for and that is not in `harmless`: it may change the result.

        A null is let through: in these files it says that a feature is absent.
        """
        for key, value in self.data.items():
            if key in self.used or key in harmless or value is None:
                continue
            near = get_close_matches(key, sorted(self.used), n=1)
            hint = f" (the nearest that is: {near[0]})" if near else ""
            raise self.error(key, f"is not a key known for {what}{hint}; it may change the result, so it is refused")
