"""Many conversations, kept in the browser: a reload, search, rename, delete, export, import, two tabs."""

import json
import threading
from pathlib import Path

from selenium.webdriver.common.keys import Keys

from tests.server.page.driver import Page
from tests.server.page.stand_in import Answer, StandIn


def exported(page: Page, downloads: Path, button: str) -> tuple[Path, dict]:
    for old in downloads.iterdir():
        old.unlink()
    page.click(button)
    path = page.until(lambda: next(downloads.glob("*.json"), None))
    return path, json.loads(path.read_text())


def imported(page: Page, path: Path) -> str:
    """Imports a file; what the page says then."""
    page.find("#import-file").send_keys(str(path))
    page.until(lambda: page.find("#ask-dialog").is_displayed())
    said = page.text("#ask-title") + "\n" + page.text("#ask-text")
    page.type(Keys.ENTER)
    page.until(lambda: not page.all("dialog[open]"))
    return said


def test_a_reload_keeps_all(page: Page, server: StandIn):
    server.answers = [Answer(["A"]), Answer(["B"])]
    page.ask("one")
    page.click(".regenerate")
    page.until(lambda: page.answers() == ["B"])
    page.until_idle()
    page.click(".previous")
    figures = page.text(".figures")
    [first, _] = [node["id"] for node in page.kept()[0]["nodes"] if node["role"] == "assistant"]
    page.until(lambda: first in dict(page.kept()[0]["chosen"]).values())
    page.reload()
    assert (page.questions(), page.answers()) == (["one"], ["A"])
    assert page.text(".assistant .branches") == "1/2"
    assert page.text(".figures") == figures
    assert page.titles() == ["one"]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_there_is(page: Page, server: StandIn):
    never = threading.Event()
    server.answers = [Answer([*["word "] * 50, lambda: never.wait(20)])]
    page.say("Go")
    page.until(lambda: page.answers() == [("word " * 50).strip()])
    page.reload()
    never.set()
    assert page.answers() == [("word " * 50).strip()]
    assert "Stopped." in page.text(".notes")
    assert page.ask("Next") == "Hello."
    assert server.requests[1]["messages"][1]["content"] == "word " * 50
    page.reload()
    assert len(page.answers()) == 2
    assert page.script("return Object.keys(localStorage).filter((key) => key.includes('partial'))") == []


def test_what_is_not_sent_yet_is_kept(page: Page):
    page.type("half a thought")
    page.reload()
    assert page.find("#composer-text").get_attribute("value") == "half a thought"


def test_going_from_one_to_another_and_back(page: Page):
    page.ask("first one")
    page.click("#new")
    assert page.text("#title") == "New conversation"
    assert page.focused() == "composer-text"
    page.ask("second one")
    assert page.titles() == ["second one", "first one"]
    page.click("#conversations li:last-child a")
    assert page.questions() == ["first one"]
    page.driver.back()
    page.until(lambda: page.questions() == ["second one"])
    page.reload()
    assert page.questions() == ["second one"]


def test_an_answer_goes_on_while_another_conversation_is_seen(page: Page, server: StandIn):
    go_on = threading.Event()
    server.answers = [Answer(["Slow", go_on.wait, " answer"]), Answer(["Quick answer"])]
    page.say("slow")
    page.until(lambda: page.answers() == ["Slow"])
    page.click("#new")
    assert page.ask("quick") == "Quick answer"
    assert len(page.all("#conversations .busy")) == 1
    go_on.set()
    page.until(lambda: page.all("#conversations .busy") == [])
    page.click("#conversations li:last-child a, #conversations li:not(:has([aria-current])) a")
    page.until(lambda: page.answers() == ["Slow answer"])


def test_search_finds_titles_and_messages(page: Page, server: StandIn):
    server.answers = [Answer(["The kettle is on."]), Answer(["Nothing here."])]
    page.ask("tea")
    page.click("#new")
    page.ask("coffee")
    page.fill("#search", "KETTLE")
    page.until(lambda: page.titles() == ["tea"])
    assert page.text("#conversations mark") == "kettle"
    page.fill("#search", "xyz")
    page.until(lambda: page.titles() == [])
    assert "Nothing found." in page.text("#conversations")
    page.type(Keys.ESCAPE)
    assert len(page.titles()) == 2


def test_rename_and_delete(page: Page):
    page.ask("a question")
    page.click("#rename")
    assert page.focused() == "ask-field"
    page.type("My own title", Keys.ENTER)
    page.until(lambda: page.titles() == ["My own title"])
    page.reload()
    page.ask("another question")
    assert page.titles() == ["My own title"]
    page.click("#delete")
    assert page.focused() == "ask-no"  # what cannot be undone is not what Enter does
    page.leave()
    assert page.titles() == ["My own title"]
    page.click("#delete")
    page.click("#ask-yes")
    page.until(lambda: page.titles() == [])
    assert page.questions() == []
    page.reload()
    assert page.titles() == []


