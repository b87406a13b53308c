"""How many sequences a device has room for beside a model, and how long they may be, where a person did not say."""

from dataclasses import dataclass

from cli.builder import Prepared
from cli.console import human_bytes
from cli.exported import sequences_of
from cli.needs import Needs, needs_of
from config.errors import UserError

NUM_SEQS = {"cpu": 8, "mps": 8, "cuda": 32}
"""How many are wanted. On a CPU more of them hardly make more tokens together, and each of them slower ones."""
CONTEXT = 8192
"""How long they should be, if the model was made for that."""
LEAST_CONTEXT = 2048
"""Rather fewer sequences than shorter ones."""
SHARE = 0.92
"""Of what is free now: others use the device too, and allocators need room between tensors."""


@dataclass(frozen=True)
class Room:
    """`why`: of whichever was not said, for a person."""

    num_seqs: int
    max_seq_len: int
    why: str


def room_for(
    prepared: Prepared, num_seqs: int | None = None, max_seq_len: int | None = None, flag: str = "--max-num-seqs"
) -> Room:
    """As many sequences as are wanted, as long as is wanted, within what the device has left beside the model. None:
    was not said; a package says how long they are. flag: the one that says how many. Raises UserError where even one of
    the shortest does not fit, or what was said does not.
    """
    if prepared.package is not None:
        num_seqs = sequences_of(prepared.package, num_seqs, flag)
        max_seq_len = prepared.package.metadata.max_seq_len
    most = min(CONTEXT, prepared.config.max_position_embeddings)
    device = prepared.device.device.type
    first = (num_seqs or NUM_SEQS[device], max_seq_len or most)
    needs = needs_of(prepared, first[1], first[0])
    if _fits(needs):
        return Room(*first, f"{human_bytes(needs.cache)} of keys and values")
    sequences, length = first
    while (sequences, length) != (smaller := _smaller(sequences, length, num_seqs is None, max_seq_len is None)):
        sequences, length = smaller
        needs = needs_of(prepared, length, sequences)
        if _fits(needs):
            why = f"{human_bytes(needs.cache)} of keys and values; there is no room for {first[0]} of {first[1]} tokens"
            return Room(sequences, length, why)
    raise UserError(
        f"{sequences} sequence{'s' * (sequences != 1)} of {length} tokens need {human_bytes(needs.more)} with "
        f"{prepared.name}, and {human_bytes(needs.free)} are free on {device}: take a smaller {flag} or "
        "--max-seq-len, or a --quantize recipe"
    )


def _smaller(sequences: int, length: int, fewer: bool, shorter: bool) -> tuple[int, int]:
    """The next to try; the same again when there is nothing smaller."""
    if shorter and length // 2 >= LEAST_CONTEXT:
        return sequences, length // 2
    if fewer and sequences > 1:
        return sequences // 2, length
    return (sequences, length // 2) if shorter and length >= 512 else (sequences, length)


def _fits(needs: Needs) -> bool:
    return needs.more <= SHARE * needs.free
