"""A chat on the page, from the first key to the last token."""

import threading

from selenium.webdriver.common.keys import Keys

from tests.server.page.driver import Page
from tests.server.page.stand_in import Answer, Refusal, StandIn


def test_from_the_first_key_to_the_last_token(page: Page, server: StandIn):
    server.answers = [Answer(["Once ", "upon ", "a ", "**time**", "."])]
    assert page.focused() == "composer-text"
    page.type("Tell me a story", Keys.ENTER)
    page.until(lambda: page.answers() == ["Once upon a time."])
    page.until_idle()
    assert page.questions() == ["Tell me a story"]
    assert page.text(".assistant strong") == "time"
    assert page.text("#title") == "Tell me a story"
    assert page.titles() == ["Tell me a story"]
    assert page.focused() == "composer-text"
    [request] = server.requests
    assert request["messages"] == [{"role": "user", "content": "Tell me a story"}]
    assert request["stream"]
    assert request["stream_options"] == {"include_usage": True}
    assert set(request) == {"messages", "stream", "stream_options"}  # the server's defaults are its own


def test_the_next_question_brings_the_conversation_with_it(page: Page, server: StandIn):
    assert page.ask("One") == "Hello."
    page.ask("Two")
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"] == "Hello."


def test_text_appears_while_it_is_made(page: Page, server: StandIn):
    go_on = threading.Event()
    server.answers = [Answer(["The beginning", go_on.wait, " and the end."])]
    page.say("Go")
    page.until(lambda: page.answers() == ["The beginning"])
    assert page.find("#stop").is_displayed()
    assert not page.find("#send").is_displayed()
    go_on.set()
    page.until(lambda: page.answers() == ["The beginning and the end."])


def test_figures_of_each_answer(page: Page, server: StandIn):
    server.answers = [Answer([" word"] * 20, pause=0.005)]
    page.ask("Go")
    figures = page.text(".figures")
    assert figures.startswith("20 tokens at ")
    assert "tok/s · first token after " in figures
    assert figures.endswith("context 32 of 2,048, 3 reused")


def test_stopping_keeps_what_there_is_and_ends_the_request(page: Page, server: StandIn):
    never = threading.Event()
    server.answers = [Answer(["Some text", *[lambda: never.wait(0.05)] * 400, *[" more"] * 2000])]
    page.say("Go")
    page.until(lambda: page.answers() == ["Some text"])
    page.click("#stop")
    page.until_idle()
    assert page.answers() == ["Some text"]
    assert "Stopped." in page.text(".notes")
    assert "about 1 token" in page.text(".figures")
    never.set()
    assert server.disconnected.wait(60)
    assert page.ask("Next") == "Hello."
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Some text"}


def test_escape_stops_too_and_before_the_first_word(page: Page, server: StandIn):
    go_on = threading.Event()
    server.answers = [Answer([go_on.wait, "late"])]
    page.say("Go")
    page.until(lambda: "Reading…" in page.text(".notes"))
    page.type(Keys.ESCAPE)
    page.until_idle()
    go_on.set()
    assert "Stopped before the first word." in page.text(".notes")
    page.ask("Again")  # two questions in a row become one
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Go\n\nAgain"}]


def test_another_answer_is_a_branch(page: Page, server: StandIn):
    server.answers = [Answer(["First"]), Answer(["Second"]), Answer(["Third"])]
    page.ask("Go")
    for expected in ("Second", "Third"):
        page.click(".regenerate")
        page.until(lambda expected=expected: page.answers() == [expected])
        page.until_idle()
    assert page.text(".assistant .branches") == "3/3"
    assert server.requests[0]["messages"] == server.requests[2]["messages"]
    page.click(".previous")
    assert page.answers() == ["Second"]
    assert page.text(".assistant .branches") == "2/3"
    assert page.focused() == "Previous answer"  # so that it can be pressed again
    page.type(Keys.ENTER)
    assert page.answers() == ["First"]
    page.type(Keys.ENTER)  # there is none before
    assert page.text(".assistant .branches") == "1/3"


