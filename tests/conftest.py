"""What every test shares: tests marked `gpu` are skipped where there is none; one place for compilers' own files."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def compilers_keep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Their checks of this machine take seconds, and are so made once; nothing is left in anybody's home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / name.lower()))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
