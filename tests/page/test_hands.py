"""The hands of a person: where the focus is after each act, and clicks that come too quickly."""

from __future__ import annotations

import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.page.browsers import Person, until
from tests.page.test_looks import look
from tests.serve.cases import LONG, serving

COUNT = "Count from 38 to 63."
SORT = "Sort: 6 3 1 7"
SETTLES = "document.querySelectorAll('.settling > span').length > 3"


@pytest.fixture
def endless(person, monkeypatch):
    """A server whose runs take two hundred steps; the person is before its page."""
    with serving(settings=LONG) as running:
        monkeypatch.setattr(person, "address", f"http://127.0.0.1:{running.port}/")
        yield running


def held(person: Person) -> str:
    """What has the focus, by its words."""
    return str(
        person.js("const e = document.activeElement; return e.id || e.ariaLabel || e.textContent")
    )


def hold(person: Person, words: str, inside: str = "#main") -> None:
    """Put the focus on a button."""
    person.js(
        "[...document.querySelectorAll(arguments[0] + ' button, ' + arguments[0] + ' a')].find("
        "(e) => (e.ariaLabel || e.textContent) === arguments[1]).focus()",
        inside,
        words,
    )


def test_the_focus_goes_on_from_where_it_was(person):
    person.open()
    person.ask(SORT)
    person.answered()
    hold(person, "Retry")
    person.press(Keys.ENTER)
    person.see("document.querySelector('.versions')")
    person.answered()
    assert held(person) == "Retry"
    hold(person, "the version before")
    person.press(Keys.ENTER)
    person.see("document.querySelector('.versions span').textContent === '1/2'")
    assert held(person) == "the next version"  # there is none before
    person.press(Keys.ENTER)
    person.see("document.querySelector('.versions span').textContent === '2/2'")
    assert held(person) == "the version before"
    hold(person, "Edit")
    person.press(Keys.ENTER)
    assert held(person) == "Your message"
    person.press(Keys.ESCAPE)
    assert held(person) == "Edit" and not person.all(".editing")


def test_the_focus_stays_in_decide_and_form(person):
    person.open("decide")
    hold(person, "Decide")
    person.press(Keys.ENTER)
    person.see("document.querySelectorAll('.bars table').length === 3")
    person.see("document.activeElement.textContent === 'Decide'")
    for count in (2, 1, 0):
        hold(person, "Remove this question")
        person.press(Keys.ENTER)
        assert len(person.all(".question")) == count
        assert held(person) == ("Remove this question" if count else "Add a question")
    person.go("form")
    hold(person, "Fill")
    person.press(Keys.ENTER)
    person.see("document.querySelector('.valid:not([hidden])')")
    assert held(person) == "Fill"


def test_the_list_of_conversations_opens_and_closes_by_the_keyboard(person):
    look(person, 390, "light")
    try:
        person.open()
        person.ask(SORT)
        person.answered()
        until(lambda: person.all(".conversation"), "the list")
        hold(person, "Conversations")
        person.press(Keys.ENTER)
        assert held(person) == SORT
        assert person.one(".narrow-only").get_attribute("aria-expanded") == "true"
        person.press(Keys.ESCAPE)
        assert held(person) == "Conversations"
        assert not person.one(".conversation").is_displayed()
    finally:
        person.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_link_to_the_text_stays_in_its_part(person):
    person.open("document")
    person.js("document.querySelector('.skip').focus()")
    person.press(Keys.ENTER)
    assert held(person) == "main"
    assert person.js("return [location.hash, document.querySelector('.part').ariaLabel]") == [
        "#document",
        "Document",
    ]


def test_a_double_click_sends_and_does_not_stop(person, endless):
    person.open()
    person.write("#message", COUNT)
    ActionChains(person.driver).double_click(person.one(".field button.primary")).perform()
    person.see(SETTLES)
    person.click("Stop", ".field")
    person.answered()
    assert len(person.all(".turn.user")) == 1


def test_quick_clicks_leave_no_run_behind(person, endless):
    person.open()
    person.driver.execute_async_script(
        "const [text, done] = arguments; (async () => { for (let i = 0; i < 30; i++) {"
        "message.value = text;"
        "[...document.querySelectorAll('.field button.primary')].find((e) => !e.hidden).click();"
        "await new Promise((resolve) => setTimeout(resolve, 25)); } done(); })()",
        COUNT,
    )
    person.press(Keys.ESCAPE)
    until(lambda: endless.engine.counts["running"] == 0, "the end of the runs")
    person.see("!document.querySelector('.running')")
    asked = len(person.all(".turn.user"))
    assert 2 <= asked == len(person.all(".turn.assistant"))
    person.click("New")
    person.ask(COUNT)
    person.see(SETTLES)
    person.press(Keys.ESCAPE)
    person.answered()


def test_what_is_typed_in_a_turn_stays_when_an_answer_ends(person, endless):
    person.open()
    person.ask(COUNT)
    person.see(SETTLES)
    person.click("Edit")
    person.write(".editing textarea", "Something else")
    person.one(".editing textarea").send_keys(Keys.ENTER)
    person.see("document.getElementById('notice').textContent.includes('is being written')")
    person.click("Stop", ".running")
    person.answered()
    assert person.js("return document.querySelector('.editing textarea').value") == "Something else"
    person.click("Cancel")
    assert not person.all(".editing")
    assert person.text(".turn.user .said") == COUNT


def test_escape_in_a_turn_that_is_edited_does_not_stop_the_answer(person, endless):
    person.open()
    person.ask(COUNT)
    person.see(SETTLES)
    person.click("Edit")
    person.press(Keys.ESCAPE)
    assert not person.all(".editing") and person.all(".running")
    person.press(Keys.ESCAPE)
    person.answered()


def test_a_page_that_is_left_stops_its_run(person, endless):
    person.open()
    person.ask(COUNT)
    person.see(SETTLES)
    person.driver.get("about:blank")
    until(lambda: endless.engine.counts["running"] == 0, "the end of the run")
    assert endless.steps < 200
    person.driver.back()
    person.see("document.querySelector('.turn.assistant')")
    assert not person.all(".running")


def test_copy_says_so_and_is_copy_again(person):
    person.open()
    person.js("navigator.clipboard.writeText = async () => {}")
    person.ask(SORT)
    person.answered()
    name = "document.querySelector('.turn.assistant footer button').textContent"
    for _ in range(2):
        person.one(".turn.assistant footer button").click()
        person.see(f"{name} === 'Copied'")
    time.sleep(2)  # both have had their time
    assert person.js(f"return {name}") == "Copy"