def test_export_and_import(page: Page, server: StandIn, downloads: Path, browser, tmp_path: Path):
    server.answers = [Answer(["A **b**"]), Answer(["B"])]
    page.ask("one")
    page.click(".regenerate")
    page.until(lambda: page.answers() == ["B"])
    page.until_idle()
    page.click("#new")
    page.ask("two")
    path, document = exported(page, downloads, "#export-all")
    assert (document["format"], document["version"]) == ("torchchat conversations", 1)
    assert sorted(one["title"] for one in document["conversations"]) == ["one", "two"]
    assert "0 conversations came in; 2 were here already" in imported(page, path)
    assert len(page.titles()) == 2
    _, single = exported(page, downloads, "#export")
    assert [one["title"] for one in single["conversations"]] == ["two"]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(document))
    with StandIn() as elsewhere:  # another origin, where nothing is
        there = Page(browser, elsewhere.address)
        assert "2 conversations came in" in imported(there, path)
        there.until(lambda: sorted(there.titles()) == ["one", "two"])
        there.reload()
        assert sorted(there.titles()) == ["one", "two"]
        there.fill("#search", "one")
        there.click("#conversations a")
        assert there.answers() == ["B"]
        there.click(".previous")
        assert there.answers() == ["A b"]
        there.assert_nothing_bad()
        page.driver.get(page.address)


def test_a_file_that_is_damaged_changes_nothing(page: Page, tmp_path: Path, downloads: Path):
    page.ask("one")
    _, good = exported(page, downloads, "#export-all")

    def damaged(change) -> str:
        document = json.loads(json.dumps(good))
        change(document, document["conversations"][0])
        return json.dumps(document)

    def node(one):
        return one["nodes"][1]

    cases = {
        "no JSON": "{",
        "no export": "[]",
        "no export of": damaged(lambda document, _: document.update(format="x")),
        "version 2": damaged(lambda document, _: document.update(version=2)),
        "no list of": damaged(lambda document, _: document.update(conversations={})),
        "it is no object": damaged(lambda document, _: document.update(conversations=[1])),
        "answers one that is not before it": damaged(lambda _, one: one["nodes"].reverse()),
        'the role "system"': damaged(lambda _, one: node(one).update(role="system")),
        "the status": damaged(lambda _, one: node(one).update(status="__proto__")),
        "same id": damaged(lambda _, one: one["nodes"].append(one["nodes"][0])),
        "an id is missing or odd": damaged(lambda _, one: node(one).update(id="__proto__")),
        "a message is missing": damaged(lambda _, one: node(one).update(content={"x": 1})),
        "no setting": damaged(lambda _, one: one.update(settings={"messages": []})),
        '"temperature" is wrong': damaged(lambda _, one: one.update(settings={"temperature": "hot"})),
        "does not exist": damaged(lambda _, one: one.update(chosen=[[None, "nobody"]])),
        "a time": damaged(lambda _, one: one.update(created="now")),
        "figure": damaged(lambda _, one: node(one).update(figures={"rate": "fast"})),
    }
    path = tmp_path / "damaged.json"
    for expected, text in cases.items():
        path.write_text(text)
        said = imported(page, path)
        assert said.startswith("Nothing was imported")
        assert expected in said
    assert page.titles() == ["one"]


def test_two_tabs_see_the_same_and_lose_nothing(page: Page, server: StandIn):
    page.ask("one")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.driver.get(page.address)
        page.until(lambda: page.titles() == ["one"])
        page.click("#conversations a")
        page.ask("from the second tab")
        page.driver.switch_to.window(first)
        page.until(lambda: page.questions() == ["one", "from the second tab"])
    finally:
        for handle in page.driver.window_handles:
            if handle != first:
                page.driver.switch_to.window(handle)
                page.driver.close()
        page.driver.switch_to.window(first)


def test_many_long_conversations_are_still_quick(page: Page):
    """A second for what a person does, with a thousand conversations in the list."""
    page.module(
        """
        const store = await import("/static/store.js"), tree = await import("/static/tree.js");
        for (let i = 0; i < 1000; i += 1) {
          const one = tree.newConversation();
          let parent = null;
          for (const role of ["user", "assistant", "user", "assistant", "user", "assistant"]) {
            parent = tree.addMessage(one, parent, role, `text ${i} `.repeat(50)).id;
          }
          await store.save(one);
        }
        """
    )
    page.reload()
    page.until(lambda: len(page.titles()) == 1000)
    page.fill("#search", "text 777")
    page.until(lambda: len(page.titles()) == 1)
    page.click("#conversations a")
    page.until(lambda: len(page.questions()) == 3)
