"""How likely a model finds texts that continue others, which is what evaluations ask. Token ids in, sums of
log-probabilities out; the slots of a cache are its room. Knows neither tokenizers nor tasks.

A beginning is read once: that of all continuations of one context, and that of many contexts one after the other, such
as the examples that each question of a task begins with. What then differs is read many rows at a time, rows of about
the same length together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from config.errors import UserError
from generate.scheduler import common_prefix
from generate.step import LanguageModel
from model.kv_cache import KVCache

Read = Callable[[LanguageModel, KVCache, Tensor, Tensor, Tensor, int], Tensor]
"""`generate.step.read`."""

LEAST_SHARED = 8
"""Fewer tokens are sooner read again, each row for itself, than read apart and copied."""
LEAST_COMMON = 32
"""So many tokens, and a quarter of a context, must several contexts begin with for that to be read before them."""
FEW_TOKENS = 4
"""Of a row beyond what it shares: most have more."""
LOGIT_NUMBERS = 2**24
"""So many logits are in memory at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Continuation:
    """Token ids, and those that continue them; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """logprob: of the continuation after its context, the natural logarithm. is_greedy: each of its tokens is the
    likeliest where it stands.
    """

    logprob: float
    is_greedy: bool


@dataclass(eq=False)
class Row:
    """Tokens to read, from whose places `first` on tokens are predicted: for each of the requests `asked` those that
    its continuation has. Requests that differ in their last token alone share a row.
    """

    tokens: tuple[int, ...]
    first: int
    asked: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Family:
    """Rows that begin with the same `shared` tokens. The last of these predicts what is asked first of each row, the
    others predict nothing that is asked. The longest row comes first.
    """

    shared: int
    rows: list[Row]

    @property
    def beginning(self) -> tuple[int, ...]:
        return self.rows[0].tokens[: self.shared]

    @property
    def before(self) -> tuple[int, ...]:
        """The tokens that predict nothing that is asked."""
        return self.rows[0].tokens[: self.shared - 1]

    @property
    def longest(self) -> int:
        return len(self.rows[0].tokens)

    def piece(self, slot: int, base: int) -> "Piece":
        """What is shared, from position `base` on."""
        return Piece(slot, base, self.beginning[base:], tuple(self.rows))

    def is_read_apart(self, base: int) -> bool:
        """Whether what is shared beyond the first `base` tokens is worth being read by itself, and copied."""
        return len(self.rows) > 1 and self.shared - base > LEAST_SHARED


@dataclass
class Tally:
    """What was found so far: of each request the sum of log-probabilities, and whether all its tokens were the
    likeliest. tokens: how many were read.
    """

    logprobs: list[float]
    greedy: list[bool]
    tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens that are read at once into `slot`, the first at position `start`. rows: those that they are of, if any of
    them predict what is asked.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    rows: tuple[Row, ...] = ()


class Reader:
    """Reads families into the slots of a cache, which is its own while it does so, and tallies what is asked."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        read: Read,
        *,
        num_slots: int,
        most_tokens: int,
        vocab_size: int,
        any_shape: bool = True,
    ) -> None:
        """num_slots: how many rows there may be at a time. most_tokens: how many of their tokens are read at once.
        any_shape: `read` takes a cache of another shape too: short rows then share a slot's memory.
        """
        self.model, self.cache, self.read = model, cache, read
        self.num_slots, self.most_tokens, self.vocab_size = num_slots, most_tokens, vocab_size
        self.any_shape = any_shape
        self.device = cache.keys[0].device

    def score(self, requests: Sequence[Continuation], on_done: Callable[[int], None]) -> tuple[list[Likelihood], int]:
        """The likelihood of each request, and how many tokens were read for all of them."""
        tally = Tally([0.0] * len(requests), [True] * len(requests))
        for base, families in clusters(families_of(requests, self.cache.max_seq_len)):
            if base:
                beginning = families[0].beginning[:base]
                self._read([Piece(0, 0, beginning)], requests, tally)
                for slot in range(1, self.num_slots):
                    self.cache.copy(0, slot, base)
                self._read_families(families, base, requests, tally, on_done)
                continue
            by_factor: dict[int, list[Family]] = {}
            for family in families:
                by_factor.setdefault(self._factor(family), []).append(family)
            for factor, some in by_factor.items():
                self._with_shorter(factor)._read_families(some, 0, requests, tally, on_done)
        return [Likelihood(*found) for found in zip(tally.logprobs, tally.greedy, strict=True)], tally.tokens

    def _factor(self, family: Family) -> int:
        """Into how many parts a slot may be cut for the rows of a family: few different numbers, for large batches."""
        factor = 1
        while self.any_shape and self.cache.max_seq_len // (4 * factor) >= family.longest:
            factor *= 4
        return factor

    def _with_shorter(self, factor: int) -> "Reader":
        if factor == 1:
            return self
        # More rows than are read at once would win nothing, and progress is told after each batch.
        num_slots = min(self.num_slots * factor, max(self.num_slots, self.most_tokens // FEW_TOKENS))
        return Reader(
            self.model, self.cache.shorter(factor), self.read, num_slots=num_slots, most_tokens=self.most_tokens,
            vocab_size=self.vocab_size,
        )  # fmt: skip

    def _read_families(
        self,
        families: Sequence[Family],
        base: int,
        requests: Sequence[Continuation],
        tally: Tally,
        on_done: Callable[[int], None],
    ) -> None:
        """Families of which each slot holds the first `base` tokens already."""
        for ahead in self._ahead(batches(families, self.num_slots), base):
            kept = self._read_beginnings(ahead, base, requests, tally)
            for batch in ahead:
                self._read_batch(batch, base, kept, requests, tally)
                on_done(sum(len(row.asked) for family in batch for row in family.rows))

    def _ahead(self, found: Iterable[list[Family]], base: int) -> Iterator[list[list[Family]]]:
        """Batches whose beginnings are short enough to be read at once, before any of their rows: a step that reads few
        tokens takes about as long as one that reads some more.
        """
        ahead: list[list[Family]] = []
        lengths: list[int] = []
        for batch in found:
            its = [family.shared - base for family in batch if family.is_read_apart(base)]
            lengths += its
            if ahead and (len(lengths) > self.num_slots or len(lengths) * max(lengths, default=0) > self.most_tokens):
                yield ahead
                ahead, lengths = [], its
            ahead.append(batch)
        if ahead:
            yield ahead

    def _read_beginnings(
        self, ahead: Sequence[list[Family]], base: int, requests: Sequence[Continuation], tally: Tally
    ) -> dict[Family, list[Tensor]]:
        """The keys and values of what the families of several batches begin with; none of a batch that is by itself,
        whose beginnings are best read where they are wanted.
        """
        if len(ahead) == 1:
            return {}
        families = [family for batch in ahead for family in batch if family.is_read_apart(base)]
        self._read((family.piece(i, base) for i, family in enumerate(families)), requests, tally)
        return {family: self.cache.kept(i, base, family.shared) for i, family in enumerate(families)}

    def _read_batch(
        self,
        batch: Sequence[Family],
        base: int,
        kept: Mapping[Family, list[Tensor]],
        requests: Sequence[Continuation],
        tally: Tally,
    ) -> None:
        """Families that have room in the slots together, or one whose rows take turns. Each slot holds the first
        `base` tokens already; `kept` are beginnings that were read before.
        """
        placed: list[tuple[Family, int, list[int]]] = []
        next_slot = 0
        for family in batch:
            slots = list(range(next_slot, min(self.num_slots, next_slot + len(family.rows))))
            next_slot += len(slots)
            placed.append((family, family.shared if family.is_read_apart(base) else base, slots))
        apart = [one for one in placed if one[1] > base]
        if not kept:
            self._read((family.piece(slots[0], base) for family, _, slots in apart), requests, tally)
        for family, start, slots in apart:
            if kept:
                self.cache.put(kept[family], slots, base)
            else:
                for slot in slots[1:]:
                    self.cache.copy(slots[0], slot, start, first=base)
        rounds = max(-(-len(family.rows) // len(slots)) for family, _, slots in placed)
        for turn in range(rounds):
            rows = [
                Piece(slot, start, row.tokens[start:], (row,))
                for family, start, slots in placed
                for slot, row in zip(slots, family.rows[turn * len(slots) :], strict=False)
                if len(row.tokens) > start
            ]
            self._read(rows, requests, tally)

    def _read(self, pieces: Iterable[Piece], requests: Sequence[Continuation], tally: Tally) -> None:
        """Read all pieces, those of about the same length together, long ones bit by bit."""
        for group in self._groups(sorted(pieces, key=lambda piece: -len(piece.tokens))):
            x_BTD = self._read_group(group)
            tally.tokens += sum(len(piece.tokens) for piece in group)
            self._tally(group, x_BTD, requests, tally)

    def _groups(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces, the longest first, that are read at once."""
        group: list[Piece] = []
        for piece in pieces:
            if len(piece.tokens) > self.most_tokens:
                for at in range(0, len(piece.tokens), self.most_tokens):
                    part = piece.tokens[at : at + self.most_tokens]
                    yield [Piece(piece.slot, piece.start + at, part, piece.rows)]
                continue
            if group:
                length = len(group[0].tokens)
                reach = max(piece.start, *(other.start for other in group)) + length
                # What padding writes must have a place too.
                if (len(group) + 1) * length > self.most_tokens or reach > self.cache.max_seq_len:
                    yield group
                    group = []
            group.append(piece)
        if group:
            yield group

    def _read_group(self, group: Sequence[Piece]) -> Tensor:
        length = len(group[0].tokens)
        padded = [piece.tokens + (0,) * (length - len(piece.tokens)) for piece in group]
        starts = [piece.start for piece in group]
        return self.read(
            self.model,
            self.cache,
            torch.tensor(padded, device=self.device),
            torch.tensor(starts, device=self.device),
            torch.tensor([piece.slot for piece in group], device=self.device),
            max(starts) + length,
        )

    def _tally(self, group: Sequence[Piece], x_BTD: Tensor, requests: Sequence[Continuation], tally: Tally) -> None:
        """Add what the places of a group predict: each place's logits are made once, whoever asks for them."""
        places: dict[tuple[int, int], int] = {}
        wanted: list[tuple[int, int, int]] = []  # the place, the token, and who asks
        for b, piece in enumerate(group):
            for row in piece.rows:
                for t in range(max(0, row.first - piece.start), len(piece.tokens)):
                    place, ahead = places.setdefault((b, t), len(places)), piece.start + t - row.first
                    wanted += [(place, requests[asked].continuation[ahead], asked) for asked in row.asked]
        if not places:
            return
        rows_N, times_N = torch.tensor(list(places), device=self.device).unbind(1)
        x_ND = x_BTD[rows_N, times_N]
        step = max(2, LOGIT_NUMBERS // self.vocab_size)
        at = 0
        for start in range(0, len(places), step):
            stop = min(len(places), start + step)
            here = at
            while here < len(wanted) and wanted[here][0] < stop:
                here += 1
            part, at = wanted[at:here], here
            places_M, tokens_M, _ = torch.tensor(part, device=self.device).unbind(1)
            logprobs, likeliest = _found(self.model.logits(x_ND[start:stop]), places_M - start, tokens_M)
            for (_, _, asked), logprob, is_likeliest in zip(part, logprobs, likeliest, strict=True):
                tally.logprobs[asked] += logprob
                tally.greedy[asked] &= is_likeliest


def _found(logits_NV: Tensor, places_M: Tensor, tokens_M: Tensor) -> tuple[list[float], list[bool]]:
    """The log-probability of each token at its place, and whether it is the likeliest there."""
    logprobs_M = logits_NV[places_M, tokens_M] - logits_NV.logsumexp(-1)[places_M]
    likeliest_M = logits_NV.argmax(-1)[places_M] == tokens_M
    return logprobs_M.tolist(), likeliest_M.tolist()


def families_of(requests: Sequence[Continuation], max_seq_len: int) -> list[Family]:
    """Requests as rows, those with the same context together unless it is short, in the order in which they come.

    What is too long for `max_seq_len` positions loses its beginning, as in lm-eval's `HFLM`: so many tokens are read,
    and the last one, which is only predicted, is one more. Raises UserError for a continuation that is longer.
    """
    rows: dict[tuple[tuple[int, ...], int], Row] = {}
    families: dict[tuple[tuple[int, ...], int], Family] = {}
    for i, request in enumerate(requests):
        assert request.context
        assert request.continuation
        predicted = len(request.continuation)
        if predicted > max_seq_len:
            raise UserError(
                f"a continuation that is to be scored has {predicted} tokens, and the context holds {max_seq_len}: "
                "raise --max-seq-len, if the model allows more"
            )
        tokens = (request.context + request.continuation)[-(max_seq_len + 1) : -1]
        first = len(tokens) - predicted
        row = rows.get((tokens, first))
        if row is None:
            row = rows[tokens, first] = Row(tokens, first)
            key = (tokens[: first + 1], -1) if first >= LEAST_SHARED else (tokens, first)
            families.setdefault(key, Family(first + 1, [])).rows.append(row)
        row.asked.append(i)
    for family in families.values():
        family.rows.sort(key=lambda row: -len(row.tokens))
    return list(families.values())


def clusters(families: Sequence[Family]) -> Iterator[tuple[int, list[Family]]]:
    """Families that follow one another and begin alike, and with how many tokens; in the end all others, with 0."""
    alone: list[Family] = []
    cluster: list[Family] = []
    common: Sequence[int] = ()
    for family in (*families, None):
        shared = 0 if family is None else common_prefix(common, family.before)
        if family is not None and cluster and shared >= max(LEAST_COMMON, len(common) // 4):
            cluster.append(family)
            common = common[:shared]
            continue
        if len(cluster) > 1:
            yield len(common), cluster
        else:
            alone += cluster
        if family is not None:
            cluster, common = [family], family.before
    if alone:
        yield 0, alone


def batches(families: Sequence[Family], num_slots: int) -> Iterator[list[Family]]:
    """Families that have room in the slots together, the longest first; one with more rows than slots by itself."""
    batch: list[Family] = []
    taken = 0
    for family in sorted(families, key=lambda family: -family.longest):
        if batch and taken + len(family.rows) > num_slots:
            yield batch
            batch, taken = [], 0
        batch.append(family)
        taken += len(family.rows)
    if batch:
        yield batch
