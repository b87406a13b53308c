"""Token lists to packed batches: documents laid end to end in a flat batch of fixed size, drawn from groups by share.

Knows ids, groups and shares; knows nothing of text or of models.
"""

import random
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORED = -100  # a target that is not predicted


@dataclass(frozen=True)
class Batch:
    """N tokens of whole documents; document i is starts[i]:starts[i + 1], positions restart at 0 in each."""

    tokens: Tensor  # int64 [N]
    targets: Tensor  # int64 [N], IGNORED at the end of a document and in padding
    positions: Tensor  # int64 [N]
    starts: Tensor  # int32 [most documents + 1], the last value repeated
    soft_ids: Tensor | None = None  # int16 [N, top], the teachers' likeliest next tokens
    soft_probs: Tensor | None = None  # float16 [N, top]

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})


@dataclass(frozen=True)
class Document:
    """Ids of one text, at most context + 1 of them; predicted: whether its next tokens are targets."""

    ids: Tensor  # int64
    predicted: bool = True


def split(ids: list[int], context: int, predicted: bool = True) -> list[Document]:
    """A text as documents of at most context predictions; each begins with the last token of the one before it."""
    whole = torch.tensor(ids)
    return [Document(whole[at : at + context + 1], predicted) for at in range(0, len(ids) - 1, context)]


class Packer:
    """Fills batches of batch_tokens one document at a time."""

    def __init__(self, batch_tokens: int, context: int) -> None:
        self.batch_tokens, self.context = batch_tokens, context
        self.most = max(64, batch_tokens // 48)  # documents in a batch; fixed, so that shapes are
        self._documents: list[Document] = []
        self._room = batch_tokens

    def add(self, document: Document, cut: bool) -> Batch | None:
        """Put a document in; the finished batch if it did not fit. cut: fill the batch with what fits of it."""
        need = len(document.ids) - 1
        # Padding takes documents of its own, at most context long each.
        padding = self._room // self.context + 1
        if need <= self._room and len(self._documents) < self.most - padding:
            self._documents.append(document)
            self._room -= need
            return None
        if cut and self._room > 1 and len(self._documents) < self.most - padding:
            self._documents.append(Document(document.ids[: self._room + 1], document.predicted))
            self._room = 0
            return self.finish()
        batch = self.finish()
        assert self.add(document, cut) is None
        return batch

    def finish(self) -> Batch:
        """The batch so far, padded to its size; the packer is empty after it."""
        documents, room = self._documents, self._room
        while room > 0:
            length = min(room, self.context)
            documents.append(Document(torch.zeros(length + 1, dtype=torch.int64), predicted=False))
            room -= length
        lengths = [len(d.ids) - 1 for d in documents]
        arange = torch.arange(self.context)
        ends = torch.tensor(lengths).cumsum(0)
        starts = torch.full((self.most + 1,), self.batch_tokens, dtype=torch.int32)
        starts[0] = 0
        starts[1 : len(ends) + 1] = ends
        targets = [d.ids[1:] if d.predicted else torch.full((len(d.ids) - 1,), IGNORED) for d in documents]
        self._documents, self._room = [], self.batch_tokens
        return Batch(
            tokens=torch.cat([d.ids[:-1] for d in documents]),
            targets=torch.cat(targets),
            positions=torch.cat([arange[:n] for n in lengths]),
            starts=starts,
        )


def pack(documents: list[Document], batch_tokens: int, context: int) -> list[Batch]:
    """All documents, in order, none cut."""
    packer = Packer(batch_tokens, context)
    batches = [batch for document in documents if (batch := packer.add(document, cut=False))]
    return [*batches, packer.finish()]


class Mixture:
    """An endless stream of batches in which each group has its share of the tokens; a group is shuffled each epoch."""

    def __init__(self, groups: dict[str, list[Document]], batch_tokens: int, context: int, seed: int) -> None:
        self.groups = {name: documents for name, documents in groups.items() if documents}
        self.packer = Packer(batch_tokens, context)
        self.rng = random.Random(seed)
        self.queues: dict[str, list[Document]] = {name: [] for name in self.groups}
        self.owed = dict.fromkeys(self.groups, 0.0)  # tokens by which a group is behind its share

    def next_batch(self, shares: dict[str, float]) -> Batch:
        present = {name: share for name, share in shares.items() if name in self.groups}
        total = sum(present.values())
        while True:
            name = max(present, key=lambda n: self.owed[n] / (present[n] + 1e-9) if present[n] else -1e30)
            document = self._draw(name)
            for other, share in present.items():
                self.owed[other] += share / total * len(document.ids)
            self.owed[name] -= len(document.ids)
            batch = self.packer.add(document, cut=True)
            if batch:
                return batch

    def _draw(self, name: str) -> Document:
        if not self.queues[name]:
            self.queues[name] = self.rng.sample(self.groups[name], len(self.groups[name]))
        return self.queues[name].pop()