def test_editing_a_message_is_a_branch_of_all_that_follows(page: Page, server: StandIn):
    server.answers = [Answer(["A"]), Answer(["B"]), Answer(["C"])]
    page.ask("one")
    page.ask("two")
    page.click(".user .edit")
    assert page.focused() == "Edit your message"
    page.fill(".editor textarea", "uno")
    page.type(Keys.ENTER)
    page.until(lambda: page.answers() == ["C"])
    page.until_idle()
    assert page.questions() == ["uno"]
    assert server.requests[2]["messages"] == [{"role": "user", "content": "uno"}]
    page.click(".user .previous")
    assert (page.questions(), page.answers()) == (["one", "two"], ["A", "B"])
    page.click(".user .next")
    assert (page.questions(), page.answers()) == (["uno"], ["C"])


def test_giving_up_an_edit_changes_nothing(page: Page):
    page.ask("one")
    page.click(".user .edit")
    page.type("something else", Keys.ESCAPE)
    assert page.questions() == ["one"]
    assert page.focused() == "Edit this message"


def test_settings_are_the_servers_until_they_are_changed(page: Page, server: StandIn):
    page.click("#settings")
    values = {
        name: page.find(f"#set-{name}").get_attribute("value")
        for name in ("temperature", "top_p", "max_tokens", "seed")
    }
    assert values == {"temperature": "0.6", "top_p": "0.95", "max_tokens": "", "seed": ""}
    for name, value in {"temperature": "1.5", "max_tokens": "50", "seed": "7", "top_k": "0", "stop": "User:"}.items():
        page.fill(f"#set-{name}", value)
    page.find("#system").send_keys("Answer in verse.")
    page.click("#settings-done")
    page.ask("Go")
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Answer in verse."}
    assert {name: sent.get(name) for name in ("temperature", "max_tokens", "seed", "stop")} == {
        "temperature": 1.5, "max_tokens": 50, "seed": 7, "stop": ["User:"],
    }  # fmt: skip
    assert "top_k" not in sent  # it is the server's value
    page.reload()
    page.click("#settings")
    assert page.find("#set-temperature").get_attribute("value") == "1.5"
    page.click("#settings-reset")
    page.click("#settings-done")
    page.ask("Go")
    assert "temperature" not in server.requests[1]


def test_a_wrong_setting_is_told_and_not_taken(page: Page, server: StandIn):
    page.click("#settings")
    page.fill("#set-temperature", "9")
    assert page.text("#hint-temperature") == "A number from 0 to 2."
    assert page.find("#set-temperature").get_attribute("aria-invalid") == "true"
    page.click("#settings-done")
    page.ask("Go")
    assert "temperature" not in server.requests[0]


def test_settings_belong_to_one_conversation(page: Page, server: StandIn):
    page.click("#settings")
    page.find("#system").send_keys("Be short.")
    page.click("#settings-done")
    page.ask("Go")
    page.click("#new")
    page.ask("Go")
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user"]


def test_the_customization_is_in_view(page: Page, server: StandIn):
    assert page.text("#model-line > *").splitlines() == ["tiny-8b", "cpu", "bf16", "int8", "compiled", "61 MB a token"]
    server.answers = [Answer([" word"] * 30, pause=0.004)]
    page.ask("Go")
    assert "% of bandwidth" in page.text("#model-line")
    page.click("#model")
    panel = page.text("#model-panel")
    assert "32 GB/s" in panel
    assert "allows 525 tok/s for one answer" in panel
    assert "2,048 tokens" in panel
    share = float(page.find("#model-panel meter").get_attribute("value"))
    rate = float(page.text(".figures").split(" at ")[1].split(" tok/s")[0])
    assert abs(share - rate * 61e6 / 32e9) < 0.01


def test_errors_are_plain_words_with_another_try(page: Page, server: StandIn):
    server.answers = [
        Refusal(429, "full", headers={"Retry-After": "3"}),
        Refusal(400, "2050 tokens and 2048 fit", "context_length_exceeded"),
        Refusal(400, "top_p must be over 0"),
        Refusal(503, "draining"),
        Answer(["Half an", " answer"], breaks="error"),
    ]
    page.ask("Go")
    assert "as many requests as it takes. Try again in 3 seconds." in page.text(".problem")
    for expected in (
        "longer than the model's context",
        "The server refused the request: top_p must be over 0",
        "starting or shutting down",
        "The server failed: out of memory",
    ):
        page.click(".problem button")
        page.until(lambda expected=expected: expected in page.text(".problem"))
        page.until_idle()
    assert page.answers() == ["Half an answer"]
    page.click(".problem button")
    page.until(lambda: page.answers() == ["Hello."])
    page.until_idle()
    assert page.all(".problem") == []
    assert page.text(".assistant .branches") == "2/2"  # the half one is kept


