"""A Chromium, and the page in it as a person uses it: keys, clicks, what can be read. Knows no server."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
PATIENCE = 60.0
"""Seconds to wait for something that is to come; a busy machine needs some."""

WATCH = """
window.seen = { errors: [], violations: [], hits: [] };
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason?.stack ?? event.reason)));
addEventListener("securitypolicyviolation", (event) => {
  seen.violations.push(event.violatedDirective + " " + event.blockedURI);
});
window.hit = (...what) => { seen.hits.push(what.join()); };
window.alert = window.prompt = window.confirm = window.print = window.hit;
"""
"""Runs before any script of the page: what must never happen is written down. `hit()` is what hostile answers call."""

NOT_YET = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
T = TypeVar("T")


@contextlib.contextmanager
def chromium(downloads: str) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    # A page that is not looked at draws nothing; headless ones are not.
    options.add_argument("--disable-backgrounding-occluded-windows")
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(CHROMEDRIVER)))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at an address, seen and used as a person does."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address
        self.emulate()
        driver.get_log("performance")  # those of the test before
        driver.get(address)
        self.until(lambda: self.script("return document.querySelector('#model-line strong, dialog[open]') !== null"))

    # What it is shown on

    def emulate(self, scheme: str = "light", width: int | None = None, height: int = 844) -> None:
        """Which colours the system has; `width` in CSS pixels: a phone."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        if width is None:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        else:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    # What is done

    def type(self, *keys: str) -> None:
        """Keys, wherever the focus is."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def say(self, text: str) -> None:
        """Writes a message and sends it."""
        self.find("#composer-text").click()
        self.type(text, Keys.ENTER)

    def ask(self, text: str) -> str:
        """Sends a message, waits for the whole answer and returns it."""
        before = len(self.all(".message"))
        self.say(text)
        self.until(lambda: len(self.all(".message")) == before + 2)
        self.until_idle()
        return self.answers()[-1]

    def click(self, selector: str) -> None:
        """Once it is there, and nothing lies over it."""

        def clicked() -> bool:
            try:
                self.find(selector).click()
            except NOT_YET:
                return False
            return True

        self.until(clicked)

    def fill(self, selector: str, text: str) -> None:
        """Types over what is in a field."""
        self.click(selector)
        self.script("document.querySelector(arguments[0]).select()", selector)
        self.type(text)

    def leave(self) -> None:
        """Escape, out of a dialog."""
        self.type(Keys.ESCAPE)
        self.until(lambda: not self.all("dialog[open]"))

    def reload(self) -> None:
        self.driver.refresh()
        self.until(lambda: self.script("return document.querySelector('#model-line strong, dialog[open]') !== null"))

    def script(self, source: str, *arguments: object) -> Any:
        return self.driver.execute_script(source, *arguments)

    def module(self, source: str, *arguments: object) -> Any:
        """Runs the body of an async function in the page, in which `await import("/static/…")` works."""
        body = f"""
            const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);
            const run = async (...given) => {{ {source} }};
            run(...given).then((value) => done([value]), (error) => done(String(error.stack)));
        """
        result = self.driver.execute_async_script(body, *arguments)
        assert isinstance(result, list), result
        return result[0]

    # What is seen

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Of all that match, as it is drawn, a line each."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
        return "\n".join(self.script(script, selector))

    def answers(self) -> list[str]:
        return self.script("return [...document.querySelectorAll('.assistant .body')].map((e) => e.innerText.trim())")

    def questions(self) -> list[str]:
        return self.script("return [...document.querySelectorAll('.user .body')].map((e) => e.innerText.trim())")

    def titles(self) -> list[str]:
        """Of the conversations in the list."""
        return self.script("return [...document.querySelectorAll('#conversations .name')].map((e) => e.innerText)")

    def kept(self) -> list[dict[str, Any]]:
        """The conversations in the browser's database."""
        return self.module(
            """
            const settled = (request) => new Promise((good, bad) => Object.assign(request, {
              onsuccess: () => good(request.result), onerror: () => bad(request.error),
            }));
            const database = await settled(indexedDB.open("torchchat", 1));
            const all = await settled(database.transaction("conversations").objectStore("conversations").getAll());
            database.close();
            return all;
            """
        )

    def focused(self) -> str:
        """What has the focus, by its id or its label."""
        return self.script(
            "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.innerText"
        )

    def until(self, true: Callable[[], T]) -> T:
        """Waits until `true()` is, and returns what it is."""
        end = time.monotonic() + PATIENCE
        while True:
            value = true()
            if value:
                return value
            assert time.monotonic() < end, f"waited {PATIENCE:.0f} s in vain; the page says: {self.text('body')[:2000]}"
            time.sleep(0.02)

    def until_idle(self) -> None:
        """Waits until no answer is being made here, and what there is is kept."""
        self.until(lambda: self.script("return document.querySelector('.message[data-running]') === null"))
        self.until(lambda: not self.find("#stop").is_displayed())

    # What must never happen

    def assert_nothing_bad(self) -> None:
        """No error in a script, nothing for the policy to stop, no foreign code run, no request to anybody else."""
        assert self.script("return window.seen") == {"errors": [], "violations": [], "hits": []}
        assert self.foreign_requests() == []

    def foreign_requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        own = (self.address, "data:", f"blob:{self.address}")
        return [
            one["request"]["url"]
            for one in sent
            if one["documentURL"].startswith("http") and not one["request"]["url"].startswith(own)
        ]
