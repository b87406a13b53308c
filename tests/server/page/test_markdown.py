"""Answers while they grow: what is shown is what the whole text gives, cheaply, and without a flicker."""

import threading

import pytest
from selenium.webdriver.common.by import By

from tests.server.page.driver import Page
from tests.server.page.stand_in import Answer, StandIn

TEXTS = [
    "# Title\n\nSome *text* with `code`, **bold**, ~~gone~~ and a [link](https://example.com/a?b=c&d).\n\nAnother\nline.\n",
    "Heading\n===\n\nOther\n---\n\n---\n\n***\n",
    "1. one\n2. two\n\n   more of two\n3. three\n   - a\n   - b\n\n     deep\n\nAfter\n\n- x\n\n- y\n",
    "- [ ] open\n- [x] done\n\n10. ten\n11. eleven\n",
    "Before\n```python\ndef f():\n    return '```'\n```\nAfter the code\n\n````md\n```\ninner\n```\n````\n",
    "```js\nconst a = 1;\n\n\nconst b = `x`;\n",
    "~~~\ntilde ``` inside\n~~~\n\n```\nno language\n```\n\n```nolanguage\nx\n```",
    "- item\n  ```sh\n  ls -l\n  ```\n- next\n\n      indented code\n\nEnd",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | `x|y` |\n\nText | with bars\n",
    "> quoted\ncontinued\n> > deeper\n\n> again\n",
    'See [the page][p] and [p].\n\nMore.\n\n[p]: https://example.com/p "Title"\n',
    "<div>\n\nhtml *stays* text\n\n</div>\n<!-- a\n\ncomment -->\n\n<pre>\n\nx\n</pre> y",
    "Emoji 👩‍👩‍👧 and é 漢字 * not a list\n*not\nemphasis\n\n    code\n\\* \\` &amp; &copy;",
    "1\n2\n\n1.\n\n- \n\n-\n\n# \n\n```\n```\n\n```x```\n\nend\n===",
    "a\r\nb\r\n\r\n```py\r\nx = 1\r\n```\r\nc",
]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_growing_ends_as_the_whole_text_does(page: Page, step):
    found = page.module(
        """
        const { LiveMarkdown } = await import("/static/live.js");
        const { blocks, render } = await import("/static/markdown.js");
        const [texts, step] = given, plain = (place) => {
          for (const code of place.querySelectorAll("code")) code.removeAttribute("class");
          return place.innerHTML.replace(/\\n(?=<\\/code>)/g, "").replace(/>\\n/g, ">");
        };
        return texts.map((text) => {
          const grown = document.createElement("div"), whole = document.createElement("div");
          const live = new LiveMarkdown(grown);
          for (let end = step; end < text.length; end += step) live.update(text.slice(0, end));
          live.update(text, true);
          whole.append(render(blocks(text)));
          return [plain(grown), plain(whole)];
        });
        """,
        TEXTS,
        step,
    )
    for text, (grown, whole) in zip(TEXTS, found, strict=True):
        assert grown == whole, text


def test_an_unfinished_fence_does_not_flicker(page: Page):
    """Every state on the way: no fence, language or rule is ever seen as text, and the block stays the same one."""
    states = page.module(
        """
        const { LiveMarkdown } = await import("/static/live.js");
        const place = document.createElement("div"), live = new LiveMarkdown(place), states = [], blocks = new Set();
        const text = given[0];
        for (let end = 1; end <= text.length; end += 1) {
          live.update(text.slice(0, end), end === text.length);
          const code = place.querySelector(".code");
          if (code) blocks.add(code);
          states.push([place.textContent, place.querySelectorAll("h3, h4, hr").length]);
        }
        return [states, blocks.size, place.querySelectorAll(".code .hljs-keyword").length];
        """,
        "Look:\n\n```python\ndef f():\n    return 1  # --\n```\nDone\n- a\n- b\n",
    )
    shown, blocks, keywords = states
    assert blocks == 1
    assert keywords == 2
    assert all("`" not in text and headings == 0 for text, headings in shown)
    assert [text for text, _ in shown if "pyth" in text and "python" not in text] == []
    lengths = [len(text) for text, _ in shown]
    assert lengths == sorted(lengths)  # nothing that was shown goes away again


@pytest.mark.parametrize("piece", ["A paragraph of some words.\n\n", "x = f(1)  # code\n"])
def test_the_cost_of_a_long_answer_grows_with_its_length(page: Page, piece):
    """Four times the text takes about four times as long; were all of it rendered each time, it would be sixteen times,
    as it is for a paragraph that never ends, which `Frames` draws ever more rarely. A busy machine has three tries.
    """
    costs = page.module(
        """
        const { LiveMarkdown } = await import("/static/live.js");
        const cost = (count) => {
          const place = document.createElement("div"), live = new LiveMarkdown(place);
          let text = given[0].startsWith("x =") ? "```python\\n" : "", best = 0;
          const began = performance.now();
          for (let i = 0; i < count; i += 1) {
            text += given[0];
            live.update(text);
          }
          live.update(text, true);
          return performance.now() - began;
        };
        cost(100);
        return [1, 2, 3].map(() => [cost(400), cost(1600)]);
        """,
        piece,
    )
    assert any(long < 10 * short + 20 for short, long in costs), costs