def test_a_connection_that_breaks_in_the_middle(page: Page, server: StandIn):
    server.answers = [Answer(["Half"], breaks="cut")]
    page.ask("Go")
    assert page.answers() == ["Half"]
    assert "lost in the middle" in page.text(".problem")


def test_a_server_that_is_gone_and_comes_back(page: Page, server: StandIn):
    page.ask("Go")
    server.stop()
    page.ask("Still there?")
    assert "The server does not answer." in page.text(".problem")
    assert "does not answer" in page.text("#banner")
    server.start()
    page.until(lambda: not page.find("#banner").is_displayed())
    page.click(".problem button")
    page.until(lambda: page.answers() == ["Hello.", "Hello."])


def test_a_key_is_asked_for_and_used(browser, server: StandIn):
    server.key = "sesame"
    page = Page(browser, server.address)
    assert "asks for an API key" in page.text("#ask-dialog")
    page.type("wrong", Keys.ENTER)
    page.until(lambda: "does not accept this API key" in page.text("#ask-dialog"))
    page.type("sesame", Keys.ENTER)
    page.until(lambda: "tiny-8b" in page.text("#model-line"))
    assert page.ask("Go") == "Hello."
    page.reload()
    assert page.ask("Go") == "Hello."
    server.key = "changed"
    page.say("Go")
    page.until(lambda: "does not accept" in page.text("#ask-dialog"))
    page.type("changed", Keys.ENTER)  # and what had failed is asked again
    page.until(lambda: page.answers() == ["Hello."] * 3)
    page.assert_nothing_bad()


def test_another_model_behind_the_same_address_is_noticed(page: Page, server: StandIn):
    server.customization = {**server.customization, "model": "other-1b", "quantization": None, "compiled": False}
    page.ask("Go")
    page.until(lambda: page.text("#model-line strong") == "other-1b")
    assert page.text("#model-line > *").splitlines()[:5] == ["other-1b", "cpu", "bf16", "not quantized", "not compiled"]


def test_what_everybody_should_know_is_seen_until_it_is_closed(browser, server: StandIn):
    """Here: that this browser keeps nothing."""
    block = "Object.defineProperty(window, name, { get() { throw new DOMException('no'); } });"
    hide = {"source": f"for (const name of ['indexedDB', 'localStorage', 'sessionStorage']) {block}"}
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", hide)["identifier"]
    try:
        page = Page(browser, server.address)
        assert "keeps nothing here" in page.text("#notice")
        page.click("#notice-close")
        assert not page.find("#notice").is_displayed()
        assert page.ask("Go") == "Hello."
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script})
    page.assert_nothing_bad()


def test_a_conversation_may_outgrow_the_context(page: Page, server: StandIn):
    """40 tokens, of which 10 are for the answer: 30 words are sent at most, whole exchanges, and the instructions."""
    server.customization = {**server.customization, "context_length": 40}
    page.reload()
    page.click("#settings")
    page.fill("#system", "Be brief.")
    page.leave()
    for number in range(1, 6):
        page.ask(f"{number} and seven more words to fill it")
    for request in server.requests:
        messages = request["messages"]
        assert sum(len(message["content"].split()) + 1 for message in messages) <= 30
        roles = [message["role"] for message in messages]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
    assert [request["messages"][1]["content"][0] for request in server.requests] == ["1", "1", "2", "3", "4"]
    assert "the 6 oldest messages are no longer seen" in page.text(".message:last-child .notes")
    assert "no longer seen" not in page.text(".message:nth-child(4) .notes")
    page.click("#settings")
    page.fill("#set-max_tokens", "30")
    page.leave()
    page.ask("6 and seven more words to fill it")
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["system", "user"]


def test_a_message_that_alone_is_too_long_is_the_servers_to_refuse(page: Page, server: StandIn):
    server.customization = {**server.customization, "context_length": 40}
    page.reload()
    page.ask("short")
    server.answers = [Refusal(400, "51 tokens and 40 fit", "context_length_exceeded")]
    page.ask("word " * 50)
    assert "longer than the model's context" in page.text(".problem")
