"""The page for everybody: axe finds nothing serious, all is done by keyboard, screen readers are told what matters, and
a phone shows all of it."""

import threading

import pytest
from axe_core_python.selenium import Axe
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.server.page.driver import Page
from tests.server.page.stand_in import Answer, Refusal, StandIn

ANSWER = """<think>
What might have a title?
</think>

# A title

Text with `code`, a [link](https://example.com) and:

- [x] one
- two

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):  # a remark
    return "text" + str(3.5)
```

> quoted
"""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def serious(page: Page) -> list[str]:
    """What axe finds that keeps somebody from using the page."""
    options = {"runOnly": {"type": "tag", "values": RULES}}
    found = Axe().run(page.driver, options=options)["violations"]
    return [
        f"{one['id']}: {node['html'][:200]} {node['any'][:1]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize(("scheme", "width"), [("light", None), ("dark", None), ("light", 390), ("dark", 320)])
def test_axe_finds_nothing_serious(page: Page, server: StandIn, scheme, width):
    page.emulate(scheme, width)
    page.reload()
    assert serious(page) == []
    server.answers = [Answer([ANSWER]), Answer(["x"]), Refusal(500, "it broke")]
    page.ask("Go")
    page.click(".regenerate")
    page.until(lambda: page.text(".assistant .branches") == "2/2")
    page.until_idle()
    page.click(".previous")
    page.ask("More")
    page.click("#model")
    if width is not None:
        page.click("#open-sidebar")
    page.fill("#search", "g")
    assert serious(page) == []
    if width is not None:
        page.click("#close-sidebar")
    page.click(".user .edit")
    page.click("#settings")
    page.fill("#set-temperature", "99")
    assert serious(page) == []


def test_axe_finds_nothing_serious_in_the_dialogs(page: Page):
    page.ask("Go")
    for button in ("#delete", "#rename", "#show-keys"):
        page.click(button)
        assert serious(page) == []
        page.leave()
    page.click(".edit")
    assert serious(page) == []


def test_axe_sees_what_it_should(page: Page):
    page.script("document.querySelector('#messages').append(document.createElement('li'), document.createElement('p'))")
    page.script("const send = document.getElementById('send'); send.removeAttribute('aria-label'); send.title = ''")
    assert len(serious(page)) >= 2


def test_the_system_s_colours_until_a_person_chooses(page: Page):
    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.script(paper)
    page.emulate("dark")
    dark = page.script(paper)
    assert light != dark
    page.click("#theme")
    assert page.script(paper) == light
    page.reload()
    assert page.script(paper) == light
    page.click("#theme")
    page.emulate("light")
    assert page.script(paper) == dark
    page.click("#theme")
    assert page.script(paper) == light


def test_a_whole_chat_by_keyboard(page: Page, server: StandIn):
    """No pointer: write, stop, another answer, branches, edit, settings, search, delete."""
    go_on = threading.Event()
    server.answers = [Answer(["Half", go_on.wait]), Answer(["Second"]), Answer(["Edited"]), Answer(["Warm"])]
    page.type("Question", Keys.ENTER)
    page.until(lambda: page.answers() == ["Half"])
    page.type(Keys.ESCAPE)
    page.until_idle()
    go_on.set()
    page.type(Keys.ESCAPE, "r")  # out of the message box: now single keys work
    page.until(lambda: page.answers() == ["Second"])
    page.until_idle()
    page.type("[")
    assert page.answers() == ["Half"]
    page.type("]")
    assert page.answers() == ["Second"]
    page.type("/")
    assert page.focused() == "composer-text"
    page.type(Keys.UP)
    assert page.focused() == "Edit your message"
    page.type(Keys.END, " two", Keys.ENTER)
    page.until(lambda: page.answers() == ["Edited"])
    page.until_idle()
    assert page.questions() == ["Question two"]
    assert page.focused() == "composer-text"  # what had the focus is gone
    page.type(Keys.ESCAPE, ",")
    assert page.focused() == "system"
    page.type("Be kind.")
    page.leave()
    page.type("n")
    assert page.text("#title") == "New conversation"
    page.type("Warm?", Keys.ENTER)
    page.until(lambda: page.answers() == ["Warm"])
    page.until_idle()
    page.type(Keys.ESCAPE, "f")
    assert page.focused() == "search"
    page.type("question", Keys.ARROW_DOWN, Keys.ENTER)
    page.until(lambda: page.questions() == ["Question two"])
    page.type(Keys.ESCAPE, "?")
    page.until(lambda: page.find("#keys-dialog").is_displayed())
    assert "makes another answer" in page.text("#keys-list")
    page.leave()
    shown = page.script("return document.querySelectorAll('button, a[href], input, textarea, [tabindex]').length")
    page.script("document.activeElement.blur()")
    reached = set()
    for _ in range(shown):
        page.type(Keys.TAB)
        reached.add(page.focused())
    wanted = {
        "new",
        "search",
        "rename",
        "delete",
        "settings",
        "model",
        "composer-text",
        "Copy this text",
        "Edit this message",
    }
    assert wanted <= reached


def test_the_focus_is_always_seen(page: Page):
    page.ask("Go")
    page.type(Keys.ESCAPE)
    for _ in range(12):
        page.type(Keys.TAB)
        outline = page.script(
            "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
        )
        if page.script("return !document.activeElement.matches('body, #composer-text')"):  # whose frame is what changes
            assert outline == ["solid", "2px"], page.focused()


def test_a_key_counts_at_once_when_a_dialog_closes(page: Page):
    """The browser takes the focus from a field that is gone with the next frame; a key may come before."""
    page.ask("Go")
    page.type(Keys.ESCAPE, ",")
    assert page.focused() == "system"
    page.script(
        """
        document.getElementById("settings-dialog").close();
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true }));
        """
    )
    assert page.text("#title") == "New conversation"


def test_single_keys_can_be_switched_off(page: Page):
    page.ask("Go")
    page.type(Keys.ESCAPE, "?")
    page.click("#single-keys")
    page.leave()
    page.reload()
    page.type(Keys.ESCAPE, "n")
    assert page.questions() == ["Go"]


def test_screen_readers_hear_of_each_answer_once(page: Page, server: StandIn):
    page.script(
        """
        window.heard = [];
        for (const id of ["live-polite", "live-urgent"]) {
          const region = document.getElementById(id);
          const hear = () => region.textContent && heard.push(region.textContent);
          new MutationObserver(hear).observe(region, { childList: true });
        }
        """
    )
    server.answers = [Answer(["word "] * 60, pause=0.004), Refusal(500, "it broke")]
    page.ask("Go")
    page.until(lambda: len(page.script("return heard")) == 2)
    assert page.script("return heard") == ["Answering", "The answer is complete, 60 words"]
    page.ask("Go")
    page.until(lambda: page.script("return heard.at(-1)") == "The server failed: it broke")
    live = "#messages [aria-live], #messages [role=log], #messages [role=status]"
    assert page.all(live) == []  # growing text is not read aloud piece by piece
    assert page.text("article h2").splitlines()[:2] == ["You", "Answer"]


def test_dialogs_give_the_focus_back(page: Page):
    page.ask("Go")
    for button in ("#settings", "#rename", "#show-keys"):
        page.find(button).click()
        page.leave()
        assert "#" + page.focused() == button


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_without_scrolling_sideways(page: Page, server: StandIn, width):
    page.emulate(width=width)
    page.reload()
    long = "x" * 300
    server.answers = [
        Answer(
            [
                ANSWER,
                f"\n\n{long} `{long}` https://example.com/{long}\n\n```\n{long}\n```\n\n|{long}|b|\n|--|--|\n|1|2|\n",
            ]
        )
    ]
    page.ask(f"Go {long}")
    page.click("#model")
    overflow = "const e = document.getElementById(arguments[0]); return e.scrollWidth - e.clientWidth"
    assert page.script(overflow, "scroller") == 0
    assert page.script(overflow, "main") == 0
    assert page.script("return document.documentElement.scrollWidth") == width
    page.click("#model")
    page.click("#open-sidebar")
    assert page.focused() == "close-sidebar"
    assert page.script("return document.getElementById('main').inert")
    page.until(lambda: page.find("#new").is_displayed())
    page.type(Keys.ESCAPE)
    assert page.focused() == "open-sidebar"
    page.click("#open-sidebar")
    page.click("#conversations a")
    page.until(lambda: not page.script("return document.getElementById('main').inert"))
    small = page.script(
        """
        const small = ({ width, height }) => width < 24 || height < 24;
        return [...document.querySelectorAll("button")]
          .filter((e) => e.checkVisibility({ visibilityProperty: true }) && small(e.getBoundingClientRect()))
          .map((e) => e.id || e.title);
        """
    )
    assert small == []  # what a finger can meet


def test_shift_enter_is_a_new_line(page: Page, server: StandIn):
    page.type("one")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.type("two", Keys.ENTER)
    page.until(lambda: page.questions() == ["one\ntwo"])
