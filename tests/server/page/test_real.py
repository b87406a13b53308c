"""The page with the real server and the built-in model, as `torchchat browser` starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from config.settings import MAX_STOP_LENGTH
from server.tables import CHAT
from tests.server.page.driver import PATIENCE, Page
from tests.server.page.stand_in import CUSTOMIZATION

ROOT = Path(__file__).parents[3]
START = 300.0

# Slow: one process that imports torch and loads the built-in model, for all of these.
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def browser_command(directory: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`torchchat browser` with a browser that writes down what it is to open: that address, and the process."""
    asked = directory / "asked"
    program = directory / "a-browser"
    program.write_text(f'#!/bin/sh\necho "$1" > "{asked}.new" && mv "{asked}.new" "{asked}"\n')
    program.chmod(0o755)
    environ = os.environ | {
        "BROWSER": str(program),
        "TORCHCHAT_CACHE_DIR": str(directory / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, str(ROOT / "torchchat.py"), "browser", "--device", "cpu", *flags]
    with subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + START
            while not asked.exists():
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.05)
            yield asked.read_text().strip(), process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(START)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with browser_command(tmp_path_factory.mktemp("browser"), "--max-seq-len", "256") as (address, _):
        yield address.rstrip("/")


@pytest.fixture
def real(browser, address: str) -> Iterator[Page]:
    page = Page(browser, address)
    yield page
    page.assert_nothing_bad()


def set_to(page: Page, **settings: str) -> None:
    page.click("#settings")
    for name, value in settings.items():
        page.fill(f"#set-{name}", value)
    page.leave()


def fetched(address: str, path: str) -> str:
    with urllib.request.urlopen(address + path, timeout=PATIENCE) as response:
        return response.read().decode()


def test_a_chat_from_the_first_key_to_the_last_token(real: Page, address: str):
    set_to(real, temperature="0")
    answer = real.ask("Tell me a story about a dog.")
    assert len(answer.split()) > 10
    figures = real.text(".figures")
    assert " tokens at " in figures
    assert "first token after" in figures
    assert " of 256" in figures
    facts = json.loads(fetched(address, "/v1/customization"))
    assert real.text("#model-line strong") == facts["model"] == "default"
    assert facts["dtype"] in real.text("#model-line").replace("\n", "")
    rate = float(figures.split(" at ")[1].split(" tok/s")[0].replace(",", ""))
    share = float(real.script("return document.querySelector('#model-panel meter').value"))
    assert abs(share - min(1, rate * facts["bytes_per_token"] / facts["bandwidth"])) < 0.01
    real.ask("And then?")
    assert "reused" in real.all(".figures")[-1].text  # the first turn was not read again


def test_the_same_seed_gives_the_same_answer(real: Page):
    real.click("#new")
    set_to(real, seed="7", max_tokens="24")
    first = real.ask("Tell me about the sun.")
    real.click(".regenerate")
    real.until(lambda: real.text(".assistant .branches") == "2/2")
    real.until_idle()
    assert real.answers() == [first]
    assert ("Cut at the longest length" in real.text(".notes")) == real.text(".figures").startswith("24 tokens")


def test_stopping_ends_the_work(real: Page, address: str):
    """A fast machine may be done before it is stopped: then once more."""
    real.click("#new")
    for _ in range(10):
        before = len(real.answers())
        real.say("Tell me a very long story about a bear and a bird and a boat.")
        real.until(lambda before=before: len(real.answers()) > before and real.answers()[-1])
        real.type(Keys.ESCAPE)
        real.until_idle()
        if "Stopped." in real.text(".notes"):
            break
    assert "Stopped." in real.text(".notes")
    real.until(lambda: "torchchat_running 0.0" in fetched(address, "/metrics"))


def test_a_message_that_is_too_long_is_refused_in_plain_words(real: Page):
    real.click("#new")
    real.script("document.getElementById('composer-text').value = 'word '.repeat(600)")
    real.say(" end")
    real.until_idle()
    assert "longer than the model's context" in real.text(".problem")
    assert "256" in real.text(".problem")


def test_a_conversation_may_outgrow_the_context(real: Page):
    real.click("#new")
    set_to(real, max_tokens="30", temperature="0")
    for number in range(8):
        real.ask(f"What does the bear with the red hat and the very big blue boat do on day {number}, and why?")
        assert real.all(".problem") == []
    assert "The context is full" in real.text(".notes")


def test_settings_begin_with_the_servers_own(real: Page, address: str):
    defaults = json.loads(fetched(address, "/v1/customization"))["sampling"]
    real.click("#settings")
    for name, value in defaults.items():
        shown = real.find(f"#set-{name}").get_attribute("value")
        assert shown == ("" if value is None else f"{value:g}"), name
    real.leave()


def test_the_page_offers_what_the_server_takes(real: Page):
    """Every setting, at both its ends, is one that the server takes; what it would refuse cannot be typed."""
    fields = real.module("return (await import('/static/sampling.js')).FIELDS.map((field) => ({ ...field }))")
    assert {field["name"] for field in fields} <= set(CHAT)
    for field in fields:
        read = CHAT[field["name"]].kind.read
        if field.get("lines"):
            read(["x" * MAX_STOP_LENGTH] * 4, "stop")
            continue
        low = field["min"] + (field["step"] if field.get("above") else 0)
        for value in (low, field["max"]):
            read(value, field["name"])


def test_the_stand_in_tells_what_the_real_one_tells(address: str):
    facts = json.loads(fetched(address, "/v1/customization"))
    assert set(facts) == set(CUSTOMIZATION)
    assert set(facts["sampling"]) == set(CUSTOMIZATION["sampling"])


def test_it_takes_the_next_port_and_ends_when_told(address: str, tmp_path: Path):
    """The one that all these tests use has its port already."""
    with browser_command(tmp_path, "--max-seq-len", "64", "--api-key", "sesame") as (other, process):
        assert other.rstrip("/") != address
        assert "torchchat" in fetched(other, "")
        process.send_signal(signal.SIGTERM)
        assert process.wait(START) == 0
        told = process.stderr.read()
    assert f"listening on {other.rstrip('/')}" in told
    assert "Traceback" not in told
