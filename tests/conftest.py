"""What every test shares: tests marked `gpu` are skipped where there is none; one place for what is compiled."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def everybody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of this run share."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.fixture(scope="session", autouse=True)
def compilers_keep(everybody: Path) -> Iterator[None]:
    """Their checks of this machine take seconds, and are so made once; nothing is left in anybody's home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(everybody / name.lower()))
        yield


@pytest.fixture(scope="session")
def warm(everybody: Path) -> Path:
    """A TORCHCHAT_CACHE_DIR for commands whose test is not about the first run: what one compiled, others find."""
    return everybody / "warm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