def test_frames_leave_the_page_time_for_a_person(page: Page):
    """However long a drawing takes, the page draws at most a fifth of the time."""
    drawings = page.module(
        """
        const { Frames } = await import("/static/live.js");
        const times = [], frames = new Frames(() => {
          const began = performance.now();
          while (performance.now() - began < 20);
          times.push(began);
        });
        const end = performance.now() + 600;
        while (performance.now() < end) { frames.request(); await new Promise((resolve) => setTimeout(resolve, 1)); }
        return times;
        """
    )
    assert 2 <= len(drawings) <= 7


def test_code_is_coloured_and_copied(page: Page, server: StandIn):
    server.answers = [Answer(["Here:\n\n```python\n", "def f():\n", "    return 1\n", "```\n"])]
    page.ask("Code")
    assert page.text(".code-head span") == "python"
    assert page.text(".code .hljs-keyword").splitlines() == ["def", "return"]
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.address},
    )
    page.click(".copy-code")
    page.until(lambda: page.module("return await navigator.clipboard.readText()") == "def f():\n    return 1\n")
    page.click(".assistant .copy")
    page.until(lambda: page.module("return await navigator.clipboard.readText()").startswith("Here:\n\n```python"))


def test_a_selection_stays_while_text_comes(page: Page):
    selected = page.module(
        """
        const { LiveMarkdown } = await import("/static/live.js");
        const place = document.createElement("div"), live = new LiveMarkdown(place);
        document.getElementById("messages").append(place);
        live.update("Some **bold** words");
        getSelection().selectAllChildren(place.querySelector("strong"));
        live.update("Some **bold** words that go on\\n\\nand on");
        return getSelection().toString();
        """
    )
    assert selected == "bold"


def test_the_end_is_followed_unless_a_person_reads_elsewhere(page: Page, server: StandIn):
    lines = [f"Line {number}\n\n" for number in range(60)]
    server.answers = [Answer(lines), Answer(lines, pause=0.01)]
    page.ask("Go")
    at_end = "const s = document.getElementById('scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight < 5"
    page.until(lambda: page.script(at_end))
    page.say("Again")
    page.until(lambda: len(page.answers()) == 2 and "Line 5" in page.answers()[1])
    page.script("document.getElementById('scroller').scrollTop = 0")
    page.until_idle()
    assert page.script("return document.getElementById('scroller').scrollTop") == 0
    page.driver.find_element(By.ID, "to-end").click()
    page.until(lambda: page.script(at_end))


def test_what_a_model_thinks_first_is_folded_away(page: Page, server: StandIn):
    begun, ended = threading.Event(), threading.Event()
    pieces = ["<th", "ink>\nLet me ", "see.", begun.wait, "\n</think>", "\n\nIt is **4**", ended.wait, "."]
    server.answers = [
        Answer(pieces),
        Answer(["No opening", ended.wait, "</think>Plain"]),
        Answer(["<b>not</b> thought"]),
    ]
    page.say("2 + 2?")
    page.until(lambda: page.text(".thought summary") == "Thinking…")
    assert "<" not in page.text(".assistant")
    begun.set()
    page.until(lambda: page.text(".assistant > article > .body") == "It is 4")
    assert page.text(".thought summary") == "Thought first"
    ended.set()
    page.until_idle()
    page.click(".thought summary")
    assert page.text(".thought .body") == "Let me see."
    page.ask("Again")
    assert page.text(".assistant > article > .body").splitlines() == ["It is 4.", "Plain"]
    page.ask("And?")
    assert page.text(".assistant > article > .body").splitlines()[-1] == "<b>not</b> thought"
    page.reload()
    assert page.text(".assistant > article > .body").splitlines() == ["It is 4.", "Plain", "<b>not</b> thought"]
    assert len(page.all(".thought")) == 2


def test_any_text_may_follow_any_other(page: Page):
    """A message that is made anew begins with another text; what is shown is always the last one's."""
    wrong = page.module(
        """
        const { LiveMarkdown } = await import("/static/live.js");
        const { blocks, render } = await import("/static/markdown.js");
        const place = document.createElement("div"), live = new LiveMarkdown(place), wrong = [];
        for (const before of given[0]) {
          for (const text of [...given[0], ""]) {
            live.update(before, before.length % 2 === 0);
            live.update(text, true);
            const whole = document.createElement("div");
            whole.append(render(blocks(text)));
            if (place.textContent.trim() !== whole.textContent.trim()) wrong.push([before, text]);
          }
        }
        return wrong;
        """,
        TEXTS,
    )
    assert wrong == []
