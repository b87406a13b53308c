"""The built-in model, read once, and one server of it for all tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from cli.builder import Built, build, prepare
from config.settings import BuildSettings, Setting
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def built() -> Built:
    settings = BuildSettings(
        model="default", device=Setting("cpu"), dtype=Setting("fp32"), max_num_seqs=4, max_seq_len=1024
    )
    return build(prepare(settings), serves=True)


@pytest.fixture(scope="session")
def server(built: Built) -> Iterator[Running]:
    with running(built) as started:
        yield started
