"""The ledger: phases apart, rates of what was counted, bytes that a step reads."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from generate import stats
from generate.stats import Ledger, weight_bytes_per_token
from model.layers import Embedding


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [100.0]
    monkeypatch.setattr(stats.time, "perf_counter", lambda: now[0])
    return now


def test_phases_exclude_what_runs_inside_them(clock: list[float]) -> None:
    ledger = Ledger()
    with ledger.phase("load"):
        clock[0] += 2
        with ledger.phase("quantize"):
            clock[0] += 5
        clock[0] += 1
    assert ledger.phase_s["load"] == 3
    assert ledger.phase_s["quantize"] == 5
    assert ledger.phase_s["compile"] == 0


def test_a_phase_that_fails_is_counted(clock: list[float]) -> None:
    ledger = Ledger()
    with suppress(ZeroDivisionError), ledger.phase("load"):
        clock[0] += 1
        raise ZeroDivisionError
    assert ledger.phase_s["load"] == 1


def test_rates_are_of_what_was_told() -> None:
    ledger = Ledger(weight_bytes_per_token=1000)
    assert (ledger.prefill_tok_s, ledger.decode_tok_s, ledger.bandwidth_share(1e6)) == (None, None, None)
    ledger.first_token(0.5)
    ledger.first_token(0.1)
    ledger.prefill(100, 0.5)
    ledger.decode(3, 0.01)  # three sequences, one reading of the weights
    ledger.decode(1, 0.01)
    assert ledger.ttft_s == 0.5
    assert ledger.prefill_tok_s == 200
    assert ledger.decode_tok_s == pytest.approx(200)
    assert ledger.bandwidth_share(1e6) == pytest.approx(0.1)
    assert ledger.bandwidth_share(None) is None


class Tiny(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = Embedding(10, 4)
        self.inner = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_step_reads_every_weight_once_and_one_row_of_the_table() -> None:
    inner = (4 * 4 + 4) * 2
    assert weight_bytes_per_token(Tiny(tied=True)) == inner + 10 * 4 * 4
    assert weight_bytes_per_token(Tiny(tied=False)) == inner + 10 * 4 * 4 + 4 * 4
