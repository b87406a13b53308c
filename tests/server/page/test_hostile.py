"""Whatever a model writes, the page shows text: no script runs, nothing is fetched, links lead only where they say."""

import re

import pytest
from selenium.common.exceptions import JavascriptException

from tests.server.page.driver import Page
from tests.server.page.hostile import ANSWERS
from tests.server.page.stand_in import STATIC, Answer, StandIn

CHECK = """
const TAGS = new Set(
  "P BR HR H3 H4 H5 H6 STRONG EM DEL CODE PRE UL OL LI BLOCKQUOTE TABLE THEAD TBODY TR TH TD A SPAN DIV".split(" "),
);
const ATTRIBUTES = new Set("href title class start align rel target role tabindex aria-label".split(" "));
function wrong(place) {
  const found = [];
  for (const node of place.querySelectorAll("*")) {
    if (node.closest("button")) continue; // of the frame around code, which is ours
    if (!TAGS.has(node.tagName)) found.push("<" + node.tagName + ">");
    for (const { name } of node.attributes) if (!ATTRIBUTES.has(name)) found.push(node.tagName + " " + name);
    const name = node.tagName + " " + node.className;
    if (node.tagName === "DIV" && !["code", "code-head", "table"].includes(node.className)) found.push(name);
    if (node.tagName === "SPAN" && !/^(hljs-|language-|task|$)/.test(node.className)) found.push(name);
    if (node.hasAttribute("href")) {
      const { protocol, origin } = new URL(node.href);
      if (!["http:", "https:", "mailto:"].includes(protocol) || origin === location.origin) found.push(node.href);
      if (node.rel !== "noopener noreferrer" || node.target !== "_blank") found.push("a link without rel");
    }
  }
  return found;
}
"""


def test_no_hostile_answer_gets_anywhere_at_any_length(page: Page):
    """Every answer, shown after each of its characters, as it would be while it is made."""
    found = page.module(
        CHECK
        + """
        const { LiveMarkdown } = await import("/static/live.js");
        const place = document.createElement("div"), list = document.getElementById("messages");
        place.className = "body";
        list.append(place);
        const found = [];
        for (const answer of given[0]) {
          const live = new LiveMarkdown(place);
          for (let end = 1; end <= answer.length; end += 1) {
            live.update(answer.slice(0, end), end === answer.length);
            for (const what of wrong(place)) found.push([answer.slice(0, end), what]);
          }
          for (const link of place.querySelectorAll("a:not([href])")) link.click();
          await new Promise((resolve) => setTimeout(resolve)); // for what would run later
        }
        return found;
        """,
        ANSWERS,
    )
    assert found == []
    assert page.find("#composer-text").is_displayed()


def test_the_whole_corpus_streamed(page: Page, server: StandIn):
    text = "\n\n".join(ANSWERS)
    server.answers = [Answer([text[at : at + 7] for at in range(0, len(text), 7)], pause=0.0005)]
    page.ask("Do your worst")
    body = page.text(".assistant .body")
    for shown in ("<script>hit()</script>", "<img src=x onerror=hit()>", "<iframe srcdoc="):
        assert shown in body  # as text
    assert page.module(CHECK + "return wrong(document.querySelector('.assistant .body'))") == []
    page.reload()
    assert page.text(".assistant .body") == body


def test_the_watch_sees_what_it_should(page: Page):
    """The tests above could not fail if these went unseen."""
    page.script("document.body.append(Object.assign(new Image(), {src: 'https://evil.test/x.png'}))")
    page.script("Object.assign(document.createElement('a'), {href: 'javascript:hit()'}).click()")
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        page.script("document.getElementById('messages').innerHTML = '<b>x</b>'")
    page.until(lambda: len(page.script("return seen.violations")) >= 2)
    assert page.script("return seen.hits") == []  # the policy holds
    assert page.module(CHECK + "const p = document.createElement('p'); p.append(new Image()); return wrong(p)") == [
        "<IMG>"
    ]
    page.script("seen.violations.length = 0")
    assert page.foreign_requests() == ["https://evil.test/x.png"]


def test_hostile_questions_titles_and_errors_are_text(page: Page, server: StandIn):
    hostile = "<img src=x onerror=hit()><script>hit()</script>"
    page.ask(hostile)
    assert page.questions() == [hostile]
    assert page.titles() == [hostile]
    page.fill("#search", "onerror")
    page.until(lambda: page.text("#conversations mark") == "onerror")
    assert page.all("#conversations img, #conversations script, .user .body *, #title *") == []


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.glob("*.js")))
def test_no_module_makes_html_of_text(name):
    """Only markdown.js turns text into HTML, through DOMPurify; nobody makes code or styles of text."""
    code = (STATIC / name).read_text()
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseFromString|createContextualFragment|document\.write"
    assert re.findall(rf"{ways}|\beval\b|new Function|setAttribute\(\"(?:on|style)", code) == []
    assert ("DOMPurify" in code) == (name == "markdown.js")
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", code) == []


def test_the_page_has_no_inline_script_or_style():
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=\"/static/)|<style|\sstyle=|\son\w+=|javascript:", html) == []
    assert re.findall(r"(?:src|href)=\"(?!/static/|#)", html) == []
    assert re.findall(r"url\(|@import", "".join(path.read_text() for path in STATIC.glob("*.css"))) == []
