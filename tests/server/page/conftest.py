"""One Chromium for all tests of the page, and for each a server of its own: another port is another origin, so that
nothing that one test left in the browser is seen by another."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from tests.server.page.driver import CHROMEDRIVER, CHROMIUM, Page, chromium
from tests.server.page.stand_in import StandIn


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def browser(downloads: Path) -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("the page is tested in Chromium, which is not installed (Debian: chromium and chromium-driver)")
    with chromium(str(downloads)) as driver:
        yield driver


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as stand_in:
        yield stand_in


@pytest.fixture
def page(browser: webdriver.Chrome, server: StandIn) -> Iterator[Page]:
    page = Page(browser, server.address)
    yield page
    page.assert_nothing_bad()
