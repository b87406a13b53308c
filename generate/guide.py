"""Guides say which tokens may come next, so that an answer keeps to a grammar. Knows masks of tokens, no grammars."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

WORD_BITS = 32


class Guide(Protocol):
    """Follows one sequence."""

    def allowed(self) -> Tensor:
        """The tokens that may come next: int32 [ceil(V / 32)] on the CPU, bit v % 32 of word v // 32 for token v. The
        end of the text is one of them where it may come.
        """
        ...

    def advance(self, token_id: int) -> None:
        """This token came."""
        ...


def masked(logits_BV: Tensor, rows_R: Sequence[int], allowed: Sequence[Tensor]) -> Tensor:
    """The logits with those of tokens that a guide forbids at -inf. rows_R: the rows that have one."""
    words_RW = torch.stack(tuple(allowed))
    if logits_BV.is_cuda:
        words_RW = words_RW.pin_memory().to(logits_BV.device, non_blocking=True)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words_RW.device)
    bits_RV = ((words_RW[:, :, None] >> shifts) & 1).flatten(1)[:, : logits_BV.shape[1]]
    rows = torch.tensor(rows_R, device=logits_BV.device)
    result_BV = logits_BV.clone()
    result_BV[rows] = torch.where(bits_RV.bool(), logits_BV[rows], -torch.inf)
    return result_BV
